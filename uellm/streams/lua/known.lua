-- Whether a request was accepted under an idempotency key, and how wide the door is.
-- ARGV: tenant, idempotency key
-- Returns {1 or 0, door}; see the key `door`.
return { redis.call('EXISTS', idempotency_key(ARGV[1], ARGV[2])),
  redis.call('GET', P .. 'door') or '' }
