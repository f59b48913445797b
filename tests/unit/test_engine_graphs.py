"""Steps that are recorded and played back give what they would give when computed.

CUDA records on CUDA devices only; here the work itself is done again at every playing back, with
the tensors that were recorded, and writes its result to where it was. The attention is the plain
one, by pages.
"""

import warnings
from collections.abc import Callable
from typing import Any

import pytest

from tests.support.flash import documented

torch = pytest.importorskip("torch")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pytest.importorskip("transformers")
    from uellm_worker.engine.attention import SlotCache, attend
    from uellm_worker.engine.graphs import DecodeGraphs
    from uellm_worker.engine.packed import PackedStep
    from uellm_worker.engine.plan import Chunk

CPU = torch.device("cpu")
SLOTS, HEADS, SIZE = 5, 2, 4


class Again:
    """Does the work again, and puts the result where the first one was."""

    def __init__(self) -> None:
        self.recorded = 0

    def record(self, work: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        self.recorded += 1
        output = work()

        def play() -> None:
            output.copy_(work())

        return play, output


class Layer:
    """One layer of attention whose queries, keys and values are its input."""

    def __init__(self) -> None:
        self.cache = SlotCache(1, SLOTS + 1, HEADS, 16, SIZE, torch.float32, CPU)

    def __call__(self, step: PackedStep, given: Any) -> Any:
        rows = given.view(-1, HEADS, SIZE)
        keys, values = self.cache.keys[0], self.cache.values[0]
        keys[step.slots, :, step.positions] = rows
        values[step.slots, :, step.positions] = 2 * rows
        return attend(step, rows, keys, values, None, None, None).reshape(len(given), -1)


def paged(layer: Layer) -> Layer:
    """Tokens outside of heads, as the kernel wants it."""
    for tensors in (layer.cache.keys, layer.cache.values):
        tensors[0] = tensors[0].transpose(1, 2).contiguous().transpose(1, 2)
    return layer


def test_played_back_steps_are_the_computed_ones() -> None:
    torch.manual_seed(0)
    plain, recorded = Layer(), paged(Layer())
    recorder = Again()
    graphs = DecodeGraphs(recorded, documented, scratch=SLOTS, most=SLOTS, recorder=recorder)
    prompts = tuple(Chunk(slot, 0, 2 + slot, True) for slot in range(SLOTS))
    given = torch.randn(sum(chunk.count for chunk in prompts), HEADS * SIZE)
    plain(PackedStep(prompts, CPU), given)
    assert graphs.output(prompts, given) is None, "a prompt is not played back"
    recorded(PackedStep(prompts, CPU, flash=documented), given)
    for step in range(4):
        # Other slots, another number of them, and longer sequences every time.
        slots = [(0, 1, 2), (0, 2, 4), (1, 3), (0, 1, 2, 3, 4)][step]
        chunks = tuple(Chunk(slot, 2 + slot + step, 1, True) for slot in slots)
        given = torch.randn(len(chunks), HEADS * SIZE)
        for slot in range(SLOTS):
            # Where a sequence has not been computed at this step, there is a token all the same.
            for layer in (plain, recorded):
                layer.cache.keys[0][slot, :, 2 + slot + step] = step + 1.0
                layer.cache.values[0][slot, :, 2 + slot + step] = step - 1.0
        output = graphs.output(chunks, given)
        assert output is not None
        torch.testing.assert_close(output, plain(PackedStep(chunks, CPU), given))
    assert recorder.recorded == 3, "sizes 4, 2 and 5"


def test_what_cannot_be_recorded_is_computed_in_the_usual_way() -> None:
    class Refuses:
        attempts = 0

        def record(self, work: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
            self.attempts += 1
            raise RuntimeError("operation not permitted when stream is capturing")

    recorder = Refuses()
    graphs = DecodeGraphs(paged(Layer()), documented, SLOTS, SLOTS, recorder)
    for _ in range(2):
        assert graphs.output((Chunk(0, 1, 1, True),), torch.zeros(1, HEADS * SIZE)) is None
    assert recorder.attempts == 1


@pytest.mark.parametrize(
    "chunks",
    [
        (Chunk(0, 0, 1, True),),
        (Chunk(0, 3, 1, True), Chunk(1, 2, 3, True)),
        (Chunk(0, 3, 1, False),),
        (),
        tuple(Chunk(slot, 3, 1, True) for slot in range(SLOTS + 1)),
    ],
)
def test_only_decodes_of_a_known_number_are_played_back(chunks: tuple[Any, ...]) -> None:
    graphs = DecodeGraphs(paged(Layer()), documented, SLOTS, SLOTS, Again())
    assert graphs.output(chunks, torch.zeros(len(chunks), HEADS * SIZE)) is None
