"""What a Valkey or Redis server does for the shared tier, in its own language: all of a script, or nothing of it.

A namespace is in parts, each with its books: in which order its values were used (a sorted set of keys), and how large
each is (a hash, with their sum and a count of uses, by names that no key has). The names of all that belongs to a part
have the same tag in braces, so that a cluster has them on one node.
"""

import hashlib
from typing import Any, NamedTuple

from redis.exceptions import NoScriptError


class Part(NamedTuple):
    """A part of a namespace, by the beginning of the names of all that belongs to it."""

    prefix: bytes

    @property
    def books(self) -> tuple[bytes, bytes]:
        """The order of use, and the sizes."""
        return self.prefix + b"order", self.prefix + b"sizes"


class Script:
    """Runs on the server that has a part."""

    def __init__(self, body: str):
        self._source = COMMON + body
        self._sha = hashlib.sha1(self._source.encode()).hexdigest()

    def __call__(self, client: Any, part: Part, *values: bytes | int) -> Any:
        """The answer; sends the script itself only to a server that doesn't know it yet."""
        arguments = 2, *part.books, part.prefix, *values
        try:
            return client.evalsha(self._sha, *arguments)
        except NoScriptError:
            return client.eval(self._source, *arguments)


COMMON = """
local order, sizes = KEYS[1], KEYS[2]
local prefix, key = ARGV[1], ARGV[2]

local function use(key, ttl)
    local uses = redis.call('HINCRBY', sizes, 'uses', 1)
    if uses == 1 then
        redis.call('UNLINK', order)  -- that of other sizes, which the server has evicted
    end
    redis.call('ZADD', order, uses, key)
    if redis.call('HEXISTS', sizes, key) == 0 then
        local size = redis.call('STRLEN', prefix .. key)
        redis.call('HSET', sizes, key, size)
        redis.call('HINCRBY', sizes, 'sum', size)
    end
    for _, name in ipairs({prefix .. key, order, sizes}) do
        redis.call('PEXPIRE', name, ttl)
    end
end

local function remove(key)
    redis.call('UNLINK', prefix .. key)
    redis.call('ZREM', order, key)
    local size = redis.call('HGET', sizes, key)
    if size then
        redis.call('HINCRBY', sizes, 'sum', -size)
        redis.call('HDEL', sizes, key)
    end
end
"""

GET = Script("""
local value = redis.call('GET', prefix .. key)
if value then
    pcall(use, key, ARGV[3]) -- a server without room gives what it has, and refuses to note that
else
    remove(key)
end
return value
""")
"""Arguments: key, milliseconds to live. The value, which has then been used; None if it isn't there."""

USE = Script("""
if redis.call('EXISTS', prefix .. key) == 1 then
    use(key, ARGV[3])
    return 1
end
return 0
""")
"""Arguments: key, milliseconds to live. Whether the value is there, without sending it."""

PUT = Script("""
local ttl, value, limit = ARGV[3], ARGV[4], tonumber(ARGV[5])
redis.call('SET', prefix .. key, value)  -- first: where there is no room it is refused, and nothing has changed
use(key, ttl)
local evicted = 0
while tonumber(redis.call('HGET', sizes, 'sum')) > limit do
    local oldest = redis.call('ZRANGE', order, 0, 0)[1]
    if oldest == key then  -- the server has evicted the order of what is in the sum
        redis.call('UNLINK', sizes)
        use(key, ttl)
        break
    end
    remove(oldest)
    evicted = evicted + 1
end
return evicted
""")
"""Arguments: key, milliseconds to live, value, the part's bytes at most. How many values made room for it."""

REMOVE = Script("""
remove(key)
""")
"""Argument: key."""

DROP = Script("""
for _, key in ipairs(redis.call('ZRANGE', order, 0, -1)) do
    redis.call('UNLINK', prefix .. key)
end
redis.call('UNLINK', order, sizes)
return 1
""")
"""All of the part goes. 1, when it has."""
