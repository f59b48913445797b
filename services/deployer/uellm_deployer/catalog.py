"""The models that are wanted: their files, digests and needs."""

import asyncio
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from uellm.core.errors import ConfigurationError, InvalidArgumentError, ModelFilesError
from uellm.core.model import ModelProfile
from uellm.models import files
from uellm.models.adapters import check_names, parse_adapter, resolve_adapter, with_adapters
from uellm.models.adapters import digest as adapter_digest
from uellm.models.manifest import Manifest, Span, read_manifest
from uellm.models.profile import DTYPE_BYTES, read_profile
from uellm.placement.placers import EVEN, GOODPUT, placer_of
from uellm.placement.views import PlannedStage
from uellm.streams.keys import MODEL_NAME
from uellm.v1 import common_pb2, deployer_pb2
from uellm_deployer.settings import DeployerSettings

MOST_REPLICAS = 64
MOST_SLOTS = 4096
_OF_PLACE = (
    *("replicas", "most_replicas", "requests_per_second", "prompt_tokens", "output_tokens"),
    *("objective", "slo_seconds", "pins", "layer_pins", "excluded", "costs", "layout"),
)
_NAME_IN_SOURCE = re.compile(r"(?P<name>[^=/]+(?:/[^=/]+)*)=(?P<source>.+)")


@dataclass(slots=True)
class ResolvedModel:
    """A model whose files are on this host.

    Attributes:
        ref: with digest, as it is pushed to workers.
        directory: where its files are.
        adapters: its LoRA adapters, likewise, and where their files are.
    """

    ref: common_pb2.ModelRef
    directory: Path
    adapters: tuple[tuple[common_pb2.ModelRef, Path], ...] = ()
    _profiles: dict[str, ModelProfile] = field(default_factory=dict)
    _manifest: Manifest | None = None

    def profile(self, dtype: str) -> ModelProfile:
        """Its needs in a compute dtype, adapters included.

        Raises:
            ModelFilesError: if its files do not say.
        """
        if dtype not in self._profiles:
            directories = [directory for _, directory in self.adapters]
            base = read_profile(self.directory, dtype)
            self._profiles[dtype] = with_adapters(base, directories, dtype)
        return self._profiles[dtype]

    def needs(self, stage: PlannedStage) -> dict[str, int]:
        """The parts of its files that a stage needs, and their bytes; blocks at first.

        Raises:
            ModelFilesError: if its files are not what they should be.
        """
        if self._manifest is None:
            self._manifest = read_manifest(self.directory)
        return self._manifest.sizes(
            Span(stage.first_layer, stage.last_layer, stage.has_embed, stage.has_head)
        )

    @property
    def adapter_refs(self) -> list[common_pb2.ModelRef]:
        """Its LoRA adapters as they are pushed to workers."""
        return [ref for ref, _ in self.adapters]


async def resolve(
    request: deployer_pb2.PlanRequest, *, allow_download: bool = False
) -> ResolvedModel:
    """Find the files of a model and its adapters, and read what they say.

    Blocks a thread, not the loop.

    Raises:
        ModelFilesError: naming path and remedy.
    """
    ref = request.model

    def work() -> ResolvedModel:
        directory = files.resolve(ref.source, ref.revision, allow_download=allow_download)
        found = _found(ref, directory, files.digest(directory))
        if ref.digest and ref.digest != found.digest:
            raise ModelFilesError(
                f"{directory} is another model than was asked for: its digest is {found.digest}",
                field="model.digest",
            )
        adapters = [
            (adapter, resolve_adapter(adapter, allow_download=allow_download))
            for adapter in request.adapters
        ]
        model = ResolvedModel(
            found,
            directory,
            tuple((_found(one, at, adapter_digest(at)), at) for one, at in adapters),
        )
        model.profile("float32")
        return model

    return await asyncio.to_thread(work)


