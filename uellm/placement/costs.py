"""What layers take on devices and activations on links: seconds and bytes, as arrays.

A layer takes what its arithmetic or its memory traffic does, whichever is longer (the roofline),
and a launch; where it was measured, the measured times. A link takes its latency, the bytes, and
the software of the hop unless that was measured with it.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from uellm.core.errors import InvalidArgumentError
from uellm.core.model import ModelProfile
from uellm.placement.arrays import Array, Integers
from uellm.placement.memory import USABLE, Need
from uellm.placement.roofline import beside_layers, head_seconds, layer_seconds, stage_seconds
from uellm.placement.topology import Device
from uellm.placement.views import PlanRequest, Workload
from uellm.placement.ways import passing_seconds, ways, ways_back

TOKEN_BYTES = 64
"""Of a token on its way from the last stage to the first, with what goes with it."""


@dataclass(frozen=True)
class Costs:
    """A model under a workload on some devices; n devices, L layers.

    Attributes:
        devices: those that may be used, the least used first.
        need: the model, and the sequences that it has room for.
        batch: sequences computed together.
        prompt_tokens: of a sequence.
        output_tokens: of a sequence.
        in_flight: batches under way at once.
        prefill: [n, L], seconds for a batch's prompts.
        decode: [n, L], seconds for one step.
        head: [n], seconds for the logits of one step.
        stage: [n], seconds of any step beside layers and head.
        leader: [n], seconds between two steps, of the first stage.
        agent: [n], seconds of a step that the first stage loses to what its leader does besides.
        passing: [n], seconds of a step that computing loses to passing it on to another worker.
        share: [n], of the time that a quota lets it compute; seconds here count the rest.
        period: [n], of the quota, in seconds.
        link_prefill: [n, n], seconds for the activations of a batch's prompts.
        link_decode: [n, n], seconds for those of one step.
        back: [n, n], seconds from the last stage to the first for the tokens of one step.
        busy: [n, n], seconds that a batch keeps a link busy: latency does not.
        room: [n], bytes that may be filled.
        price: [n], what using a device costs, in units of the user's own.
    """

    devices: tuple[Device, ...]
    need: Need
    batch: int
    prompt_tokens: int
    output_tokens: int
    in_flight: int
    prefill: Array
    decode: Array
    head: Array
    stage: Array
    leader: Array
    agent: Array
    passing: Array
    share: Array
    period: Array
    link_prefill: Array
    link_decode: Array
    back: Array
    busy: Array
    room: Integers
    price: Array

    @property
    def model(self) -> ModelProfile:
        """Whose costs."""
        return self.need.model

    @property
    def num_layers(self) -> int:
        """L."""
        return len(self.model.layers)

    @property
    def steps(self) -> int:
        """Decode steps: the first token comes with the prefill."""
        return self.output_tokens - 1

    @cached_property
    def layer(self) -> Array:
        """[n, L], seconds of a batch from prompt to last token."""
        total: Array = self.prefill + self.steps * self.decode
        return total

    @cached_property
    def head_total(self) -> Array:
        """[n], seconds of a batch from prompt to last token."""
        total: Array = self.head * self.output_tokens
        return total

    @cached_property
    def stage_total(self) -> Array:
        """[n], seconds of a batch from prompt to last token, beside layers and head."""
        total: Array = self.stage * self.output_tokens
        return total

    @cached_property
    def leader_total(self) -> Array:
        """[n], seconds of a batch from prompt to last token, of the first stage's leading."""
        total: Array = self.leader * self.output_tokens
        return total

    @cached_property
    def link(self) -> Array:
        """[n, n], seconds of a batch from prompt to last token."""
        total: Array = self.link_prefill + self.steps * self.link_decode
        return total

    @cached_property
    def round_layer(self) -> Array:
        """[n, L], seconds of a layer in a batch's rounds, with prompts that it waits for."""
        total: Array = self.output_tokens * self.decode + self._waits * (self.prefill - self.decode)
        return total

    @cached_property
    def round_link(self) -> Array:
        """[n, n], likewise of a link."""
        longer = self.link_prefill - self.link_decode
        total: Array = self.output_tokens * self.link_decode + self._waits * longer
        return total

    @property
    def _waits(self) -> float:
        """How often a batch waits until its prompts, or another one's, have gone all the way."""
        prompts = self.in_flight * self.batch
        rounds = min(prompts, self.output_tokens)
        return rounds / self.batch * max(prompts / rounds / self.in_flight, 1.0)

    @cached_property
    def back_total(self) -> Array:
        """[n, n], seconds of a batch from prompt to last token, for the way back."""
        total: Array = self.back * self.output_tokens
        return total

    @cached_property
    def layer_bytes(self) -> Integers:
        """[L], weights, KV cache and states."""
        return np.array([self.need.layer(i) for i in range(self.num_layers)], dtype=np.int64)

    @cached_property
    def group(self) -> Integers:
        """[n], the worker of each device, as a number."""
        workers = sorted({device.worker for device in self.devices})
        return np.array([workers.index(device.worker) for device in self.devices], dtype=np.int64)

    @cached_property
    def uniform(self) -> bool:
        """Whether all layers are alike."""
        return len(set(self.model.layers)) == 1

    def only(self, keep: Sequence[int]) -> "Costs":
        """The same on some of the devices."""
        some = np.asarray(keep, dtype=np.int64)
        pairs = np.ix_(some, some)
        return replace(
            self,
            devices=tuple(self.devices[i] for i in keep),
            prefill=self.prefill[some],
            decode=self.decode[some],
            head=self.head[some],
            stage=self.stage[some],
            leader=self.leader[some],
            agent=self.agent[some],
            passing=self.passing[some],
            share=self.share[some],
            period=self.period[some],
            link_prefill=self.link_prefill[pairs],
            link_decode=self.link_decode[pairs],
            back=self.back[pairs],
            busy=self.busy[pairs],
            room=self.room[some],
            price=self.price[some],
        )


