-- Makes a request durable, once per idempotency key.
-- ARGV: id, tenant, scope, adapter, idempotency key or '', content hash, gateway to subscribe or
--   '', cost in tokens, most waiting requests, most waiting tokens, most unfinished requests of
--   a tenant, seconds to keep the key, RequestPayload, RequestEntry, traceparent
-- Returns {status, id, accepted_ms}; status: ok, existing, mismatch, depth, tokens, tenant.
local id, tenant, scope, adapter, idem, hash, gateway = ARGV[1], ARGV[2], ARGV[3], ARGV[4],
  ARGV[5], ARGV[6], ARGV[7]
local cost, max_depth, max_tokens, max_tenant = tonumber(ARGV[8]), tonumber(ARGV[9]),
  tonumber(ARGV[10]), tonumber(ARGV[11])
local now = now_ms()
local idem_key = P .. 'idem:' .. tenant .. ':' .. idem

if idem ~= '' then
  local known = redis.call('HMGET', idem_key, 'id', 'hash')
  if known[1] then
    if known[2] ~= hash then
      return { 'mismatch', known[1], now }
    end
    local accepted = redis.call('HGET', record_key(known[1]), 'accepted_ms')
    if accepted then
      return { 'existing', known[1], tonumber(accepted) }
    end
    -- The request itself is past its retention: the key names nothing any more.
  end
end
if redis.call('EXISTS', record_key(id)) == 1 then
  -- The same call again, after its reply was lost.
  return { 'ok', id, tonumber(redis.call('HGET', record_key(id), 'accepted_ms')) }
end
if redis.call('XLEN', P .. 'requests') >= max_depth then
  return { 'depth', id, now }
end
if tonumber(redis.call('HGET', P .. 'load', 'queued_tokens') or 0) + cost > max_tokens then
  return { 'tokens', id, now }
end
if tonumber(redis.call('HGET', P .. 'tenants', tenant) or 0) >= max_tenant then
  return { 'tenant', id, now }
end

local entry_id = redis.call('XADD', P .. 'requests', '*', 'type', 'request', 'id', id,
  'payload', ARGV[14], 'generation', 0, 'offset', 0, 'accepted_ms', now, 'attempts', 0,
  'strikes', 0)
redis.call('HSET', record_key(id), 'state', 'QUEUED', 'generation', 0, 'tokens', 0,
  'attempts', 0, 'strikes', 0, 'progress', 0, 'tenant', tenant, 'scope', scope,
  'adapter', adapter, 'accepted_ms', now, 'queue_entry', entry_id, 'batch_entry', '',
  'replica', '', 'epoch', 0, 'cost', cost, 'subs', gateway, 'payload', ARGV[13],
  'entry', ARGV[14], 'traceparent', ARGV[15])
redis.call('HINCRBY', P .. 'load', 'queued_tokens', cost)
redis.call('HINCRBY', P .. 'tenants', tenant, 1)
if idem ~= '' then
  redis.call('DEL', idem_key)
  redis.call('HSET', idem_key, 'id', id, 'hash', hash)
  redis.call('EXPIRE', idem_key, ARGV[12])
end
return { 'ok', id, now }
