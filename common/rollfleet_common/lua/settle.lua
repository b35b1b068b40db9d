#!lua flags=allow-oom
-- The trainer's verdicts on rollouts. Every step is idempotent: what was settled is skipped. What somebody
-- else deleted, or took from our pending list, is settled while its group's record names it: a group is
-- settled with its record, not before it.
-- KEYS 1 fence  2 ledger  3 rollouts  4 tombstones  5 trained  6 tap  7 tapped; per rollout: payload;
--      per group: group
-- ARGV 1 token  2 verb: train | commit[:<what of the batch>] | drop:<reason>  3 number of rollouts r
--      4 number of groups g  5 number of tombstones t, then r entries, r kinds, t tombstone entries
--      (KEYS 8 .. 7+r are the payloads, KEYS 8+r .. 7+r+g the records of their groups, which all but
--      `train` closes)
-- Returns how many rollouts changed state, or -2 if the token is superseded.
-- train:  trained on; the credit returns, the entry stays until commit.
-- commit: durable; entry, payload and group are freed.
-- drop:   freed, counted by reason; the credit returns if it had not.
-- While somebody records (the tap holds how long in ms), what is freed is told on `tapped`, and its
-- payload stays for that long.
local function number(raw, otherwise)
  if not raw then return otherwise end
  return #raw <= 16 and string.find(raw, '^%-?%d+$') and tonumber(raw) or nil
end
if redis.call('HGET', KEYS[1], 'token') ~= ARGV[1] then return -2 end
local verb, r, g, t = ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[4]), tonumber(ARGV[5])
local closing = string.sub(verb, 1, 6) == 'commit'
local tap = verb ~= 'train' and number(redis.call('GET', KEYS[6]))
tap = tap and tap > 0 and tap <= 86400000 and tap
local function free(entry, payload)
  local found = tap and redis.call('XRANGE', KEYS[3], entry, entry)[1]
  if found then
    for i = 1, #found[2], 2 do
      if found[2][i] == 'h' then
        -- A recording that cannot be added to does not stop the run.
        redis.pcall('XADD', KEYS[7], 'MAXLEN', '50000', '*', 'v', verb, 'h', found[2][i + 1])
      end
    end
    redis.call('PEXPIRE', KEYS[7], tap)
    redis.call('PEXPIRE', payload, tap)
  else
    redis.call('UNLINK', payload)
  end
  redis.call('XDEL', KEYS[3], entry)
end
local function numbers(id)
  local ms, seq = string.match(id, '^(%d+)-(%d+)$')
  return tonumber(ms), tonumber(seq)
end
-- Whether it is on the stream, and was read; or was there, and its group is not closed.
local named, last_ms, last_seq
local function owed(entry)
  if #redis.call('XRANGE', KEYS[3], entry, entry) == 1 then
    if not last_ms then
      last_ms, last_seq = 0, 0
      for _, row in ipairs(redis.call('XINFO', 'GROUPS', KEYS[3])) do
        local group = {}
        for i = 1, #row, 2 do group[row[i]] = row[i + 1] end
        if group.name == 'trainer' then last_ms, last_seq = numbers(group['last-delivered-id']) end
      end
    end
    local ms, seq = numbers(entry)
    return ms < last_ms or ms == last_ms and seq <= last_seq
  end
  if not named then
    named = {}
    for i = 8 + r, 7 + r + g do
      for _, place in ipairs(redis.call('HVALS', KEYS[i])) do named[place] = true end
    end
  end
  return named['r' .. entry]
end
local function pending(entry)
  local held = redis.pcall('XPENDING', KEYS[3], 'trainer', entry, entry, 1)
  return not held.err and #held == 1
end
local changed = 0
for i = 1, r do
  local entry, kind = ARGV[5 + i], ARGV[5 + r + i]
  if verb == 'train' then
    if (pending(entry) or owed(entry)) and redis.call('SADD', KEYS[5], entry) == 1 then
      redis.call('HINCRBY', KEYS[2], 'settled:' .. kind, 1)
      changed = changed + 1
    end
  else
    local trained = redis.call('SREM', KEYS[5], entry) == 1
    if redis.call('XACK', KEYS[3], 'trainer', entry) == 1 or trained or owed(entry) then
      free(entry, KEYS[7 + i])
      if not trained then redis.call('HINCRBY', KEYS[2], 'settled:' .. kind, 1) end
      redis.call('HINCRBY', KEYS[2], closing and 'committed' or 'dropped:' .. string.sub(verb, 6), 1)
      changed = changed + 1
    end
  end
end
if verb == 'train' then return changed end
for i = 8 + r, 7 + r + g do redis.call('UNLINK', KEYS[i]) end
for i = 6 + 2 * r, 5 + 2 * r + t do
  redis.call('XACK', KEYS[4], 'trainer', ARGV[i])
  redis.call('XDEL', KEYS[4], ARGV[i])
end
return changed
