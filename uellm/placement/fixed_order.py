"""The best cut of layers of any sizes over devices in a given order: exact, by a program."""

from collections.abc import Sequence
from itertools import accumulate

import numpy as np

from uellm.placement.arrays import Array
from uellm.placement.costs import Costs


def best_cut(
    costs: Costs,
    order: Sequence[int],
    extra: Sequence[Array] | None = None,
    pace: float = np.inf,
) -> tuple[int, ...] | None:
    """How many layers each device of an order takes, for the least seconds; None if none fit.

    Args:
        costs: of the model; its layers may differ.
        order: devices in stage order; each takes at least one layer.
        extra: [L], for each device in order: seconds for each layer, as a price of moving it there.
        pace: longest time of a stage.
    """
    num_layers, stages = costs.num_layers, len(order)
    if stages > num_layers:
        return None
    bytes_to = np.array([0, *accumulate(int(b) for b in costs.layer_bytes)])
    least: Array = np.full(num_layers + 1, np.inf)
    least[0] = 0.0
    begins = np.zeros((stages, num_layers + 1), dtype=np.int64)
    upper = np.triu(np.ones((num_layers + 1, num_layers + 1), dtype=np.bool_), 1)
    for index, device in enumerate(order):
        first, last = index == 0, index == stages - 1
        work_to = np.concatenate([[0.0], np.cumsum(costs.layer[device])])
        besides = costs.stage_total[device] + (costs.head_total[device] if last else 0.0)
        besides += costs.leader_total[device] if first else 0.0
        work = work_to[None, :] - work_to[:, None] + besides
        room = costs.room[device] - costs.need.fixed(first=first, last=last)
        # [s, e]: layers s to e - 1 on this device.
        may = upper & (bytes_to[None, :] - bytes_to[:, None] <= room) & (work <= pace)
        seconds = work
        if extra is not None:
            extra_to = np.concatenate([[0.0], np.cumsum(extra[index])])
            seconds = seconds + extra_to[None, :] - extra_to[:, None]
        total = np.where(may, least[:, None] + seconds, np.inf)
        begins[index] = total.argmin(axis=0)
        least = total.min(axis=0)
    if not np.isfinite(least[num_layers]):
        return None
    counts: list[int] = []
    end = num_layers
    for index in range(stages - 1, -1, -1):
        begin = int(begins[index, end])
        counts.append(end - begin)
        end = begin
    return tuple(reversed(counts))
