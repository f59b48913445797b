"""Addresses of services, ``host:port``: a host is a name, an IPv4 or an IPv6 address.

An IPv6 address stands in brackets where a port follows, and bare everywhere else.
"""

import ipaddress
import re
import socket

_NAME = re.compile(r"[^\s:/@?#\[\]]+")
_LOOPBACKS = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}


def is_host(text: str) -> bool:
    """Whether a text may be a machine's name or address; no port, no URL."""
    if _NAME.fullmatch(text):
        return True
    try:
        ipaddress.IPv6Address(bare(text))
    except ValueError:
        return False
    return True


def bare(host: str) -> str:
    """A host without the brackets that it may have been given with."""
    return host[1:-1] if host.startswith("[") and host.endswith("]") else host


def joined(host: str, port: int) -> str:
    """``host:port``."""
    return f"[{bare(host)}]:{port}" if ":" in bare(host) else f"{host}:{port}"


def host_of(address: str) -> str:
    """The host of ``host:port``."""
    return bare(address.rpartition(":")[0])


def is_anywhere(host: str) -> bool:
    """Whether to bind to it is to bind to all addresses of a machine."""
    return bare(host) in _LOOPBACKS


def from_here(host: str) -> str:
    """Where what binds to a host is reached on its machine."""
    return _LOOPBACKS.get(bare(host), bare(host))


def listening(host: str, port: int = 0) -> socket.socket:
    """A socket that listens; at ``::`` for IPv4 too, where the machine can.

    Raises:
        OSError: if the port is taken, or the address is not this machine's.
    """
    host = bare(host) or "0.0.0.0"
    family, *_ = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    both = host == "::" and socket.has_dualstack_ipv6()
    return socket.create_server((host, port), family=family, dualstack_ipv6=both)
