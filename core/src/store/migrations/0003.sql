-- Where assets come from, as data; and of each asset its files, where it came from, and what was downloaded.

CREATE TABLE providers (
    name       TEXT PRIMARY KEY,
    spec       TEXT NOT NULL,
    origin     TEXT NOT NULL CHECK (origin IN ('built_in', 'configured', 'user')),
    updated_at INTEGER NOT NULL
) STRICT;

ALTER TABLE assets ADD COLUMN files TEXT NOT NULL DEFAULT '[]';
ALTER TABLE assets ADD COLUMN origin TEXT NOT NULL DEFAULT '';
ALTER TABLE assets ADD COLUMN download_sha256 TEXT;
