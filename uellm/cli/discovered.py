"""What a mesh has found out about its devices, for planning."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from uellm.cli.service_calls import deployer
from uellm.convert import block_from_proto, topology_from_proto
from uellm.models import files
from uellm.placement.discovery import BlockKey, Knowledge
from uellm.placement.topology import Topology
from uellm.placement.views import LayerTimes, Workload
from uellm.rpc import CALL_SECONDS
from uellm.v1 import deployer_pb2


@dataclass(frozen=True, slots=True)
class Discovered:
    """What a mesh's deployer knows.

    Attributes:
        topology: devices and ways.
        layers: what those of models take, where they were measured.
    """

    topology: Topology
    layers: Knowledge

    @property
    def dtype(self) -> str:
        """What a mesh of these devices computes in."""
        slow = any(device.kind in ("cpu", "simulated") for device in self.topology.devices)
        return "float32" if slow else "bfloat16"

    def layer_times(self, model: str, dtype: str, workload: Workload) -> Mapping[str, LayerTimes]:
        """What layers of a model take, by device; nothing if it is no directory of this host."""
        path = Path(model).expanduser()
        if not path.is_dir() or not any(path.glob("*.safetensors*")):
            return {}
        digest = files.digest(path)
        return self.layers.layer_times(self.topology.devices, digest, dtype, workload)


async def discover(redis_url: str) -> Discovered:
    """Ask the mesh's deployer.

    Raises:
        UnavailableError: if there is no deployer.
    """
    async with deployer(redis_url) as stub:
        answer = await stub.GetTopology(deployer_pb2.GetTopologyRequest(), timeout=CALL_SECONDS)
    blocks = {
        BlockKey(found.host, found.device, found.digest, found.dtype): block_from_proto(found.cost)
        for found in answer.blocks
    }
    return Discovered(topology_from_proto(answer.topology), Knowledge(blocks))
