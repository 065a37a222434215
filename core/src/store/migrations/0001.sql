-- Ids are random 63-bit integers. Times are UTC milliseconds. JSON columns hold objects of nexus-schema.

CREATE TABLE instance (
    only_row    INTEGER PRIMARY KEY CHECK (only_row = 1),
    id          INTEGER NOT NULL,
    created_at  INTEGER NOT NULL
) STRICT;

CREATE TABLE assets (
    id           INTEGER PRIMARY KEY,
    name         TEXT NOT NULL UNIQUE,
    kind         TEXT NOT NULL CHECK (kind IN ('kernel', 'rootfs', 'vmm')),
    provider     TEXT NOT NULL,
    version      TEXT NOT NULL,
    arch         TEXT NOT NULL,
    sha256       TEXT NOT NULL,
    size_bytes   INTEGER NOT NULL,
    verified     TEXT NOT NULL CHECK (verified IN ('signature', 'checksum', 'none')),
    owner        TEXT NOT NULL,
    tags         TEXT NOT NULL DEFAULT '{}',
    installed_at INTEGER NOT NULL
) STRICT;

CREATE TABLE images (
    id          INTEGER PRIMARY KEY,
    parent_id   INTEGER REFERENCES images (id) ON DELETE SET NULL,
    name        TEXT NOT NULL UNIQUE,
    source      TEXT NOT NULL,
    status      TEXT NOT NULL CHECK (status IN ('building', 'success', 'failed', 'cancelled')),
    distro      TEXT,
    init        TEXT NOT NULL,
    arch        TEXT NOT NULL,
    size_bytes  INTEGER NOT NULL DEFAULT 0,
    used_bytes  INTEGER NOT NULL DEFAULT 0,
    sha256      TEXT NOT NULL DEFAULT '',
    owner       TEXT NOT NULL,
    tags        TEXT NOT NULL DEFAULT '{}',
    created_at  INTEGER NOT NULL
) STRICT;

CREATE TABLE drives (
    id          INTEGER PRIMARY KEY,
    parent_id   INTEGER REFERENCES drives (id) ON DELETE SET NULL,
    image_id    INTEGER REFERENCES images (id) ON DELETE SET NULL,
    name        TEXT NOT NULL UNIQUE,
    state       TEXT NOT NULL CHECK (state IN ('creating', 'ready')),
    size_bytes  INTEGER NOT NULL,
    read_only   INTEGER NOT NULL DEFAULT 0,
    owner       TEXT NOT NULL,
    tags        TEXT NOT NULL DEFAULT '{}',
    created_at  INTEGER NOT NULL,
    expires_at  INTEGER
) STRICT;
CREATE INDEX drives_by_image ON drives (image_id);

CREATE TABLE vms (
    id             INTEGER PRIMARY KEY,
    parent_id      INTEGER REFERENCES vms (id) ON DELETE SET NULL,
    name           TEXT NOT NULL UNIQUE,
    state          TEXT NOT NULL,
    reason         TEXT,
    generation     INTEGER NOT NULL,
    owner          TEXT NOT NULL,
    tags           TEXT NOT NULL DEFAULT '{}',
    protected      INTEGER NOT NULL DEFAULT 0,
    arch           TEXT NOT NULL,
    cid            INTEGER NOT NULL UNIQUE,
    spec           TEXT NOT NULL,
    image_id       INTEGER REFERENCES images (id) ON DELETE SET NULL,
    image_name     TEXT NOT NULL,
    kernel_id      INTEGER REFERENCES assets (id) ON DELETE RESTRICT,
    driver         TEXT,
    driver_version TEXT,
    accel          TEXT,
    boot_id        INTEGER,
    token          TEXT,
    guest          TEXT,
    timings        TEXT,
    shim_pid       INTEGER,
    shim_start     INTEGER,
    vmm_pid        INTEGER,
    created_at     INTEGER NOT NULL,
    started_at     INTEGER,
    expires_at     INTEGER
) STRICT;
CREATE INDEX vms_by_state ON vms (state);
CREATE INDEX vms_by_image ON vms (image_id);

CREATE TABLE vm_drives (
    vm_id     INTEGER NOT NULL REFERENCES vms (id) ON DELETE CASCADE,
    drive_id  INTEGER NOT NULL UNIQUE REFERENCES drives (id) ON DELETE CASCADE,
    position  INTEGER NOT NULL,
    PRIMARY KEY (vm_id, position)
) STRICT;

-- Kept after the VM is deleted, so no foreign key.
CREATE TABLE vm_history (
    seq        INTEGER PRIMARY KEY AUTOINCREMENT,
    vm_id      INTEGER NOT NULL,
    vm_name    TEXT NOT NULL,
    from_state TEXT,
    to_state   TEXT,
    reason     TEXT NOT NULL,
    at         INTEGER NOT NULL,
    who        TEXT NOT NULL,
    boot_id    INTEGER
) STRICT;
CREATE INDEX vm_history_by_vm ON vm_history (vm_id, seq);

CREATE TABLE ops (
    id            INTEGER PRIMARY KEY,
    seq           INTEGER NOT NULL UNIQUE,
    tool          TEXT NOT NULL,
    state         TEXT NOT NULL CHECK (state IN ('running', 'succeeded', 'failed', 'cancelled')),
    progress      TEXT NOT NULL DEFAULT '{"step":""}',
    subject_id    TEXT,
    subject_name  TEXT,
    result        TEXT,
    error         TEXT,
    owner         TEXT NOT NULL,
    started_at    INTEGER NOT NULL,
    ended_at      INTEGER
) STRICT;
CREATE INDEX ops_by_state ON ops (state);

CREATE TABLE idempotency (
    owner       TEXT NOT NULL,
    tool        TEXT NOT NULL,
    key         TEXT NOT NULL,
    arguments   TEXT NOT NULL,
    op_id       INTEGER NOT NULL REFERENCES ops (id) ON DELETE CASCADE,
    at          INTEGER NOT NULL,
    PRIMARY KEY (owner, tool, key)
) STRICT;

CREATE TABLE calls (
    seq          INTEGER PRIMARY KEY AUTOINCREMENT,
    at           INTEGER NOT NULL,
    owner        TEXT NOT NULL,
    tool         TEXT NOT NULL,
    vm_id        INTEGER,
    duration_us  INTEGER NOT NULL,
    outcome      TEXT NOT NULL
) STRICT;

CREATE TABLE settings (
    seq    INTEGER PRIMARY KEY AUTOINCREMENT,
    key    TEXT NOT NULL,
    value  TEXT NOT NULL,
    at     INTEGER NOT NULL,
    who    TEXT NOT NULL
) STRICT;
CREATE INDEX settings_by_key ON settings (key, seq);