def _found(ref: common_pb2.ModelRef, directory: Path, digest: str) -> common_pb2.ModelRef:
    """A reference as it is pushed to workers."""
    local = Path(ref.source).expanduser().is_dir()
    return common_pb2.ModelRef(
        name=ref.name,
        source=str(directory) if local else ref.source,
        revision=ref.revision,
        digest=digest,
    )


def parse_model(text: str) -> common_pb2.ModelRef:
    """A model as settings name it: NAME=SOURCE, or a source whose last part is the name."""
    match = _NAME_IN_SOURCE.fullmatch(text)
    if match is not None and not Path(text).exists():
        return common_pb2.ModelRef(name=match["name"], source=match["source"])
    return common_pb2.ModelRef(source=text)


def adapters_by_model(
    adapters: Sequence[str], models: Sequence[common_pb2.ModelRef]
) -> dict[str, list[common_pb2.ModelRef]]:
    """Adapters as settings name them, by the served name of their model.

    Raises:
        InvalidArgumentError: if one cannot be read, or belongs to none of the models.
    """
    names = [model.name or Path(model.source).name for model in models]
    found: dict[str, list[common_pb2.ModelRef]] = {name: [] for name in names}
    for text in adapters:
        name, ref = parse_adapter(text)
        if not name and len(names) == 1:
            name = names[0]
        if name not in found:
            raise InvalidArgumentError(
                f"adapter {text!r}: put one of the served models before it, as MODEL:NAME=SOURCE; "
                f"served: {', '.join(names) or 'none'}",
                field="adapters",
            )
        found[name].append(ref)
    return found


def declared(settings: DeployerSettings) -> list[deployer_pb2.PlanRequest]:
    """The models that settings name, as they are wanted.

    Raises:
        ConfigurationError: if one cannot be.
    """
    models = [parse_model(text) for text in settings.models]
    try:
        adapters = adapters_by_model(settings.adapters, models)
        return [
            checked(
                deployer_pb2.PlanRequest(
                    model=model,
                    replicas=settings.replicas,
                    stages=settings.stages,
                    dtype=settings.dtype,
                    slots=settings.slots,
                    max_tokens=settings.max_tokens,
                    kv_tokens=settings.kv_tokens,
                    adapters=adapters[model.name or Path(model.source).name],
                ),
                settings.slots,
                settings.objective,
            )
            for model in models
        ]
    except InvalidArgumentError as error:
        raise ConfigurationError(
            f"settings of deployer: {error.message} (docs/configuration.md)", field=error.field
        ) from None


def checked(
    request: deployer_pb2.PlanRequest, default_slots: int, default_objective: str = "helr"
) -> deployer_pb2.PlanRequest:
    """A request with its name and defaults filled in.

    Raises:
        InvalidArgumentError: naming the field, the limit and the remedy.
    """
    wanted = deployer_pb2.PlanRequest()
    wanted.CopyFrom(request)
    model = wanted.model
    if not model.source:
        raise InvalidArgumentError(
            "model.source is empty; name a directory or a hub id", field="model.source"
        )
    model.name = model.name or Path(model.source).name
    if not MODEL_NAME.fullmatch(model.name):
        raise InvalidArgumentError(
            f"model.name {model.name!r} is no name: it starts with a letter or digit and has at "
            "most 128 of A-Z a-z 0-9 . _ / -",
            field="model.name",
        )
    if wanted.dtype and wanted.dtype not in DTYPE_BYTES:
        raise InvalidArgumentError(
            f"dtype {wanted.dtype!r} is not offered; use one of {', '.join(DTYPE_BYTES)}",
            field="dtype",
        )
    for name, value, most in (
        ("replicas", wanted.replicas, MOST_REPLICAS),
        ("most_replicas", wanted.most_replicas, MOST_REPLICAS),
        ("stages", wanted.stages, MOST_SLOTS),
        ("slots", wanted.slots, MOST_SLOTS),
    ):
        if value > most:
            raise InvalidArgumentError(f"{name}: {value}; the limit is {most}", field=name)
    if not 0 <= wanted.slo_seconds < float("inf"):
        raise InvalidArgumentError(
            f"slo_seconds: {wanted.slo_seconds} is not a number from 0 on", field="slo_seconds"
        )
    for device, cost in wanted.costs.items():
        if not 0 <= cost < float("inf"):
            raise InvalidArgumentError(
                f"costs: {cost} of {device} is not a number from 0 on", field="costs"
            )
    wanted.objective = wanted.objective or default_objective
    placer_of(wanted.objective)
    _check_copies(wanted)
    _check_place(wanted)
    adapters = check_names(request.adapters)
    del wanted.adapters[:]
    wanted.adapters.extend(adapters)
    wanted.replicas = wanted.replicas or 1
    wanted.slots = wanted.slots or default_slots
    return wanted


