-- Takes over requests that another scheduler read and did not dispatch. To be called now and
-- then, not only once: a predecessor that was blocked in a read may still be given entries.
-- ARGV: owner token, consumer, most entries
-- Returns {'stale'} or {'ok', entries as XCLAIM gives them}.
if not owns(ARGV[1]) then
  return { 'stale' }
end
local stream, me, most = P .. 'requests', ARGV[2], tonumber(ARGV[3])
local taken = {}
for _, consumer in ipairs(consumers_of(stream, 'scheduler')) do
  if consumer.name ~= me then
    if consumer.pending == 0 then
      redis.call('XGROUP', 'DELCONSUMER', stream, 'scheduler', consumer.name)
    elseif #taken < most then
      local ids = {}
      -- At most as many as Lua can pass to one call.
      for _, pending in ipairs(redis.call('XPENDING', stream, 'scheduler', '-', '+',
        math.min(most - #taken, 1000), consumer.name)) do
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
