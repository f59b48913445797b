"""What a mesh has found out about its devices, for planning."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from uellm.cli.service_calls import deployer
from uellm.convert_topology import block_from_proto, topology_from_proto
from uellm.models import files
from uellm.models.manifest import Manifest, Span, read_manifest
from uellm.placement.discovery import BlockKey, Knowledge
from uellm.placement.topology import Topology
from uellm.placement.views import EVERYWHERE, LayerTimes, PlannedStage, Stock, Workload
from uellm.rpc import CALL_SECONDS
from uellm.v1 import deployer_pb2


@dataclass(frozen=True, slots=True)
class Discovered:
    """What a mesh's deployer knows.

    Attributes:
        topology: devices and ways.
        layers: what those of models take, where they were measured.
        stock: which hosts have the files of the model that was asked about.
    """

    topology: Topology
    layers: Knowledge
    stock: Stock = EVERYWHERE

    @property
    def dtype(self) -> str:
        """What a mesh of these devices computes in."""
        slow = any(device.kind in ("cpu", "simulated") for device in self.topology.devices)
        return "float32" if slow else "bfloat16"

    def layer_times(self, model: str, dtype: str, workload: Workload) -> Mapping[str, LayerTimes]:
        """What layers of a model take, by device; nothing if it is no directory of this host."""
        path = _checkpoint(model)
        if path is None:
            return {}
        digest = files.digest(path)
        return self.layers.layer_times(self.topology.devices, digest, dtype, workload)


async def discover(redis_url: str, model: str) -> Discovered:
    """Ask the mesh's deployer.

    Args:
        redis_url: of the mesh.
        model: whose files are asked about, if it is a directory of this host.

    Raises:
        UnavailableError: if there is no deployer.
    """
    path = _checkpoint(model)
    request = deployer_pb2.GetTopologyRequest()
    if path is not None:
        request.files_of.source, request.files_of.digest = str(path.resolve()), files.digest(path)
    async with deployer(redis_url) as stub:
        answer = await stub.GetTopology(request, timeout=CALL_SECONDS)
    blocks = {
        BlockKey(found.host, found.device, found.digest, found.dtype): block_from_proto(found.cost)
        for found in answer.blocks
    }
    stock = EVERYWHERE
    if path is not None:
        held = {each.worker: frozenset(each.parts) for each in answer.held_files}
        stock = Stock(partial(_needs, read_manifest(path)), held)
    return Discovered(topology_from_proto(answer.topology), Knowledge(blocks), stock)


def _checkpoint(model: str) -> Path | None:
    """The directory of a model with weights, if it is one of this host."""
    path = Path(model).expanduser()
    return path if path.is_dir() and any(path.glob("*.safetensors*")) else None


def _needs(manifest: Manifest, stage: PlannedStage) -> Mapping[str, int]:
    return manifest.sizes(
        Span(stage.first_layer, stage.last_layer, stage.has_embed, stage.has_head)
    )
