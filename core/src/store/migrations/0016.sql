-- A suspended VM: its memory is on the disk, and no VMM runs it. The text is a Suspended, which names the directory. It is there from when the memory is
-- whole until the VM is ready again.
ALTER TABLE vms ADD COLUMN suspended TEXT;
