-- Whether a guest may have written to a drive: it was writable in a VM that was started, or it is a copy of such a drive. Of drives from before nobody
-- knows.
ALTER TABLE drives ADD COLUMN may_hold_data INTEGER NOT NULL DEFAULT 1;
