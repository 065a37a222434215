-- The network of a VM is a policy. Those of before have none, whatever the default for new ones is.
UPDATE vms SET spec = json_set(spec, '$.network', json('{"mode":"none"}')) WHERE json_type(spec, '$.network') = 'text';
