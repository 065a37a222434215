-- Checkpoints: a VM's memory and drives at one moment. They outlive their VM, so `vm_id` refers to no row. `manifest` is a Manifest, and the same
-- text is beside the files; `token` is that of the boot, which is in the saved memory. Of `checkpoints` one that is `making` has no whole files.
CREATE TABLE checkpoints (
    seq              INTEGER PRIMARY KEY AUTOINCREMENT,
    id               INTEGER NOT NULL UNIQUE,
    vm_id            INTEGER NOT NULL,
    vm_name          TEXT NOT NULL,
    parent_id        INTEGER,
    name             TEXT NOT NULL,
    owner            TEXT NOT NULL,
    tags             TEXT NOT NULL DEFAULT '{}',
    state            TEXT NOT NULL CHECK (state IN ('making', 'ready')),
    token            TEXT,
    manifest         TEXT,
    kernel_id        INTEGER,
    memory_bytes     INTEGER NOT NULL DEFAULT 0,
    disk_bytes       INTEGER NOT NULL DEFAULT 0,
    pause_ms         INTEGER NOT NULL DEFAULT 0,
    created_at       INTEGER NOT NULL,
    expires_at       INTEGER
) STRICT;
CREATE UNIQUE INDEX checkpoints_by_name ON checkpoints (vm_id, name);
CREATE INDEX checkpoints_by_owner ON checkpoints (owner);

-- The copies of drives that belong to it, in the order of the VM's devices.
CREATE TABLE checkpoint_drives (
    checkpoint_id  INTEGER NOT NULL REFERENCES checkpoints (id) ON DELETE CASCADE,
    position       INTEGER NOT NULL,
    drive_id       INTEGER NOT NULL,
    name           TEXT NOT NULL,
    mount          TEXT,
    size_bytes     INTEGER NOT NULL,
    read_only      INTEGER NOT NULL,
    image_id       INTEGER,
    PRIMARY KEY (checkpoint_id, position)
) STRICT;

-- The checkpoint that a VM goes on from, and the operation that is still forking it; `parent_id` is the VM that it was forked from.
ALTER TABLE vms ADD COLUMN checkpoint_id INTEGER;
ALTER TABLE vms ADD COLUMN fork_op INTEGER;
