-- Drives of their own: cloned from each other, kept when the VM is deleted that they were not made for, mounted at a path.

ALTER TABLE drives ADD COLUMN made_for INTEGER;
UPDATE drives SET made_for = (SELECT vm_id FROM vm_drives WHERE drive_id = drives.id);

ALTER TABLE vm_drives ADD COLUMN mount TEXT;
