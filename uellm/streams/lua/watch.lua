-- Subscribes a gateway to a request's events, or takes it off.
-- ARGV: id, tenant, gateway, 1 to subscribe or 0 to leave
-- Returns {state, tokens logged} or {'unknown'}.
local id, gateway = ARGV[1], ARGV[3]
local r = record(id, 'state', 'tokens', 'tenant', 'subs')
if not r.state or r.tenant ~= ARGV[2] then
  return { 'unknown', 0 }
end
if not TERMINAL[r.state] then
  local subs = {}
  for sub in string.gmatch(r.subs or '', '[^,]+') do
    if sub ~= gateway then
      subs[#subs + 1] = sub
    end
  end
  if ARGV[4] == '1' then
    subs[#subs + 1] = gateway
  end
  redis.call('HSET', record_key(id), 'subs', table.concat(subs, ','))
end
return { r.state, tonumber(r.tokens) }
