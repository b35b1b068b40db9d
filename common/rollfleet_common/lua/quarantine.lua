-- Move an entry that nobody can read off a stream, keeping its bytes among the dead letters.
-- Such an entry came from no script of ours, so it is counted apart from the conservation law; of
-- its fields the first 1,000 are kept (unpack has a limit).
-- KEYS 1 stream  2 dead  3 ledger   ARGV 1 consumer group  2 entry  3 why
-- Returns 1, or 0 if it is gone.
local found = redis.call('XRANGE', KEYS[1], ARGV[2], ARGV[2])
if #found == 1 then
  redis.call('XADD', KEYS[2], '*', 'why', 'garbage', 'e', ARGV[3], 'from', KEYS[1], unpack(found[1][2], 1, math.min(#found[1][2], 2000)))
  redis.call('HINCRBY', KEYS[3], 'garbage', 1)
end
redis.call('XACK', KEYS[1], ARGV[1], ARGV[2])
redis.call('XDEL', KEYS[1], ARGV[2])
return #found