def costs_of(request: PlanRequest, slots: int | None = None) -> Costs:
    """Costs of a request, on the devices that it may use.

    Args:
        request: checked here.
        slots: sequences to have room for; None: as the workload wants.

    Raises:
        InvalidArgumentError: naming what the request says of devices that are not there.
    """
    devices = usable_devices(request)
    model, workload = request.model, request.workload
    need = _need(model, workload, slots)
    batch = workload.batch or max(1, need.slots // workload.in_flight)
    times = [request.layer_times.get(d.id, request.layer_times.get(d.name)) for d in devices]
    prefill, decode = layer_seconds(devices, model, batch, workload, times)
    latency, per_byte, hop = ways(request.topology, devices)
    activation = batch * model.activation_bytes_per_token
    prompt = workload.prompt_tokens * activation
    busy = (hop + prompt * per_byte) + (workload.output_tokens - 1) * (hop + activation * per_byte)
    return Costs(
        devices=devices,
        need=need,
        batch=batch,
        prompt_tokens=workload.prompt_tokens,
        output_tokens=workload.output_tokens,
        in_flight=workload.in_flight,
        prefill=prefill,
        decode=decode,
        head=head_seconds(devices, model, batch, times),
        stage=stage_seconds(devices, times),
        leader=beside_layers(devices, times, lambda t: t.leader),
        agent=beside_layers(devices, times, lambda t: t.agent),
        passing=passing_seconds(request.topology, devices),
        share=np.array([t.share if t else 1.0 for t in times]),
        period=np.array([t.period if t else 0.0 for t in times]),
        link_prefill=latency + hop + prompt * per_byte,
        link_decode=latency + hop + activation * per_byte,
        back=ways_back(devices, latency + hop + batch * TOKEN_BYTES * per_byte),
        busy=busy,
        room=np.array([int(d.memory_bytes * USABLE) for d in devices], dtype=np.int64),
        price=np.array([request.costs.get(d.id, d.cost) for d in devices], dtype=np.float64),
    )


def usable_devices(request: PlanRequest) -> tuple[Device, ...]:
    """The healthy devices that the request does not exclude: the least used first, then by id.

    Raises:
        InvalidArgumentError: if it pins, prices or excludes what is not there.
    """
    every = request.topology.devices
    names = {name for d in every for name in (d.id, d.worker, d.host)}
    ids = {device.id for device in every}
    known = ", ".join(sorted(ids)) or "none"
    for name in sorted(request.excluded - names):
        raise InvalidArgumentError(
            f"excluded: {name!r} is no device, worker or host of the topology; devices: {known}",
            field="excluded",
        )
    for name in sorted(request.costs.keys() - ids):
        raise InvalidArgumentError(f"costs: {name!r} is no device; devices: {known}", field="costs")
    found = tuple(
        sorted(
            (d for d in every if d.healthy and not request.excluded & {d.id, d.worker, d.host}),
            # Of equal choices the first is taken: devices that hold nothing yet come first.
            key=lambda device: (device.num_stages, device.id),
        )
    )
    left = {device.id for device in found}
    for pin in request.pins:
        if pin.device_id not in left:
            raise _away(pin.device_id, every, left)
    for end in ("first", "last"):
        pinned = sorted({pin.device_id for pin in request.pins if pin.end == end})
        if len(pinned) > 1:
            raise InvalidArgumentError(
                f"pins: {' and '.join(pinned)} cannot both be {end}; pin one of them there",
                field="pins",
            )
    return found


def _away(pinned: str, every: Sequence[Device], left: Collection[str]) -> InvalidArgumentError:
    """Why a pin to a device that cannot be used lets nothing be placed."""
    known = {device.id: device for device in every}
    if pinned not in known:
        why = "is no device of the topology: nothing is placed until it is; start its worker"
    elif not known[pinned].healthy:
        why = "is unhealthy: nothing is placed until it is well again; see `uellm topology`"
    else:
        why = "is excluded too: take it from one of the two"
    others = ", ".join(sorted(left)) or "none"
    return InvalidArgumentError(
        f"pins: {pinned!r} {why}, or pin another instead, of {others}", field="pins"
    )


def _need(model: ModelProfile, workload: Workload, slots: int | None) -> Need:
    if workload.batch:
        context = workload.prompt_tokens + workload.output_tokens
        if context > model.max_tokens:
            raise InvalidArgumentError(
                f"workload: {workload.prompt_tokens} prompt_tokens and {workload.output_tokens} "
                f"output_tokens exceed the model's context of {model.max_tokens}; shorten one",
                field="workload.prompt_tokens",
            )
        sequences = workload.batch * workload.in_flight
        context = max(context, min(workload.max_tokens, model.max_tokens))
        return Need(model, sequences, context)
    context = min(
        workload.max_tokens or model.max_tokens,
        model.max_tokens,
        workload.kv_tokens or model.max_tokens,
    )
    count = max(1, workload.slots if slots is None else slots)
    return Need(model, count, context, workload.kv_tokens)
