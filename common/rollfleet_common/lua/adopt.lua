#!lua flags=allow-oom
-- Make the trainer the owner of every unsettled rollout and tombstone that another reader holds,
-- or that was delivered to it in a reply that was lost.
-- KEYS 1 fence  2 stream   ARGV 1 token  2 consumer  3 from entry (exclusive)  4 at most
-- Returns {last entry looked at or '', ids...}, or {-2} if the token is superseded.
if redis.call('HGET', KEYS[1], 'token') ~= ARGV[1] then return {-2} end
local rows = redis.call('XPENDING', KEYS[2], 'trainer', '(' .. ARGV[3], '+', ARGV[4])
local out = {''}
for _, row in ipairs(rows) do
  if row[2] ~= ARGV[2] then redis.call('XCLAIM', KEYS[2], 'trainer', ARGV[2], 0, row[1], 'JUSTID') end
  out[1] = row[1]
  out[#out + 1] = row[1]
end
return out
