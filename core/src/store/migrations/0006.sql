-- Whether an image has an init system; NULL where nobody looked.
ALTER TABLE images ADD COLUMN has_init INTEGER;
