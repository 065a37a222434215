-- How an image means to be run, as JSON; NULL where it does not say.
ALTER TABLE images ADD COLUMN config TEXT;
