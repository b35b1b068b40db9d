#!lua flags=allow-oom
-- Let go of the run, so that the next trainer need not wait for the lease.
-- KEYS 1 trainer   ARGV 1 token
if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call('DEL', KEYS[1]) end
return 0
