"""Which row of a step belongs to which sequence, for those who attend rows to their slots."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from uellm_worker.engine.grouping import group_lengths
from uellm_worker.engine.native import Kernels
from uellm_worker.engine.plan import Chunk
from uellm_worker.engine.tiles import SPAN_ROWS
from uellm_worker.engine.varlen import Kernel, Spans


@dataclass(frozen=True, slots=True)
class DecodeRun:
    """Decodes of neighbouring slots: rows ``row`` on, slots ``slot`` on, ``count`` of each.

    Attributes:
        longest: tokens of the longest sequence, the present one included.
        positions: ``[count]``, of the present tokens.
        even: all are equally long, so that nothing is to be masked.
    """

    row: int
    slot: int
    count: int
    longest: int
    positions: torch.Tensor
    even: bool


class PackedStep:
    """Which row of a step belongs where. Shared by all layers.

    Args:
        chunks: in row order.
        device: of the cache.
        call_tokens: see ``group_lengths``; None to attend to all neighbours in one call.
        flash: attends where it can; None: torch's plain attention does.
        kernels: attend where ``flash`` does not; None: torch does.

    Attributes:
        slots: ``[T]``, each row's slot.
        positions: ``[T]``, each row's position in its sequence.
        samples: rows that a token is chosen from.
        spans: for ``flash``.
        decodes: how many rows are decodes; they come first.
        longest: tokens of the longest sequence, those of the step included.
        runs: of decodes; none where ``kernels`` attend.
        prefills: the other chunks, and the row that each begins at.
        table: for ``kernels``, ``[n, 4]``: rows of a sequence that attend together, by first row,
            number of rows, slot and position of the first.
    """

    def __init__(
        self,
        chunks: tuple[Chunk, ...],
        device: torch.device,
        call_tokens: int | None = None,
        flash: Kernel | None = None,
        kernels: Kernels | None = None,
    ) -> None:
        self.flash = flash
        self.kernels = kernels
        self.spans = None if flash is None else Spans(chunks, device)
        slots: list[int] = []
        positions: list[int] = []
        samples: list[int] = []
        runs: list[list[Chunk]] = []
        self.prefills: list[tuple[int, Chunk]] = []
        for chunk in chunks:
            if self.prefills or chunk.count > 1 or chunk.start == 0:
                self.prefills.append((len(slots), chunk))
            elif runs and runs[-1][-1].slot + 1 == chunk.slot:
                runs[-1].append(chunk)
            else:
                runs.append([chunk])
            slots += [chunk.slot] * chunk.count
            positions += range(chunk.start, chunk.start + chunk.count)
            if chunk.sample:
                samples.append(len(slots) - 1)
        table = [] if kernels is None else _table(chunks)
        # One tensor: each that is made of a list takes some ten microseconds.
        whole = torch.tensor(slots + positions + samples + table, dtype=torch.long, device=device)
        sizes = (len(slots), len(slots), len(samples), len(table))
        self.slots, self.positions, self.samples, numbers = whole.split(sizes)
        self.table = None if kernels is None else numbers.view(-1, 4)
        self.decodes = self.prefills[0][0] if self.prefills else len(slots)
        self.longest = max((chunk.start + chunk.count for chunk in chunks), default=0)
        self.runs: list[DecodeRun] = []
        row = 0
        for run in _grouped(runs, call_tokens) if kernels is None else ():
            starts = [chunk.start for chunk in run]
            longest = max(starts) + 1
            self.runs.append(
                DecodeRun(
                    row=row,
                    slot=run[0].slot,
                    count=len(run),
                    longest=longest,
                    positions=self.positions[row : row + len(run)],
                    even=min(starts) + 1 == longest,
                )
            )
            row += len(run)
        self._masks: dict[tuple[int, int], torch.Tensor | None] = {}

    def load(self, other: "PackedStep") -> None:
        """Take over the rows of another step of decodes, in the tensors that are here.

        For ``flash`` only: what plain attention goes by is not in tensors.
        """
        if self.spans is None or other.spans is None:
            raise RuntimeError("a step without spans cannot take over another")
        self.slots.copy_(other.slots)
        self.positions.copy_(other.positions)
        self.spans.seen.copy_(other.spans.seen)
        self.spans.pages.copy_(other.spans.pages)

    def run_mask(
        self, index: int, window: int | None, dtype: torch.dtype, copies: int = 1
    ) -> torch.Tensor | None:
        """``[count * copies, 1, longest]``, added to the scores; None to attend everywhere."""
        key = (index, window or 0)
        if key not in self._masks:
            run = self.runs[index]
            if run.even and (window is None or run.longest <= window):
                self._masks[key] = None
            else:
                mask = hidden(run.positions[:, None], run.longest, window, dtype)
                self._masks[key] = mask.repeat_interleave(copies, 0)[:, None]
        return self._masks[key]

    def chunk_mask(self, index: int, window: int | None, dtype: torch.dtype) -> torch.Tensor | None:
        """``[count, end]``, added to the scores; None for the plain causal pattern."""
        key = (-1 - index, window or 0)
        if key not in self._masks:
            row, chunk = self.prefills[index]
            end = chunk.start + chunk.count
            if chunk.start == 0 and (window is None or end <= window):
                self._masks[key] = None
            else:
                positions = self.positions[row : row + chunk.count]
                self._masks[key] = hidden(positions[:, None], end, window, dtype)
        return self._masks[key]


def _table(chunks: tuple[Chunk, ...]) -> list[int]:
    """See ``PackedStep``."""
    numbers: list[int] = []
    row = 0
    for chunk in chunks:
        for done in range(0, chunk.count, SPAN_ROWS):
            count = min(SPAN_ROWS, chunk.count - done)
            numbers += (row + done, count, chunk.slot, chunk.start + done)
        row += chunk.count
    return numbers


def _grouped(runs: list[list[Chunk]], call_tokens: int | None) -> Iterator[list[Chunk]]:
    """The runs, cut where lengths differ much."""
    for run in runs:
        if call_tokens is None or len(run) == 1:
            yield run
            continue
        start = 0
        for size in group_lengths([chunk.start + 1 for chunk in run], call_tokens):
            yield run[start : start + size]
            start += size


def hidden(
    positions: torch.Tensor, length: int, window: int | None, dtype: torch.dtype
) -> torch.Tensor:
    """Minus infinity for those of the first ``length`` tokens that ``positions`` do not see.

    Kernels would make these numbers of true and false, in every layer.

    Args:
        positions: ``[n, 1]``.
        length: tokens in the cache.
        window: see ``attend``.
        dtype: of the scores.

    Returns:
        ``[n, length]``, 0 elsewhere.
    """
    keys = torch.arange(length, device=positions.device)
    unseen = keys > positions
    if window is not None:
        unseen |= keys <= positions - window
    mask = torch.zeros(unseen.shape, dtype=dtype, device=positions.device)
    return mask.masked_fill_(unseen, float("-inf"))
