-- The network that VMs in mode nat share: the subnet that was chosen for it at its first use, which stays when the host's routes change.
CREATE TABLE network (
    only_row  INTEGER PRIMARY KEY CHECK (only_row = 1),
    subnet    TEXT NOT NULL
) STRICT;
-- The addresses of VMs in it, each by its number in the subnet, and the boot that has an interface with them now.
CREATE TABLE network_leases (
    vm_id    INTEGER PRIMARY KEY REFERENCES vms (id) ON DELETE CASCADE,
    number   INTEGER NOT NULL UNIQUE,
    mac      TEXT NOT NULL UNIQUE,
    boot_id  INTEGER,
    tap      TEXT
) STRICT;
