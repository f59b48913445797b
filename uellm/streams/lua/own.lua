-- Takes or renews the lease of a model's scheduler.
-- ARGV: scheduler, lease in ms (0: let it go)
-- Returns {token or 0, holder}. The token rises with every change of holder; it starts from the
-- time, so that a token from before Redis lost its data is never given out again.
local me, lease = ARGV[1], tonumber(ARGV[2])
local key = P .. 'owner'
local now = now_ms()
local held = redis.call('HMGET', key, 'holder', 'token', 'until')
local holder, token, expires = held[1] or '', tonumber(held[2] or 0), tonumber(held[3] or 0)
if lease == 0 then
  if holder == me then
    redis.call('HSET', key, 'holder', '', 'until', 0)
  end
  return { 0, '' }
end
-- A lease further ahead than it can have been set: the clock went back.
if holder ~= me and expires > now and expires <= now + 2 * lease then
  return { 0, holder }
end
if holder ~= me then
  token = math.max(token + 1, now)
  -- A short number of the same change, for people: names of batches begin with it.
  redis.call('HINCRBY', key, 'term', 1)
end
redis.call('HSET', key, 'holder', me, 'token', token, 'until', now + lease)
return { token, me }
