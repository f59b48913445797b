-- Registers a service, or renews its registration.
-- KEYS[1]: the hash of its role. ARGV: service id, facts as JSON, lease in seconds
redis.call('ZADD', P .. ':leases', now_ms() / 1000 + tonumber(ARGV[3]), ARGV[1])
redis.call('HSET', P, ARGV[1], ARGV[2])
return 1