def _check_copies(wanted: deployer_pb2.PlanRequest) -> None:
    if 0 < wanted.most_replicas < wanted.replicas:
        raise InvalidArgumentError(
            f"most_replicas: {wanted.most_replicas}; at least {wanted.replicas}, as many as "
            "replicas, or 0 for any number",
            field="most_replicas",
        )
    if not 0 <= wanted.requests_per_second < float("inf"):
        raise InvalidArgumentError(
            f"requests_per_second: {wanted.requests_per_second} is not a number from 0 on",
            field="requests_per_second",
        )
    for name in ("most_replicas", "requests_per_second"):
        if getattr(wanted, name) and wanted.objective != GOODPUT:
            raise InvalidArgumentError(
                f"{name}: {getattr(wanted, name):g}, and with {wanted.objective} the load does "
                "not decide on the number of copies; ask for the objective goodput, or leave it "
                "out",
                field=name,
            )


def _check_place(wanted: deployer_pb2.PlanRequest) -> None:
    one_copy = wanted.replicas <= 1 and wanted.objective in ("helr", "he", "lr", "throughput")
    if wanted.layer_pins and not (one_copy and not wanted.stages and not wanted.pins):
        raise InvalidArgumentError(
            "layer pins: they place one copy, stage by stage, by helr, he, lr or throughput; leave "
            "out replicas, stages, other pins and other objectives",
            field="pins",
        )
    if wanted.pins and wanted.objective == EVEN:
        raise InvalidArgumentError(
            "pins: an even split takes devices by their memory alone; leave out the pins, or ask "
            "for another objective",
            field="pins",
        )
    if wanted.layout and wanted.objective == GOODPUT:
        raise InvalidArgumentError(
            "layout: it places one copy, and with goodput the load decides on their number; name "
            "another objective",
            field="layout",
        )
    if wanted.layout and (wanted.replicas > 1 or wanted.stages or wanted.pins or wanted.excluded):
        raise InvalidArgumentError(
            "layout: it places one copy, and says all of its place; leave out replicas, stages, "
            "pins and excluded, or the layout",
            field="layout",
        )


def check_context(request: deployer_pb2.PlanRequest, model: ResolvedModel) -> None:
    """Refuse a longer context than a model has.

    Raises:
        InvalidArgumentError: naming the limit and the remedy.
    """
    most = model.profile("float32").max_tokens
    if request.max_tokens > most:
        raise InvalidArgumentError(
            f"max_tokens: {request.max_tokens}; at most {most}, the model's own length, or 0 for "
            "just that",
            field="max_tokens",
        )


def check_routing(request: deployer_pb2.PlanRequest) -> None:
    """Refuse to run what is for planning alone.

    Raises:
        InvalidArgumentError: naming the remedy.
    """
    if request.routing != deployer_pb2.ROUTING_UNSPECIFIED:
        raise InvalidArgumentError(
            "routing: full_stage is for planning alone, since replicas are chains; leave it out",
            field="routing",
        )


def without_place(request: deployer_pb2.PlanRequest) -> deployer_pb2.PlanRequest:
    """A request without the number of copies and what is wished of their place."""
    bare = deployer_pb2.PlanRequest()
    bare.CopyFrom(request)
    for name in _OF_PLACE:
        bare.ClearField(name)  # type: ignore[arg-type]  # the names of fields
    return bare
