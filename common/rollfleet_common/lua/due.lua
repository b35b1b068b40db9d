#!lua flags=no-writes,allow-oom
-- Name the delayed prompts whose time has come: `promote` is given them, with their groups' records.
-- KEYS 1 delayed   ARGV 1 at most
-- Returns {ms until the next is due (-1: none waits, 0: some are due), members...}.
local now = redis.call('TIME')
local ms = now[1] * 1000 + math.floor(now[2] / 1000)
local due = redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', ms, 'LIMIT', 0, ARGV[1])
local first = redis.call('ZRANGE', KEYS[1], 0, 0, 'WITHSCORES')
local wait = #first == 0 and -1 or math.max(0, math.floor(math.min((tonumber(first[2]) or ms) - ms, 86400000)))
table.insert(due, 1, wait)  -- not unpack, which has a limit
return due
