"""What is served, as the deployer publishes it, with each model's tokenizer beside it."""

import asyncio
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from uellm import convert_topology
from uellm.core.errors import ModelFilesError, UnavailableError
from uellm.core.model import ModelProfile
from uellm.logs import logger
from uellm.models.files import TEXT, resolve_ref
from uellm.models.image_tokens import ImageCounter, read_image_counter
from uellm.models.tokenizer import Tokenizer
from uellm.streams.registry import Registry
from uellm.v1 import common_pb2, topology_pb2
from uellm_gateway.validation import unknown_model

POLL_SECONDS = 0.5
UNREAD_SECONDS = 10.0
"""A request waits so long for a model to be read that it is one of the first to ask for."""
RETRY_LOAD_SECONDS = 2.0
_log = logger("models")


@dataclass(frozen=True, slots=True)
class ModelText:
    """How a model reads and writes text.

    Attributes:
        tokenizer: its tokenizer.
        defaults: its own temperature, top_p and top_k; empty: it decodes greedily.
        images: how it counts images; None: it takes none.
    """

    tokenizer: Tokenizer
    defaults: Mapping[str, float]
    images: ImageCounter | None = None


@dataclass(frozen=True, slots=True)
class ServedModel:
    """One deployment, as requests meet it."""

    deployment: topology_pb2.Deployment
    profile: ModelProfile
    policy: common_pb2.ModelPolicy | None = None

    @property
    def class_defaults(self) -> Mapping[str, common_pb2.Slo]:
        """What requests need that say nothing of it, by class."""
        return self.policy.class_defaults if self.policy is not None else {}

    @property
    def name(self) -> str:
        """The served name."""
        return self.deployment.name

    @property
    def context_tokens(self) -> int:
        """Longest prompt and answer together."""
        return self.deployment.max_tokens or self.profile.max_tokens

    @property
    def adapters(self) -> list[str]:
        """Names of its LoRA adapters."""
        return [adapter.name for adapter in self.deployment.adapters]

    @property
    def ready_replicas(self) -> int:
        """Replicas that take requests now."""
        ready = topology_pb2.REPLICA_STATE_READY
        return sum(replica.state == ready for replica in self.deployment.replicas)

    @property
    def waits_for(self) -> str:
        """Why requests wait with no promise; empty: replicas take them."""
        if self.ready_replicas:
            return ""
        return self.deployment.status or "no replica is ready; requests wait for one"


def sampling_defaults(directory: Path) -> dict[str, float]:
    """A checkpoint's own sampling, if its generation_config.json says that it samples."""
    path = directory / "generation_config.json"
    config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if not isinstance(config, dict) or not config.get("do_sample"):
        return {}
    values = {"temperature": 1.0} | config
    return {
        name: float(values[name])
        for name in ("temperature", "top_p", "top_k")
        if isinstance(values.get(name), int | float)
    }


def load_text(ref: common_pb2.ModelRef) -> ModelText:
    """Read a model's tokenizer. Blocks: for a thread.

    Raises:
        ModelFilesError: if the files are not on this host, or not those that were deployed.
    """
    directory = resolve_ref(ref, contents=TEXT)
    return ModelText(
        Tokenizer(directory), sampling_defaults(directory), read_image_counter(directory)
    )


class ModelView:
    """All deployments, kept up to date; tokenizers are loaded once and kept."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._models: dict[str, ServedModel] = {}
        self._refreshed_at = 0.0
        self._looking = asyncio.Lock()
        self._texts: dict[bytes, asyncio.Task[ModelText]] = {}
        self._failed_at: dict[bytes, float] = {}

    async def refresh(self) -> None:
        """Read the registry and start loading what is new."""
        begun = time.monotonic()
        deployments = await self._registry.deployments()
        policies = await self._registry.policies(deployments)
        self._refreshed_at = begun
        before, self._models = self._models, {}
        for name, deployment in deployments.items():
            known = before.get(name)
            if known is None or known.deployment != deployment:
                known = ServedModel(
                    deployment, convert_topology.model_from_proto(deployment.profile)
                )
            self._models[name] = replace(known, policy=policies[name])
            self._load(deployment.model)
        used = {_key(model.deployment.model) for model in self._models.values()}
        for key in self._texts.keys() - used:
            self._texts.pop(key).cancel()

    async def poll(self) -> None:
        """One round of keeping up to date."""
        await self.refresh()
        await asyncio.sleep(POLL_SECONDS)

    @property
    def models(self) -> list[ServedModel]:
        """All of them, by name."""
        return [self._models[name] for name in sorted(self._models)]

    def find(self, name: str) -> ServedModel | None:
        """A model, if it is known by now."""
        return self._models.get(name)

    async def get(self, name: str) -> ServedModel:
        """A model by its served name.

        Raises:
            NotFoundError: if it is not served, listing those that are.
            UnavailableError: if what it takes is not known in time.
        """
        asked_at = time.monotonic()
        if name not in self._models:
            # It may be newer than the last look; those who ask together look once.
            async with self._looking:
                if self._refreshed_at < asked_at:
                    await self.refresh()
        if name not in self._models:
            raise unknown_model(name, self._models)
        if not self._models[name].context_tokens:
            await self._read(name, asked_at + UNREAD_SECONDS)
        return self._models[name]

    async def _read(self, name: str, until: float) -> None:
        """Wait until the deployer has read a model that is wanted since a moment ago."""
        while name in self._models and not self._models[name].context_tokens:
            if time.monotonic() >= until:
                why = self._models[name].deployment.status or "try again"
                raise UnavailableError(f"model: {name} has not been read yet: {why}")
            await asyncio.sleep(POLL_SECONDS)  # `poll` looks as often, once for all who wait.
        if name not in self._models:
            raise unknown_model(name, self._models)

    async def text(self, model: ServedModel) -> ModelText:
        """A model's tokenizer, waiting for it to be loaded.

        Raises:
            ModelFilesError: if it cannot be; tried again a little later.
        """
        return await asyncio.shield(self._load(model.deployment.model))

    async def tokenizer(self, name: str) -> Tokenizer:
        """The tokenizer of a model by its served name.

        Raises:
            NotFoundError: if it is not served.
            ModelFilesError: if it cannot be loaded.
        """
        return (await self.text(await self.get(name))).tokenizer

    def _load(self, ref: common_pb2.ModelRef) -> asyncio.Task[ModelText]:
        key = _key(ref)
        task = self._texts.get(key)
        if task is not None and not self._may_retry(key, task):
            return task
        task = asyncio.create_task(asyncio.to_thread(load_text, ref), name=f"load {ref.name}")
        task.add_done_callback(lambda done: self._loaded(key, ref.name, done))
        self._texts[key] = task
        return task

    def _may_retry(self, key: bytes, task: asyncio.Task[ModelText]) -> bool:
        failed = task.done() and (task.cancelled() or task.exception() is not None)
        return failed and time.monotonic() - self._failed_at.get(key, 0.0) > RETRY_LOAD_SECONDS

    def _loaded(self, key: bytes, name: str, task: asyncio.Task[ModelText]) -> None:
        if task.cancelled():
            return
        error = task.exception()
        if error is None:
            self._failed_at.pop(key, None)
            return
        if key not in self._failed_at:
            message = error.message if isinstance(error, ModelFilesError) else repr(error)
            _log.warning("tokenizer not loaded; trying on", model=name, error=message)
        self._failed_at[key] = time.monotonic()

    async def close(self) -> None:
        """Stop loading."""
        tasks = list(self._texts.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _key(ref: common_pb2.ModelRef) -> bytes:
    return ref.SerializeToString(deterministic=True)
