-- Everything one engine step of a replica has to say, at once.
-- ARGV: replica, epoch, ReplicaReport or '', lease in ms, retention in s, number of leases to
--   renew, their ids, then operations of six arguments each:
--     'start',  id, generation, 0,            '',       ''
--     'tokens', id, generation, offset,       Tokens,   number of tokens
--     'finish', id, generation, state,        Finished, CompletionEvent
-- Returns {'stale'} (the epoch is no longer routed) or {'ok', ids that this holder has lost}.
-- May be repeated as it was: what the first call did is found and is not done, or lost, again.
local replica, epoch, report, lease, retention = ARGV[1], ARGV[2], ARGV[3], tonumber(ARGV[4]),
  ARGV[5]
if not routed(replica, epoch) then
  return { 'stale' }
end
local now = now_ms()
if report ~= '' then
  redis.call('HSET', P .. 'replica:' .. replica, 'report', report, 'reported_ms', now)
end

local lost, noticed, differs = {}, {}, {}
local function lose(id)
  if lost[id] == nil then
    noticed[#noticed + 1] = id
  end
  lost[id] = true
end

local renewals = tonumber(ARGV[6])
for i = 7, 6 + renewals do
  local id = ARGV[i]
  local held = redis.call('HMGET', record_key(id), 'state', 'replica', 'epoch')
  if HELD[held[1]] and held[2] == replica and held[3] == epoch then
    redis.call('ZADD', P .. 'leases', 'XX', now + lease, id)
  else
    lose(id)
  end
end

-- A LogChunk, and the id of its entry: the offset behind it. So Redis itself refuses to log a
-- token twice.
local function log_entry(generation, offset, tokens, count)
  return field_varint(1, tonumber(generation)) .. field_bytes(2, tokens),
    (tonumber(offset) + tonumber(count)) .. '-0'
end

local function is_logged(id, chunk, entry_id)
  local there = redis.call('XRANGE', P .. 'log:' .. id, entry_id, entry_id)[1]
  return there ~= nil and there[2][2] == chunk
end

-- Appends to a request's log; false if other tokens stand there.
local function log_tokens(id, r, generation, offset, tokens, count)
  local chunk, entry_id = log_entry(generation, offset, tokens, count)
  if r.tokens ~= offset then
    return is_logged(id, chunk, entry_id)
  end
  redis.call('XADD', P .. 'log:' .. id, entry_id, 'payload', chunk)
  redis.call('HSET', record_key(id), 'tokens', tonumber(offset) + tonumber(count))
  if r.state ~= 'RUNNING' then
    redis.call('HSET', record_key(id), 'state', 'RUNNING')
  end
  if offset == '0' then
    redis.call('HSET', record_key(id), 'first_token_ms', now)
  end
  push_event(r.subs, id, tonumber(generation), TOKENS, tokens)
  return true
end

for i = 7 + renewals, #ARGV, 6 do
  local op, id, generation = ARGV[i], ARGV[i + 1], ARGV[i + 2]
  local r
  if op == 'finish' then
    r = read_standing(id)
  else
    -- The call that is made most: no more is read than it needs.
    r = record(id, 'state', 'generation', 'tokens', 'subs')
  end
  if lost[id] or not r or r.generation ~= generation or not HELD[r.state] then
    lose(id)
    if op == 'tokens' and not differs[id] then
      differs[id] = not is_logged(id, log_entry(generation, ARGV[i + 3], ARGV[i + 4], ARGV[i + 5]))
    elseif op == 'finish' and not differs[id] and ended_as(r, generation, ARGV[i + 3]) then
      -- All of it was said before, the end included.
      lost[id] = false
    end
  elseif op == 'start' then
    redis.call('HSET', record_key(id), 'state', 'RUNNING')
  elseif op == 'finish' then
    finish(id, r, ARGV[i + 3], ARGV[i + 4], ARGV[i + 5], retention)
  elseif not log_tokens(id, r, generation, ARGV[i + 3], ARGV[i + 4], ARGV[i + 5]) then
    lose(id)
  end
end
flush_frames()

local still_lost = {}
for _, id in ipairs(noticed) do
  if lost[id] then
    still_lost[#still_lost + 1] = id
  end
end
return { 'ok', still_lost }
