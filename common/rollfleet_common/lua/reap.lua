#!lua flags=allow-oom
-- Forget consumers that are long gone. One that still holds leases is left alone, because
-- XGROUP DELCONSUMER would drop them.
-- KEYS 1 prompts   ARGV 1 idle for at least, in ms
-- Returns how many were forgotten.
local reaped = 0
for _, row in ipairs(redis.call('XINFO', 'CONSUMERS', KEYS[1], 'workers')) do
  local c = {}
  for i = 1, #row, 2 do c[row[i]] = row[i + 1] end
  if c.pending == 0 and c.idle >= tonumber(ARGV[1]) then
    redis.call('XGROUP', 'DELCONSUMER', KEYS[1], 'workers', c.name)
    reaped = reaped + 1
  end
end
return reaped
