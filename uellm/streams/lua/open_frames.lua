-- Keeps a gateway's frame stream for a while. Without one, no frames are written.
-- ARGV: gateway, seconds to keep it
local key = P .. 'frames:' .. ARGV[1]
if redis.call('EXISTS', key) == 0 then
  redis.call('XADD', key, '*', 'payload', '')
end
redis.call('EXPIRE', key, ARGV[2])
return 1
