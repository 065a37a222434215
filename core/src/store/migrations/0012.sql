-- By how much drives were grown by callers who did not make them: that counts for the callers' quotas of disk.
CREATE TABLE drive_growths (
    drive_id    INTEGER NOT NULL REFERENCES drives (id) ON DELETE CASCADE,
    owner       TEXT NOT NULL,
    size_bytes  INTEGER NOT NULL,
    PRIMARY KEY (drive_id, owner)
) STRICT;
CREATE INDEX drive_growths_by_owner ON drive_growths (owner);
