"""Hosts and ports, with IPv6 addresses among them."""

import socket

import pytest

from tests.support.ipv6 import needs_ipv6
from uellm.addresses import bare, from_here, host_of, is_anywhere, is_host, joined, listening


@pytest.mark.parametrize(
    ("host", "address"),
    [
        ("mesh-1", "mesh-1:80"),
        ("10.0.0.1", "10.0.0.1:80"),
        ("::1", "[::1]:80"),
        ("[::1]", "[::1]:80"),
        ("fd00::2:3", "[fd00::2:3]:80"),
    ],
)
def test_an_address_has_brackets_where_it_needs_them(host: str, address: str) -> None:
    assert joined(host, 80) == address
    assert host_of(address) == bare(host)


def test_everywhere_is_reached_here_by_the_loopback() -> None:
    assert [from_here(host) for host in ("", "0.0.0.0", "::", "[::]", "::1", "h")] == [
        *("127.0.0.1", "127.0.0.1", "::1", "::1", "::1", "h")
    ]
    assert all(is_anywhere(host) for host in ("", "0.0.0.0", "::", "[::]"))
    assert not any(is_anywhere(host) for host in ("::1", "127.0.0.1", "h"))


def test_what_is_no_host_is_told_from_what_is_one() -> None:
    for host in ("mesh-1", "a.b.c", "10.0.0.1", "::1", "fe80::1:2", "::ffff:10.0.0.1", "[::1]"):
        assert is_host(host), host
    for text in ("", "h:80", "10.0.0.1:80", "http://h", "a b", "u@h", "[::1]:80", "::1::2"):
        assert not is_host(text), text


@pytest.mark.parametrize(
    "host",
    [
        *("127.0.0.1", "0.0.0.0", "", "localhost"),
        *(pytest.param(host, marks=needs_ipv6) for host in ("::1", "[::1]", "::")),
    ],
)
def test_a_socket_listens_there(host: str) -> None:
    with listening(host) as listener:
        port = listener.getsockname()[1]
        with socket.create_connection((from_here(host), port), 5):
            pass
        if host == "::":
            with socket.create_connection(("127.0.0.1", port), 5):
                pass
