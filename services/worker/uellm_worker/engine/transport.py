"""How activations travel from one stage to the next.

A step costs one announcement and one activation per hop, and one result from the last stage to
the first. Announcements and results go over the group's control links, since a stage that idles
must wait for them as long as it takes, and stop waiting when it is told to; a receive of
torch.distributed can be ended neither way. Activations go over a process group of the
generation's own: they are on their way when they are asked for, so a short timeout is never wrong.
Small ones, such as those of decode steps, go with the announcement: one message instead of four.
"""

from collections import deque
from datetime import timedelta
from typing import Any, Protocol

import torch
from torch.distributed import PrefixStore, ProcessGroupGloo, TCPStore

from uellm.addresses import bare, listening
from uellm_worker.engine.errors import PeerLostError
from uellm_worker.engine.group import Group
from uellm_worker.engine.inbox import Inbox

_FORM_SECONDS = 20.0
_ACTIVATION_SECONDS = 5.0
_SLOWEST_BYTES_PER_SECOND = 4e6
"""Of a link between stages: an activation is waited for accordingly."""


INLINE_BYTES = 256 << 10
"""Activations up to this size travel with their announcement."""


class Transport(Protocol):
    """What a stage needs of its neighbours."""

    def send_step(self, meta: bytes, activation: torch.Tensor | None) -> None:
        """Announce a step to the next stage, and send ``[T, hidden]``; None: there is none."""
        ...

    def receive_activation(self, rows: int, inline: bytes) -> torch.Tensor:
        """The announced step's ``[rows, hidden]``; ``inline`` came behind the announcement."""
        ...

    def send_result(self, data: bytes) -> None:
        """On the last stage: answer stage 0."""
        ...

    def wait_result(self, *, patient: bool) -> bytes | None:
        """On stage 0: the last stage's answer to the oldest step; see ``Inbox.wait_result``."""
        ...

    def close(self) -> None:
        """Give up the connections."""
        ...


class Loopback:
    """Stages in one process: each lags behind the one before it for as long as it may.

    Args:
        hub: what the stages of one replica share; one list for all of them.

    Attributes:
        follow: called with the announcement of a step.
    """

    def __init__(self, hub: list["Loopback"]) -> None:
        self._hub = hub
        self._index = len(hub)
        self._arrived: deque[tuple[bytes, torch.Tensor | None]] = deque()
        self._activation: torch.Tensor | None = None
        self._results: deque[bytes] = deque()
        self.follow: Any = None
        hub.append(self)

    def send_step(self, meta: bytes, activation: torch.Tensor | None) -> None:
        """See ``Transport``."""
        self._hub[self._index + 1]._arrived.append((meta, activation))

    def receive_activation(self, rows: int, inline: bytes) -> torch.Tensor:
        """See ``Transport``."""
        del inline
        if self._activation is None or len(self._activation) != rows:
            raise PeerLostError(f"no activation of {rows} rows")
        return self._activation

    def send_result(self, data: bytes) -> None:
        """See ``Transport``."""
        self._hub[0]._results.append(data)

    def wait_result(self, *, patient: bool) -> bytes | None:
        """See ``Transport``."""
        del patient
        while not self._results:
            stage = next((s for s in reversed(self._hub) if s._arrived), None)
            if stage is None:
                raise PeerLostError("no step is under way")
            meta, stage._activation = stage._arrived.popleft()
            stage.follow(meta)
        return self._results.popleft()

    def close(self) -> None:
        """Nothing to give up."""


def to_bytes(tensor: torch.Tensor) -> memoryview:
    """A contiguous CPU tensor's content, in the byte order of the machine; no copy of it."""
    return memoryview(tensor.view(torch.uint8).numpy())


def from_bytes(data: bytes | memoryview, rows: int, dtype: torch.dtype) -> torch.Tensor:
    """The inverse of ``to_bytes`` for ``[rows, …]``."""
    return torch.frombuffer(bytearray(data), dtype=dtype).view(rows, -1)


def open_store(bind_host: str) -> TCPStore:
    """Stage 0's store for forming one process group, on a free port of one address."""
    listener = listening(bind_host)
    port = listener.getsockname()[1]
    return TCPStore(
        bare(bind_host),
        port,
        is_master=True,
        wait_for_workers=False,
        timeout=timedelta(seconds=_FORM_SECONDS),
        master_listen_fd=listener.detach(),
    )


