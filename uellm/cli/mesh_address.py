"""Which mesh a command speaks to."""

from uellm.core.errors import UnavailableError
from uellm.mesh.state import MeshState, find_mesh, home


def gateways(server: str) -> list[str]:
    """Addresses of gateways: those given, else those of the mesh that `uellm up` runs here.

    Args:
        server: ``host:port``, or several with commas; "": find out.

    Raises:
        UnavailableError: if none is given and none runs here.
    """
    named = [address.strip() for address in server.split(",") if address.strip()]
    return named or list(_local("a gateway with --server or UELLM_SERVER (host:port)").gateways)


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
