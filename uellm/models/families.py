"""Which kinds of model are served, and where each keeps its parts.

A family is data: the paths of modules that a layer range is cut along, and how checkpoints name
what the modules hold. A package offers one by an entry point in group ``uellm.model_families``:
its name is the architecture's, its value a ``Family``. transformers must know the architecture.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import entry_points

GROUP = "uellm.model_families"

_EXPERTS = re.compile(r"(.+\.experts)\.(gate_up|down)_proj")


@dataclass(frozen=True, slots=True)
class Piece:
    """A tensor of a checkpoint, and where in a parameter it goes.

    Attributes:
        key: in the checkpoint.
        expert: index of the parameter's first dimension; None: the tensor is all of it.
        part: which of ``parts`` equal parts of the second dimension.
        parts: see there.
    """

    key: str
    expert: int | None = None
    part: int = 0
    parts: int = 1


@dataclass(frozen=True, slots=True)
class Family:
    """Where models of one type keep their parts.

    Paths start at ``inner`` unless said otherwise. What a stage does not hold is replaced by
    modules that pass their input on, hence each has to be an attribute of what it starts at.

    Attributes:
        model_type: as configs name it.
        inner: path of the decoder without its head.
        embedding: of the tokens.
        after_embedding: further modules of the embedding, applied to what it gives.
        positions: learned positions, which the decoder adds; "" for none.
        layers: the list of layers.
        attention: path of attention in a layer.
        head_dim: attribute of attention, its head size.
        tail: what follows the layers.
        head: path in the whole model.
        renamed: parts of names that checkpoints spell otherwise: ours and theirs.
        base: prefix that checkpoints of the bare decoder leave out.
        experts: names of an expert's gate, up and down in checkpoints that store experts one by
            one, while the modules hold them stacked; () without experts.
    """

    model_type: str
    inner: str = "model"
    embedding: str = "embed_tokens"
    after_embedding: tuple[str, ...] = ()
    positions: str = ""
    layers: str = "layers"
    attention: str = "self_attn"
    head_dim: str = "head_dim"
    tail: tuple[str, ...] = ("norm",)
    head: str = "lm_head"
    renamed: tuple[tuple[str, str], ...] = ()
    base: str = "model."
    experts: tuple[str, ...] = ()

    @property
    def embedding_weight(self) -> str:
        """Name of the embedding's weight."""
        return f"{self.inner}.{self.embedding}.weight"

    @property
    def head_weight(self) -> str:
        """Name of the head's weight."""
        return f"{self.head}.weight"

    def pieces(self, name: str, experts: int, held: Callable[[str], bool]) -> list[Piece]:
        """Which tensors of a checkpoint make up a parameter.

        Args:
            name: the parameter's.
            experts: how many there are, if it is a stack of experts' weights.
            held: whether the checkpoint holds a tensor of some name.

        Returns:
            At least one; the parameter under its own name if nothing fits.
        """
        spellings = list(self._spellings(name))
        for spelling in spellings:
            if held(spelling):
                return [Piece(spelling)]
        for spelling in spellings:
            pieces = self._of_experts(spelling, experts)
            if pieces and held(pieces[0].key):
                return pieces
        return [Piece(name)]

    def _spellings(self, name: str) -> Iterator[str]:
        theirs = name
        for ours, other in self.renamed:
            theirs = theirs.replace(ours, other)
        for spelling in dict.fromkeys((name, theirs)):
            yield spelling
            if spelling.startswith(self.base):
                yield spelling.removeprefix(self.base)

    def _of_experts(self, name: str, experts: int) -> list[Piece]:
        match = _EXPERTS.fullmatch(name)
        if match is None or not self.experts:
            return []
        gate, up, down = self.experts
        leaves = (gate, up) if match[2] == "gate_up" else (down,)
        return [
            Piece(f"{match[1]}.{expert}.{leaf}.weight", expert, part, len(leaves))
            for expert in range(experts)
            for part, leaf in enumerate(leaves)
        ]


_FAMILIES = {
    "GPT2LMHeadModel": Family(
        "gpt2",
        inner="transformer",
        embedding="wte",
        positions="wpe",
        layers="h",
        attention="attn",
        tail=("ln_f",),
        base="transformer.",
    ),
    "GPTNeoXForCausalLM": Family(
        "gpt_neox",
        inner="gpt_neox",
        embedding="embed_in",
        attention="attention",
        head_dim="head_size",
        tail=("final_layer_norm",),
        renamed=(("lm_head.", "embed_out."),),
        base="gpt_neox.",
    ),
    "Gemma2ForCausalLM": Family("gemma2"),
    "Gemma3ForCausalLM": Family("gemma3_text"),
    "GemmaForCausalLM": Family("gemma"),
    "GraniteForCausalLM": Family("granite"),
    "LlamaForCausalLM": Family("llama"),
    "MistralForCausalLM": Family("mistral"),
    "MixtralForCausalLM": Family(
        "mixtral", renamed=((".mlp.", ".block_sparse_moe."),), experts=("w1", "w3", "w2")
    ),
    "OPTForCausalLM": Family(
        "opt",
        inner="model.decoder",
        after_embedding=("project_in",),
        positions="embed_positions",
        tail=("final_layer_norm", "project_out"),
    ),
    "Olmo2ForCausalLM": Family("olmo2"),
    "Phi3ForCausalLM": Family("phi3"),
    "Qwen2ForCausalLM": Family("qwen2"),
    "Qwen3ForCausalLM": Family("qwen3"),
    "Qwen3MoeForCausalLM": Family("qwen3_moe", experts=("gate_proj", "up_proj", "down_proj")),
    "SmolLM3ForCausalLM": Family("smollm3"),
    "StableLmForCausalLM": Family("stablelm"),
    "Starcoder2ForCausalLM": Family("starcoder2"),
}
"""Architectures whose sharded answers were found equal to the whole model's."""


def architectures() -> list[str]:
    """Those that are served."""
    return sorted({*_FAMILIES, *entry_points(group=GROUP).names})


def family(architecture: str) -> Family | None:
    """The family of an architecture; None if it is not served."""
    built_in = _FAMILIES.get(architecture)
    if built_in is not None:
        return built_in
    for entry_point in entry_points(group=GROUP):
        if entry_point.name == architecture:
            offered: Family = entry_point.load()
            return offered
    return None