class ProcessGroupTransport:
    """Activations over torch.distributed, in a group that belongs to one generation.

    gloo carries them anywhere. Where every stage has a CUDA device of its own, NCCL does; that
    path has not been exercised on several GPUs.

    Args:
        group: the control links.
        inbox: where stage 0 waits for results.
        host: address of this stage, that gloo binds to.
        store: stage 0's own; the others connect to it.
        device: where activations come in; a rank has one device, and what goes out elsewhere is
            brought there.
        hidden_size: of an activation.
        dtype: of an activation.

    Raises:
        PeerLostError: if the others do not come.
    """

    def __init__(
        self,
        group: Group,
        inbox: Inbox,
        host: str,
        store: TCPStore | None,
        device: torch.device,
        hidden_size: int,
        dtype: torch.dtype,
    ) -> None:
        self._group = group
        self._inbox = inbox
        self._stage = group.assignment.stage_index
        self._device = device
        self._hidden_size = hidden_size
        self._dtype = dtype
        self._sent: deque[tuple[Any, torch.Tensor]] = deque()
        cuda = [name for name in group.devices if name.startswith("cuda")]
        self._nccl = len(set(cuda)) == group.assignment.stage_count
        try:
            self._store = store or TCPStore(
                group.leader_host,
                int(group.offer),
                is_master=False,
                wait_for_workers=False,
                timeout=timedelta(seconds=_FORM_SECONDS),
            )
            self._process_group = self._form(host)
        except RuntimeError as error:  # All that torch.distributed raises derives from it.
            raise PeerLostError(f"the data plane could not be formed: {error}") from error

    def _form(self, host: str) -> Any:
        assignment = self._group.assignment
        rank, size = assignment.stage_index, assignment.stage_count
        store = PrefixStore(f"generation-{assignment.generation}", self._store)
        if self._nccl:
            from torch.distributed import ProcessGroupNCCL  # noqa: PLC0415 (CUDA builds only)

            return ProcessGroupNCCL(store, rank, size, timedelta(seconds=_FORM_SECONDS))
        options = ProcessGroupGloo._Options()
        options._devices = [ProcessGroupGloo.create_device(hostname=host)]
        options._timeout = timedelta(seconds=_FORM_SECONDS)
        return ProcessGroupGloo(store, rank, size, options)

    @property
    def _carrier(self) -> torch.device:
        """Where tensors must lie to be sent."""
        return self._device if self._nccl else torch.device("cpu")

    def send_step(self, meta: bytes, activation: torch.Tensor | None) -> None:
        """See ``Transport``."""
        if activation is None:
            self._group.send_step(meta)
            return
        tensor = activation.to(self._carrier).contiguous()
        if tensor.nbytes <= INLINE_BYTES and not self._nccl:
            self._group.send_step(meta, to_bytes(tensor))
            return
        while self._sent and self._sent[0][0].is_completed():
            self._sent.popleft()
        while len(self._sent) >= self._group.assignment.stage_count:
            self._wait(*self._sent.popleft())
        self._group.send_step(meta)
        try:
            work = self._process_group.send([tensor], self._stage + 1, 0)
        except RuntimeError as error:
            raise PeerLostError(f"stage {self._stage + 1} is gone: {error}") from error
        # The tensor must live until it is sent.
        self._sent.append((work, tensor))

    def receive_activation(self, rows: int, inline: bytes) -> torch.Tensor:
        """See ``Transport``."""
        if inline:
            return from_bytes(inline, rows, self._dtype).to(self._device)
        tensor = torch.empty(rows, self._hidden_size, dtype=self._dtype, device=self._carrier)
        try:
            work = self._process_group.recv([tensor], self._stage - 1, 0)
        except RuntimeError as error:
            raise PeerLostError(f"stage {self._stage - 1} is gone: {error}") from error
        self._wait(work, tensor)
        return tensor.to(self._device)

    def send_result(self, data: bytes) -> None:
        """See ``Transport``."""
        self._group.send_result(data)

    def wait_result(self, *, patient: bool) -> bytes | None:
        """See ``Transport``."""
        return self._inbox.wait_result(patient=patient)

    def close(self) -> None:
        """Give up the process group and the store."""
        self._sent.clear()
        if self._nccl:
            self._process_group.abort()
        self._process_group = self._store = None

    @staticmethod
    def _wait(work: Any, tensor: torch.Tensor) -> None:
        seconds = _ACTIVATION_SECONDS + tensor.nbytes / _SLOWEST_BYTES_PER_SECOND
        try:
            work.wait(timedelta(seconds=seconds))
        except RuntimeError as error:
            raise PeerLostError(f"an activation did not arrive: {error}") from error


class TransportCarrier:
    """A transport as a probe uses it; see ``uellm_worker.engine.link_probe.Carrier``.

    Args:
        transport: of a group of two.
        device: where activations come from and go to.
        hidden_size: of an activation.
        dtype: of an activation.
    """

    def __init__(
        self, transport: Transport, device: torch.device, hidden_size: int, dtype: torch.dtype
    ) -> None:
        self._transport = transport
        self._make = lambda rows: torch.zeros(rows, hidden_size, dtype=dtype, device=device)
        self._activation = self._make(1)

    def send(self, header: bytes, rows: int) -> None:
        """Send zeros, made once for each size."""
        if len(self._activation) != rows:
            self._activation = self._make(rows)
        self._transport.send_step(header, self._activation)

    def receive(self, rows: int, inline: bytes) -> None:
        """Receive to the device."""
        self._transport.receive_activation(rows, inline)

    def close(self) -> None:
        """Give up the transport."""
        self._transport.close()
