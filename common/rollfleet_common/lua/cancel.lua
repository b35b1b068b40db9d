#!lua flags=allow-oom
-- Settle what is left of a group before any of it was delivered: waiting, delayed or in flight.
-- Workers learn it at their next renewal, because the lease is no longer theirs.
-- KEYS 1 fence  2 ledger  3 tombstones  4 group  5 prompts  6 delayed  7 parked
-- ARGV 1 token  2 group  3 reason  4 task  5 position  6 at most (members to settle)
-- Returns how many members were settled, or -2 if the token is superseded.
local function number(raw, otherwise)
  if not raw then return otherwise end
  return #raw <= 16 and string.find(raw, '^%-?%d+$') and tonumber(raw) or nil
end
if redis.call('HGET', KEYS[1], 'token') ~= ARGV[1] then return -2 end
-- A record that somebody else wrote may claim anything: the loop is bounded.
local n = math.min(number(redis.call('HGET', KEYS[4], 'n'), 0) or 0, 100000)
local kind = redis.call('HGET', KEYS[4], 'kind')
if kind ~= 'train' and kind ~= 'eval' then return 0 end
local most = tonumber(ARGV[6])
local settled = 0
for i = n - 1, 0, -1 do
  if settled >= most then break end
  local where = redis.call('HGET', KEYS[4], i) or 'x'
  local state = string.sub(where, 1, 1)
  local gone = 0
  if state == 'p' then
    local entry = string.sub(where, 2)
    redis.pcall('XACK', KEYS[5], 'workers', entry)
    gone = redis.pcall('XDEL', KEYS[5], entry)
  elseif state == 'd' then
    local member = ARGV[2] .. ':' .. i
    redis.call('ZREM', KEYS[6], member)
    gone = redis.call('HDEL', KEYS[7], member)
  end
  if gone == 1 then
    redis.call('XADD', KEYS[3], '*', 'g', ARGV[2], 'i', i, 'n', n, 'k', kind, 't', ARGV[4], 'p', ARGV[5],
      'r', ARGV[3], 'e', 'cancelled by the trainer')
    redis.call('HSET', KEYS[4], i, 'x')
    redis.call('HINCRBY', KEYS[2], 'dropped:' .. ARGV[3], 1)
    redis.call('HINCRBY', KEYS[2], 'settled:' .. kind, 1)
    settled = settled + 1
  end
end
return settled
