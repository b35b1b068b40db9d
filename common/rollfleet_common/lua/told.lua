#!lua flags=no-writes,allow-oom
-- Read what the tap of a partition tells, and how much it ever told, at one instant.
-- KEYS 1 tapped   ARGV 1 entry to read after  2 at most
-- Returns {entries, entries ever added, entries there}.
local info = redis.pcall('XINFO', 'STREAM', KEYS[1])
if info.err then
  if string.find(info.err, 'no such key', 1, true) then return {{}, 0, 0} end
  return info
end
local s = {}
for i = 1, #info, 2 do s[info[i]] = info[i + 1] end
return {redis.call('XRANGE', KEYS[1], '(' .. ARGV[1], '+', 'COUNT', ARGV[2]), s['entries-added'], s.length}
