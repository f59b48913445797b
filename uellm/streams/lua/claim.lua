-- Takes over requests that another scheduler read and did not dispatch.
-- ARGV: owner token, consumer, most entries
-- Returns {'stale'} or {'ok', entries as XCLAIM gives them}.
if not owns(ARGV[1]) then
  return { 'stale' }
end
local stream, me, most = P .. 'requests', ARGV[2], tonumber(ARGV[3])
local taken = {}
for _, info in ipairs(redis.call('XINFO', 'CONSUMERS', stream, 'scheduler')) do
  local consumer = {}
  for i = 1, #info, 2 do
    consumer[info[i]] = info[i + 1]
  end
  if consumer.name ~= me then
    if consumer.pending == 0 then
      redis.call('XGROUP', 'DELCONSUMER', stream, 'scheduler', consumer.name)
    elseif #taken < most then
      local ids = {}
      for _, pending in ipairs(redis.call('XPENDING', stream, 'scheduler', '-', '+',
        most - #taken, consumer.name)) do
        ids[#ids + 1] = pending[1]
      end
      if #ids > 0 then
        for _, entry in ipairs(redis.call('XCLAIM', stream, 'scheduler', me, 0, unpack(ids))) do
          taken[#taken + 1] = entry
        end
      end
    end
  end
end
return { 'ok', taken }
