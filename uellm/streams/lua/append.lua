-- Everything one engine step of a replica has to say, at once.
-- ARGV: replica, epoch, ReplicaReport or '', lease in ms, retention in s, number of leases to
--   renew, their ids, then operations of six arguments each:
--     'start',  id, generation, 0,            '',       ''
--     'tokens', id, generation, offset,       Tokens,   number of tokens
--     'finish', id, generation, state,        Finished, CompletionEvent
-- Returns {'stale'} (the epoch is no longer routed) or {'ok', ids that this holder has lost}.
local replica, epoch, report, lease, retention = ARGV[1], ARGV[2], ARGV[3], tonumber(ARGV[4]),
  ARGV[5]
if not routed(replica, epoch) then
  return { 'stale' }
end
local now = now_ms()
if report ~= '' then
  redis.call('HSET', P .. 'replica:' .. replica, 'report', report, 'reported_ms', now)
end
local renewals = tonumber(ARGV[6])
for i = 7, 6 + renewals do
  redis.call('ZADD', P .. 'leases', 'XX', now + lease, ARGV[i])
end
local lost, is_lost = {}, {}
local function lose(id)
  if not is_lost[id] then
    is_lost[id] = true
    lost[#lost + 1] = id
  end
end
for i = 7 + renewals, #ARGV, 6 do
  local op, id, generation = ARGV[i], ARGV[i + 1], ARGV[i + 2]
  local r = read_standing(id)
  if not r or r.generation ~= generation or TERMINAL[r.state] or is_lost[id] then
    lose(id)
  elseif op == 'start' then
    redis.call('HSET', record_key(id), 'state', 'RUNNING')
  elseif op == 'tokens' then
    local offset, tokens, count = ARGV[i + 3], ARGV[i + 4], tonumber(ARGV[i + 5])
    if r.tokens ~= offset then
      lose(id)
    else
      local after = tonumber(offset) + count
      -- The entry's id is the offset behind it: Redis itself refuses to log a token twice.
      redis.call('XADD', P .. 'log:' .. id, after .. '-0', 'payload',
        field_varint(1, tonumber(generation)) .. field_bytes(2, tokens))
      redis.call('HSET', record_key(id), 'state', 'RUNNING', 'tokens', after)
      redis.call('HSETNX', record_key(id), 'first_token_ms', now)
      push_event(r.subs, id, tonumber(generation), TOKENS, tokens)
    end
  elseif op == 'finish' then
    finish(id, r, ARGV[i + 3], ARGV[i + 4], ARGV[i + 5], retention)
  end
end
flush_frames()
return { 'ok', lost }
