"""Steps that only decode, recorded once per batch size and played back: CUDA graphs.

A small step on a fast device takes longer to launch, kernel by kernel, than to compute. A recording
is launched as a whole; it reads its rows from tensors that stay where they are. A batch between two
recorded sizes is filled up with rows of a slot that nobody has.
"""

import logging
from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from uellm_worker.engine.packed import PackedStep
from uellm_worker.engine.plan import Chunk
from uellm_worker.engine.varlen import Kernel

_log = logging.getLogger(__name__)
_SIZES = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)

Compute = Callable[[PackedStep, torch.Tensor], torch.Tensor]
"""Computes a step from token ids ``[T]`` or activations ``[T, hidden]``."""


class Recorder(Protocol):
    """Records what a device is asked to do."""

    def record(self, work: Callable[[], torch.Tensor]) -> tuple[Callable[[], None], torch.Tensor]:
        """Do some work; returns what does it again, and where its result will be."""
        ...


class CudaRecorder:
    """CUDA graphs, which share their scratch memory."""

    def __init__(self) -> None:
        self._pool: tuple[int, int] | None = None

    def record(self, work: Callable[[], torch.Tensor]) -> tuple[Callable[[], None], torch.Tensor]:
        """See ``Recorder``."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            work()  # What is set up at first use must not be recorded.
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            output = work()
        self._pool = graph.pool()
        return graph.replay, output


class _Recording:
    """One batch size: the tensors that it reads, and the playing back."""

    def __init__(
        self,
        size: int,
        given: torch.Tensor,
        idle: Chunk,
        flash: Kernel,
        compute: Compute,
        recorder: Recorder,
    ) -> None:
        self._idle = idle
        self._size = size
        self._step = PackedStep((idle,) * size, given.device, flash=flash)
        self._given = torch.zeros((size, *given.shape[1:]), dtype=given.dtype, device=given.device)
        self._play, self._output = recorder.record(lambda: compute(self._step, self._given))

    def output(self, chunks: Sequence[Chunk], given: torch.Tensor, flash: Kernel) -> torch.Tensor:
        """Play back with these rows."""
        rows = len(chunks)
        filled = (*chunks, *(self._idle,) * (self._size - rows))
        fresh = PackedStep(filled, given.device, flash=flash)
        self._step.load(fresh)
        self._given[:rows].copy_(given)
        self._play()
        # The next playing back writes to the same place.
        return self._output[:rows].clone()


class DecodeGraphs:
    """Recordings of the decode steps of one device's layers.

    Args:
        compute: computes a step.
        flash: attention that depends on tensors alone.
        scratch: a slot that nobody has.
        most: largest batch.
        recorder: records.
    """

    def __init__(
        self, compute: Compute, flash: Kernel, scratch: int, most: int, recorder: Recorder
    ) -> None:
        self._compute = compute
        self._flash = flash
        self._idle = Chunk(scratch, 1, 1, sample=True)
        self._sizes = [size for size in _SIZES if size < most] + [most]
        self._recorder = recorder
        self._recordings: dict[int, _Recording] = {}
        self._refused = False

    def output(self, chunks: Sequence[Chunk], given: torch.Tensor) -> torch.Tensor | None:
        """Compute a step of decodes by playing back.

        Args:
            chunks: in row order.
            given: their token ids or activations, on the device.

        Returns:
            None if it has to be computed in the usual way: it does not only decode, or the device
            does not record.
        """
        decodes = all(c.count == 1 and c.start > 0 and c.sample for c in chunks)
        if self._refused or not decodes or not 0 < len(chunks) <= self._sizes[-1]:
            return None
        size = self._sizes[bisect_left(self._sizes, len(chunks))]
        recording = self._recordings.get(size)
        if recording is None:
            try:
                recording = _Recording(
                    size, given, self._idle, self._flash, self._compute, self._recorder
                )
            except RuntimeError:  # Whatever in the model's code cannot be recorded.
                _log.warning("decode steps cannot be recorded here", exc_info=True)
                self._refused = True
                return None
            self._recordings[size] = recording
        return recording.output(chunks, given, self._flash)
