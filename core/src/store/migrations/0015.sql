-- A VM that is being put back to a checkpoint, from when all copies of drives are on the disk until each is in its place. `drives` is a list of
-- StagedDrive. It is finished whatever happens, before anything uses these drives.
CREATE TABLE rollbacks (
    vm_id          INTEGER PRIMARY KEY REFERENCES vms (id) ON DELETE CASCADE,
    checkpoint_id  INTEGER NOT NULL,
    drives         TEXT NOT NULL
) STRICT;

-- The last boot of a VM that went on from a checkpoint. Its guest has renewed what it shares with others once it is configured.
CREATE TABLE restores (
    vm_id    INTEGER PRIMARY KEY REFERENCES vms (id) ON DELETE CASCADE,
    boot_id  INTEGER NOT NULL
) STRICT;

-- What the VM of a checkpoint might reach when it was deleted: a NetworkPolicy. NULL while it is there, and of those deleted before this version.
ALTER TABLE checkpoints ADD COLUMN network TEXT;
