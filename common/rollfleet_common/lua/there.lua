#!lua flags=no-writes,allow-oom
-- Whether entries are on a stream, or fields in a hash, without sending what they hold.
-- KEYS 1 key   ARGV 1 'stream' or 'hash'  2.. entries or fields
-- Returns 1 or 0 for each; an entry that is no id is not there.
local out = {}
for i = 2, #ARGV do
  if ARGV[1] == 'hash' then
    out[i - 1] = redis.call('HMGET', KEYS[1], ARGV[i])[1] and 1 or 0
  else
    local found = redis.pcall('XRANGE', KEYS[1], ARGV[i], ARGV[i])
    out[i - 1] = found.err and 0 or #found
  end
end
return out
