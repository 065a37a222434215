-- Counts on while the database is used, and a file of the state directory follows it: if the file's number is greater, the database is an older copy.
ALTER TABLE instance ADD COLUMN epoch INTEGER NOT NULL DEFAULT 0;
