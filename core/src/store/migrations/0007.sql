-- Ports of guests that are published on the host: at a port of its loopback, or by a Unix socket where that is NULL.
CREATE TABLE published_ports (
    id          INTEGER PRIMARY KEY,
    vm_id       INTEGER NOT NULL REFERENCES vms (id) ON DELETE CASCADE,
    guest_port  INTEGER NOT NULL,
    host_port   INTEGER UNIQUE,
    owner       TEXT NOT NULL,
    created_at  INTEGER NOT NULL
) STRICT;
CREATE INDEX published_ports_by_vm ON published_ports (vm_id);
