"""Whether IPv6 is there: containers often have none, not even a loopback."""

import socket

import pytest


def _there() -> bool:
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6):
            return True
    except OSError:
        return False


needs_ipv6 = pytest.mark.skipif(not _there(), reason="this machine has no IPv6")
