"""Which mesh a command speaks to."""

import re

from uellm.core.errors import ConfigurationError, UnavailableError
from uellm.mesh.state import MeshState, find_mesh, home

_ADDRESS = re.compile(r"(?:[^\s:/\[\]]+|\[[0-9A-Fa-f:.]+\]):(?P<port>[0-9]{1,5})")
_HIGHEST_PORT = 65535


def gateways(server: str) -> list[str]:
    """Addresses of gateways: those given, else those of the mesh that `uellm up` runs here.

    Args:
        server: ``host:port``, or several with commas; "": find out.

    Raises:
        ConfigurationError: if what is given is no address.
        UnavailableError: if none is given and none runs here.
    """
    named = [
        check_address(address.strip(), "--server or UELLM_SERVER")
        for address in server.split(",")
        if address.strip()
    ]
    return named or list(_local("a gateway with --server or UELLM_SERVER (host:port)").gateways)


def check_address(address: str, option: str) -> str:
    """An address ``host:port`` as it was given.

    Args:
        address: what was given.
        option: where, for the message.

    Raises:
        ConfigurationError: if it is anything else.
    """
    match = _ADDRESS.fullmatch(address)
    if match is None or not 0 < int(match["port"]) <= _HIGHEST_PORT:
        raise ConfigurationError(
            f"{option}: {address!r} is not host:port; for instance localhost:50051"
        )
    return address


def redis_url(named: str) -> str:
    """The mesh's Redis: the one given, else that of the mesh that `uellm up` runs here.

    Raises:
        UnavailableError: if none is given and no mesh runs here.
    """
    return named or _local("its Redis with --redis or UELLM_REDIS_URL").redis_url


def _local(otherwise: str) -> MeshState:
    state = find_mesh(home())
    if state is None:
        raise UnavailableError(f"no mesh runs here; start one with `uellm up`, or name {otherwise}")
    if not state.alive:
        raise UnavailableError(
            f"the mesh that process {state.pid} ran here is gone; start one with `uellm up`, "
            f"or name {otherwise}"
        )
    return state
