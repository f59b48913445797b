-- Shared by all scripts; see docs/queues.md for keys, states and invariants.
-- KEYS[1] is the prefix `uellm:{model}:`. All keys carry its tag, so all live in one slot.
local P = KEYS[1]

local TERMINAL = { DONE = true, FAILED = true, CANCELLED = true, EXPIRED = true, DEAD = true }
local HELD = { LEASED = true, RUNNING = true }

local function now_ms()
  local t = redis.call('TIME')
  return tonumber(t[1]) * 1000 + math.floor(tonumber(t[2]) / 1000)
end

-- Protobuf wire format, as much of it as events need.
local function varint(n)
  local out = {}
  while n >= 128 do
    out[#out + 1] = string.char(128 + n % 128)
    n = math.floor(n / 128)
  end
  out[#out + 1] = string.char(n)
  return table.concat(out)
end

local function field_varint(number, n)
  return string.char(number * 8) .. varint(n)
end

local function field_bytes(number, s)
  return string.char(number * 8 + 2) .. varint(#s) .. s
end

-- The field of FrameEntry (and of LogChunk, for tokens) that each kind of event goes into.
local TOKENS, PROMISE, FINISHED = 3, 4, 5

local function record_key(id)
  return P .. 'request:' .. id
end

-- Tenants' names may hold the separator; two tenants never share a key.
local function idempotency_key(tenant, key)
  local escaped = string.gsub(tenant, '[%%:]', function(c)
    return string.format('%%%02X', string.byte(c))
  end)
  return P .. 'idem:' .. escaped .. ':' .. key
end

-- Reads fields of a record into a table; absent ones are nil.
local function record(id, ...)
  local names = { ... }
  local values = redis.call('HMGET', record_key(id), unpack(names))
  local r = {}
  for i, name in ipairs(names) do
    r[name] = values[i] or nil
  end
  return r
end

-- Collects events per subscribed gateway; flush_frames sends one frame to each.
local frames = {}

local function push_event(subs, id, generation, kind, payload)
  if not subs or subs == '' then
    return
  end
  local entry = field_bytes(1, id) .. field_varint(2, generation) .. field_bytes(kind, payload)
  local framed = field_bytes(1, entry)
  for gateway in string.gmatch(subs, '[^,]+') do
    local frame = frames[gateway]
    if not frame then
      frame = {}
      frames[gateway] = frame
    end
    frame[#frame + 1] = framed
  end
end

-- The stream is a wake-up: trimmed, and gone with its gateway (hence NOMKSTREAM). Gaps are
-- filled from the log.
local function flush_frames()
  for gateway, frame in pairs(frames) do
    redis.call('XADD', P .. 'frames:' .. gateway, 'NOMKSTREAM', 'MAXLEN', '~', '1000', '*',
      'payload', table.concat(frame))
  end
end

local function leave_queue(r)
  if r.queue_entry and r.queue_entry ~= '' then
    redis.call('XACK', P .. 'requests', 'scheduler', r.queue_entry)
    redis.call('XDEL', P .. 'requests', r.queue_entry)
  end
end

local function leave_batch(r)
  if r.batch_entry and r.batch_entry ~= '' then
    redis.call('XACK', P .. 'batches:' .. r.replica, 'leader', r.batch_entry)
    redis.call('XDEL', P .. 'batches:' .. r.replica, r.batch_entry)
  end
end

-- What finish and requeue need of a record.
local STANDING = { 'state', 'generation', 'tokens', 'tenant', 'queue_entry', 'batch_entry',
  'replica', 'epoch', 'subs', 'cost', 'strikes', 'progress', 'idem' }

-- The one way to a terminal state. Acknowledges first: that succeeds whatever else fails.
-- `finished` is a serialised Finished, `completion` a serialised CompletionEvent or '' of an end that
-- nobody is to learn of; the token
-- count is added to both here, where it is known exactly, and to the latter when it began and ended.
local function finish(id, r, state, finished, completion, retention_seconds)
  leave_batch(r)
  leave_queue(r)
  redis.call('ZREM', P .. 'leases', id)
  local tokens = tonumber(r.tokens)
  finished = finished .. field_bytes(2, field_varint(2, tokens))
  local key = record_key(id)
  local ended_ms = now_ms()
  local first_ms = tonumber(redis.call('HGET', key, 'first_token_ms')) or 0
  redis.call('HSET', key, 'state', state, 'finished', finished, 'finished_ms', ended_ms,
    'queue_entry', '', 'batch_entry', '', 'generation', tonumber(r.generation) + 1)
  redis.call('HDEL', key, 'payload')
  redis.call('EXPIRE', key, retention_seconds)
  redis.call('EXPIRE', P .. 'log:' .. id, retention_seconds)
  if r.idem and r.idem ~= '' then
    redis.call('EXPIRE', idempotency_key(r.tenant, r.idem), retention_seconds)
  end
  if r.state == 'QUEUED' then
    redis.call('HINCRBY', P .. 'load', 'queued_tokens', -tonumber(r.cost))
  end
  if redis.call('HINCRBY', P .. 'tenants', r.tenant, -1) <= 0 then
    redis.call('HDEL', P .. 'tenants', r.tenant)
  end
  push_event(r.subs, id, 0, FINISHED, finished)
  if completion ~= '' then
    redis.call('XADD', P .. 'completions', 'MAXLEN', '~', '20000', '*',
      'payload', completion .. field_varint(6, tokens) .. field_varint(13, first_ms)
        .. field_varint(14, ended_ms))
  end
end

-- True if the holder of `generation` itself ended it so: a call that is repeated, not lost.
local function ended_as(r, generation, state)
  return r ~= nil and r.state == state and tonumber(r.generation) == tonumber(generation) + 1
    and TERMINAL[state] == true
end

-- Back to the scheduler's queue, fenced against the holder it had. New tokens clear its strikes, and
-- how many starts in a row were of no use.
local function requeue(id, r)
  leave_batch(r)
  local progressed = tonumber(r.tokens) > tonumber(r.progress)
  local strikes = progressed and 0 or r.strikes
  redis.call('ZREM', P .. 'leases', id)
  local key = record_key(id)
  local generation = tonumber(r.generation) + 1
  local kept = redis.call('HMGET', key, 'entry', 'accepted_ms', 'attempts', 'fruitless')
  local fruitless = progressed and 0 or tonumber(kept[4] or 0) + 1
  local entry_id = redis.call('XADD', P .. 'requests', '*', 'type', 'request', 'id', id,
    'payload', kept[1], 'generation', generation, 'offset', r.tokens, 'accepted_ms', kept[2],
    'attempts', kept[3], 'strikes', strikes, 'fruitless', fruitless)
  redis.call('HSET', key, 'state', 'QUEUED', 'generation', generation, 'queue_entry', entry_id,
    'batch_entry', '', 'replica', '', 'epoch', 0, 'strikes', strikes, 'fruitless', fruitless)
  redis.call('HINCRBY', P .. 'load', 'queued_tokens', tonumber(r.cost))
end

local function read_standing(id)
  local r = record(id, unpack(STANDING))
  if not r.state then
    return nil
  end
  return r
end

-- The consumers of a group with what they have pending; none if there is no such group.
local function consumers_of(stream, group)
  local found = redis.pcall('XINFO', 'CONSUMERS', stream, group)
  local consumers = {}
  if not found.err then
    for _, info in ipairs(found) do
      local consumer = {}
      for i = 1, #info, 2 do
        consumer[info[i]] = info[i + 1]
      end
      consumers[#consumers + 1] = consumer
    end
  end
  return consumers
end

-- True if `token` is the present owner's. A scheduler that lost its lease can change nothing.
local function owns(token)
  return redis.call('HGET', P .. 'owner', 'token') == token
end

-- True if `epoch` is the one the replica is routed to.
local function routed(replica, epoch)
  return redis.call('HGET', P .. 'replica:' .. replica, 'epoch') == epoch
end
