"""Continuous execution: in every step everybody decodes who can, and prompts take what is left.

As many steps are under way as the replica has stages, each of another group of slots; a sequence is
in the next step as soon as it has a token to compute (Yu et al., "Orca", OSDI 2022; prompts in
chunks: Agrawal et al., "Sarathi-Serve", arXiv 2403.02310).
"""

from collections.abc import Callable

from uellm.policy.views import StepDecision
from uellm_worker.engine.capacity import Capacity
from uellm_worker.engine.flights import Padding, Share
from uellm_worker.engine.kv import KvManager
from uellm_worker.engine.roster import Roster


class Continuous:
    """See ``uellm_worker.engine.execution.Execution``.

    Args:
        capacity: of the replica.
        depth: steps under way at once.
    """

    def __init__(self, capacity: Capacity, depth: int) -> None:
        self.name = "continuous"
        self.depth = depth
        self.admits = True
        self._capacity = capacity
        self._steps = 0
        self._last_step = [-1] * min(depth, capacity.slots)

    def account(self) -> KvManager:
        """See ``Execution``."""
        capacity = self._capacity
        return KvManager(
            capacity.slots,
            capacity.max_tokens,
            capacity.kv_tokens,
            capacity.block_tokens,
            spare_slots=capacity.spare_slots,
            groups=len(self._last_step),
            sharing=capacity.sharing,
        )

    def next_step(
        self, roster: Roster, decision: StepDecision, rows: int, burden: Callable[[int], int]
    ) -> tuple[list[Share], list[Padding]]:
        """See ``Execution``. It is the turn of the group with the least burden.

        Of these, the one that waits longest.
        """
        groups = {roster.kv.group(s.slot) for s in roster.running if s.ready}
        for group in sorted(groups, key=lambda g: (burden(g), self._last_step[g])):
            if shares := self._shares_of(group, roster, decision, rows):
                self._last_step[group] = self._steps
                self._steps += 1
                return shares, []
        return [], []

    def start_again(self) -> None:
        """See ``Execution``."""

    def _shares_of(
        self, group: int, roster: Roster, decision: StepDecision, rows: int
    ) -> list[Share]:
        """What a step of a group computes: decodes in slot order, then prefill as decided."""
        members = [s for s in roster.running if s.ready and roster.kv.group(s.slot) == group]
        prompts = [s for s in members if not s.decoding]
        decodes = sorted((s for s in members if s.decoding), key=lambda s: s.slot)
        for sequence in decodes:
            roster.make_room(sequence)
        # Room for one may have come from another.
        shares = [Share.next_of(sequence, 1) for sequence in decodes if sequence.slot >= 0]
        # Prompt tokens of one of the steps that are under way together.
        chunk = -(-decision.chunk_tokens // self.depth)
        budget = min(chunk, rows - len(shares))
        for sequence in decision.prefill_order(prompts):
            if sequence.slot < 0:
                continue
            if budget <= 0:
                break
            share = Share.next_of(sequence, budget)
            if roster.kv.grow(share.chunk.slot, share.token_ids):
                shares.append(share)
                budget -= share.chunk.count
        return shares
