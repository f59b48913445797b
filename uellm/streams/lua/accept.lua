-- Makes a request durable, once per idempotency key.
-- ARGV: id, tenant, scope, adapter, idempotency key or '', content hash, gateway to subscribe or
--   '', cost in tokens, most waiting requests, most waiting tokens, most unfinished requests of
--   a tenant, RequestPayload, RequestEntry, traceparent
-- Returns {status, id, accepted_ms, door}; status: ok, existing, mismatch, depth, tokens, tenant;
--   door: see the key of that name, or ''.
local id, tenant, scope, adapter, idem, hash, gateway = ARGV[1], ARGV[2], ARGV[3], ARGV[4],
  ARGV[5], ARGV[6], ARGV[7]
local cost, max_depth, max_tokens, max_tenant = tonumber(ARGV[8]), tonumber(ARGV[9]),
  tonumber(ARGV[10]), tonumber(ARGV[11])
local now = now_ms()
local door = redis.call('GET', P .. 'door') or ''

local function accepted_ms(request)
  return tonumber(redis.call('HGET', record_key(request), 'accepted_ms') or nil)
end

local before = accepted_ms(id)
if before then
  -- The same call again, after its reply was lost.
  return { 'ok', id, before, door }
end
local idem_key = ''
if idem ~= '' then
  idem_key = idempotency_key(tenant, idem)
  local known = redis.call('HMGET', idem_key, 'id', 'hash')
  before = known[1] and accepted_ms(known[1])
  -- Without a record the request is past its retention: the key names nothing any more.
  if before and known[2] ~= hash then
    return { 'mismatch', known[1], now, door }
  elseif before then
    return { 'existing', known[1], before, door }
  end
end
if redis.call('XLEN', P .. 'requests') >= max_depth then
  return { 'depth', id, now, door }
end
if tonumber(redis.call('HGET', P .. 'load', 'queued_tokens') or 0) + cost > max_tokens then
  return { 'tokens', id, now, door }
end
if tonumber(redis.call('HGET', P .. 'tenants', tenant) or 0) >= max_tenant then
  return { 'tenant', id, now, door }
end

local entry_id = redis.call('XADD', P .. 'requests', '*', 'type', 'request', 'id', id,
  'payload', ARGV[13], 'generation', 0, 'offset', 0, 'accepted_ms', now, 'attempts', 0,
  'strikes', 0)
redis.call('HSET', record_key(id), 'state', 'QUEUED', 'generation', 0, 'tokens', 0,
  'attempts', 0, 'strikes', 0, 'progress', 0, 'tenant', tenant, 'scope', scope,
  'adapter', adapter, 'accepted_ms', now, 'queue_entry', entry_id, 'batch_entry', '',
  'replica', '', 'epoch', 0, 'cost', cost, 'subs', gateway, 'payload', ARGV[12],
  'entry', ARGV[13], 'traceparent', ARGV[14], 'idem', idem)
redis.call('HINCRBY', P .. 'load', 'queued_tokens', cost)
redis.call('HINCRBY', P .. 'tenants', tenant, 1)
if idem ~= '' then
  -- Kept as long as the record: finishing gives both the same time to live.
  redis.call('DEL', idem_key)
  redis.call('HSET', idem_key, 'id', id, 'hash', hash)
end
return { 'ok', id, now, door }
