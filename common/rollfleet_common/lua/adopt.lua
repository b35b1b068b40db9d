#!lua flags=allow-oom
-- Make the trainer the owner of every unsettled rollout and tombstone that another reader holds,
-- or that was delivered to it in a reply that was lost, or to a reader that was deleted since.
-- KEYS 1 fence  2 stream   ARGV 1 token  2 consumer  3 from entry (exclusive)  4 at most
-- Returns {last entry looked at or '', ids...}, or {-2} if the token is superseded.
if redis.call('HGET', KEYS[1], 'token') ~= ARGV[1] then return {-2} end
local first = ARGV[3] == '0-0' and redis.call('XRANGE', KEYS[2], '-', '+', 'COUNT', 1)[1]
if first and #redis.call('XPENDING', KEYS[2], 'trainer', first[1], first[1], 1) == 0 then
  local last
  for _, row in ipairs(redis.call('XINFO', 'GROUPS', KEYS[2])) do
    local group = {}
    for i = 1, #row, 2 do group[row[i]] = row[i + 1] end
    if group.name == 'trainer' then last = group['last-delivered-id'] end
  end
  -- Only deleting a reader, or acknowledging without deleting, leaves what was read and nobody holds.
  for _, entry in ipairs(redis.call('XRANGE', KEYS[2], '-', last)) do
    if #redis.call('XPENDING', KEYS[2], 'trainer', entry[1], entry[1], 1) == 0 then
      redis.call('XCLAIM', KEYS[2], 'trainer', ARGV[2], 0, entry[1], 'FORCE', 'JUSTID')
    end
  end
end
local rows = redis.call('XPENDING', KEYS[2], 'trainer', '(' .. ARGV[3], '+', ARGV[4])
local out = {''}
for _, row in ipairs(rows) do
  if row[2] ~= ARGV[2] then redis.call('XCLAIM', KEYS[2], 'trainer', ARGV[2], 0, row[1], 'JUSTID') end
  out[1] = row[1]
  out[#out + 1] = row[1]
end
return out
