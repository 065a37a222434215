-- The newest events: a copy of what the daemon has in memory, for its next start. `event` is an Event; `owner` and `tags` are those of the
-- VM, or `owner` is who began the operation: they decide who may see it.
CREATE TABLE events (
    seq    INTEGER PRIMARY KEY,
    owner  TEXT,
    tags   TEXT NOT NULL,
    event  TEXT NOT NULL
) STRICT;

-- The trace that a call belongs to, as the client gave it.
ALTER TABLE calls ADD COLUMN traceparent TEXT;
