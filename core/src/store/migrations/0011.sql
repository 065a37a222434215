-- Access tokens: limited rights. Of the secret only its SHA-256 is kept. `rights` is a Rights; `parent_id` is the token that made it.
CREATE TABLE tokens (
    seq         INTEGER PRIMARY KEY AUTOINCREMENT,
    id          INTEGER NOT NULL UNIQUE,
    name        TEXT NOT NULL,
    hash        TEXT NOT NULL UNIQUE,
    parent_id   INTEGER REFERENCES tokens (id),
    owner       TEXT NOT NULL,
    rights      TEXT NOT NULL,
    created_at  INTEGER NOT NULL,
    expires_at  INTEGER,
    revoked_at  INTEGER
) STRICT;
CREATE UNIQUE INDEX tokens_by_name ON tokens (owner, name) WHERE revoked_at IS NULL;
CREATE INDEX tokens_by_parent ON tokens (parent_id);

-- The log of calls is an audit log: which boot answered, what allowed or denied the call, and how much went in and out.
ALTER TABLE calls ADD COLUMN boot_id INTEGER;
ALTER TABLE calls ADD COLUMN rule TEXT NOT NULL DEFAULT 'owner';
ALTER TABLE calls ADD COLUMN bytes_in INTEGER NOT NULL DEFAULT 0;
ALTER TABLE calls ADD COLUMN bytes_out INTEGER NOT NULL DEFAULT 0;
ALTER TABLE calls ADD COLUMN denied INTEGER NOT NULL DEFAULT 0;
CREATE INDEX calls_by_vm ON calls (vm_id, seq) WHERE vm_id IS NOT NULL;
CREATE INDEX calls_by_owner ON calls (owner, seq);
CREATE INDEX calls_by_denied ON calls (seq) WHERE denied;
CREATE INDEX vms_by_owner ON vms (owner);
CREATE INDEX drives_by_owner ON drives (owner);
