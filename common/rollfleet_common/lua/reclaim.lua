-- Take over leases that were not renewed: their worker is dead, frozen, or lost a reply.
-- XPENDING IDLE scans the whole list, unlike XAUTOCLAIM, which gives up after 10 x COUNT entries
-- and so never reaches the dead ones of a busy fleet.
-- KEYS 1 prompts stream   ARGV 1 consumer  2 lease in ms  3 at most
-- Returns {entry, deliveries, fields, owner before} of each.
local taken = {}
local idle = redis.call('XPENDING', KEYS[1], 'workers', 'IDLE', ARGV[2], '-', '+', ARGV[3])
for _, row in ipairs(idle) do
  local claimed = redis.call('XCLAIM', KEYS[1], 'workers', ARGV[1], ARGV[2], row[1])
  if #claimed == 1 and claimed[1] and claimed[1][2] then
    taken[#taken + 1] = {row[1], row[4] + 1, claimed[1][2], row[2]}
  end
end
return taken
