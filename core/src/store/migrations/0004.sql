-- Templates, their versions, and their builds. `spec` is a TemplateSpec.

CREATE TABLE templates (
    id          INTEGER PRIMARY KEY,
    name        TEXT NOT NULL UNIQUE,
    version     INTEGER NOT NULL,
    owner       TEXT NOT NULL,
    tags        TEXT NOT NULL DEFAULT '{}',
    created_at  INTEGER NOT NULL
) STRICT;

CREATE TABLE template_versions (
    template_id  INTEGER NOT NULL REFERENCES templates (id) ON DELETE CASCADE,
    version      INTEGER NOT NULL,
    spec         TEXT NOT NULL,
    owner        TEXT NOT NULL,
    created_at   INTEGER NOT NULL,
    PRIMARY KEY (template_id, version)
) STRICT;

-- A build has a copy of what it builds: it stays as it is when the template changes or goes.
CREATE TABLE builds (
    id             INTEGER PRIMARY KEY,
    seq            INTEGER NOT NULL UNIQUE,
    template_id    INTEGER REFERENCES templates (id) ON DELETE SET NULL,
    template_name  TEXT NOT NULL,
    version        INTEGER NOT NULL,
    spec           TEXT NOT NULL,
    status         TEXT NOT NULL CHECK (status IN ('building', 'success', 'failed', 'cancelled')),
    cached         INTEGER NOT NULL DEFAULT 0,
    digest         TEXT,
    image_id       INTEGER REFERENCES images (id) ON DELETE SET NULL,
    op_id          INTEGER NOT NULL,
    error          TEXT,
    owner          TEXT NOT NULL,
    created_at     INTEGER NOT NULL,
    ended_at       INTEGER
) STRICT;
CREATE INDEX builds_by_template ON builds (template_id, seq);
CREATE INDEX builds_by_digest ON builds (digest);
CREATE INDEX builds_by_image ON builds (image_id);

-- SHA-256 of files that were read as sources, as long as they look the same.
CREATE TABLE hashed_files (
    path    TEXT PRIMARY KEY,
    looks   TEXT NOT NULL,
    sha256  TEXT NOT NULL,
    at      INTEGER NOT NULL
) STRICT;
