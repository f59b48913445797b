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


Number = Callable[..., int]
"""Gives the config's number under the first of some keys that is set."""


@dataclass(frozen=True, slots=True)
class State:
    """A tensor that a recurrent layer keeps for each sequence.

    Attributes:
        shape: for one sequence, by the numbers of the config.
        float32: whatever else is computed in.
    """

    shape: Callable[[Number], tuple[int, ...]]
    float32: bool = False


@dataclass(frozen=True, slots=True)
class Recurrence:
    """Layers of a hybrid model that carry a state of fixed size, and no keys and values.

    Paths start at the layer.

    Attributes:
        marker: what these layers have and those with attention have not.
        mixer: the module that carries the state.
        adapter: what computes it, as ``package.module:Class``: a
            ``uellm_worker.engine.recurrent.Mixer`` that is made of transformers' module.
        states: what it keeps.
    """

    marker: str
    mixer: str
    adapter: str
    states: tuple[State, ...]


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
        layers_give_pairs: what a layer gives is the first of two.
        attention: path of attention in a layer.
        head_dim: attribute of attention, its head size.
        fused: path in attention of a projection to queries, keys and values, from whose size the
            number of key heads is taken; "": the config's ``num_key_value_heads``.
        adapter: what computes attention that does not go through transformers' attention
            interface, as ``package.module:Class``; it is made of transformers' module.
        recurrence: layers without attention; None: there are none.
        multipliers: attributes of the decoder that it multiplies its input by.
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
    layers_give_pairs: bool = False
    attention: str = "self_attn"
    head_dim: str = "head_dim"
    fused: str = ""
    adapter: str = ""
    recurrence: Recurrence | None = None
    multipliers: tuple[str, ...] = ()
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

    @staticmethod
    def kv_heads(heads: int, head_dim: int, fused_rows: int) -> int:
        """Key heads behind a projection to queries, keys and values of so many numbers."""
        return (fused_rows // head_dim - heads) // 2

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


def _lfm2_inputs(number: Number) -> tuple[int, ...]:
    return number("conv_L_cache") - 1, number("hidden_size")


def _griffin_inputs(number: Number) -> tuple[int, ...]:
    return number("conv1d_width") - 1, *_griffin_hidden(number)


def _griffin_hidden(number: Number) -> tuple[int, ...]:
    return (number("lru_width", "hidden_size"),)


def _mamba2_inputs(number: Number) -> tuple[int, ...]:
    inner = number("mamba_expand") * number("hidden_size")
    channels = inner + 2 * number("mamba_n_groups") * number("mamba_d_state")
    return number("mamba_d_conv") - 1, channels


def _mamba2_hidden(number: Number) -> tuple[int, ...]:
    heads = number("mamba_n_heads")
    inner = number("mamba_expand") * number("hidden_size")
    return heads, inner // heads, number("mamba_d_state")


_GRIFFIN = Recurrence(
    marker="temporal_block.rg_lru",
    mixer="temporal_block",
    adapter="uellm_worker.engine.recurrent:RealGatedRecurrence",
    states=(State(_griffin_inputs), State(_griffin_hidden, float32=True)),
)
_MAMBA2 = Recurrence(
    marker="mamba",
    mixer="mamba",
    adapter="uellm_worker.engine.mamba2:StateSpace",
    states=(State(_mamba2_inputs), State(_mamba2_hidden, float32=True)),
)
_SHORT_CONVOLUTION = Recurrence(
    marker="conv",
    mixer="conv",
    adapter="uellm_worker.engine.recurrent:ShortConvolution",
    states=(State(_lfm2_inputs),),
)
_GATED = ("gate_proj", "up_proj", "down_proj")
_NUMBERED = ("w1", "w3", "w2")
_STACKED = (
    (".router.weight", ".router.layer.weight"),
    (".experts.gate_up_proj", ".input_linear.weight"),
    (".experts.down_proj", ".output_linear.weight"),
)
_SCALED = ("embedding_multiplier",)
_FAMILIES = {
    "ApertusForCausalLM": Family("apertus"),
    "ArceeForCausalLM": Family("arcee"),
    "BambaForCausalLM": Family(
        "bamba", layers_give_pairs=True, tail=("final_layernorm",), recurrence=_MAMBA2
    ),
    "Cohere2ForCausalLM": Family("cohere2"),
    "CohereForCausalLM": Family("cohere"),
    "CwmForCausalLM": Family("cwm"),
    "Dots1ForCausalLM": Family("dots1", experts=_GATED),
    "Ernie4_5ForCausalLM": Family("ernie4_5"),
    "Ernie4_5_MoeForCausalLM": Family(
        "ernie4_5_moe", experts=_GATED, renamed=((".gate.moe_statics.", ".moe_statics."),)
    ),
    "Exaone4ForCausalLM": Family("exaone4"),
    "FalconForCausalLM": Family(
        "falcon",
        inner="transformer",
        embedding="word_embeddings",
        layers="h",
        layers_give_pairs=True,
        attention="self_attention",
        fused="query_key_value",
        adapter="uellm_worker.engine.falcon:PackedFalconAttention",
        tail=("ln_f",),
        base="transformer.",
    ),
    "FlexOlmoForCausalLM": Family("flex_olmo", experts=_GATED),
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
    "GPTBigCodeForCausalLM": Family(
        "gpt_bigcode",
        inner="transformer",
        embedding="wte",
        positions="wpe",
        layers="h",
        attention="attn",
        fused="c_attn",
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
    "Glm4ForCausalLM": Family("glm4"),
    "Glm4MoeForCausalLM": Family("glm4_moe", experts=_GATED),
    "GlmForCausalLM": Family("glm"),
    "GraniteForCausalLM": Family("granite", multipliers=_SCALED),
    "GraniteMoeForCausalLM": Family("granitemoe", multipliers=_SCALED, renamed=_STACKED),
    "GraniteMoeHybridForCausalLM": Family(
        "granitemoehybrid", multipliers=_SCALED, renamed=_STACKED, recurrence=_MAMBA2
    ),
    "GraniteMoeSharedForCausalLM": Family(
        "granitemoeshared", multipliers=_SCALED, renamed=_STACKED
    ),
    "HeliumForCausalLM": Family("helium"),
    "HunYuanDenseV1ForCausalLM": Family("hunyuan_v1_dense"),
    "HyperCLOVAXForCausalLM": Family("hyperclovax", multipliers=_SCALED),
    "Jais2ForCausalLM": Family("jais2"),
    "Lfm2ForCausalLM": Family("lfm2", tail=("embedding_norm",), recurrence=_SHORT_CONVOLUTION),
    "Lfm2MoeForCausalLM": Family(
        "lfm2_moe", tail=("embedding_norm",), recurrence=_SHORT_CONVOLUTION, experts=_NUMBERED
    ),
    "LlamaForCausalLM": Family("llama"),
    "Ministral3ForCausalLM": Family("ministral3"),
    "MinistralForCausalLM": Family("ministral"),
    "MistralForCausalLM": Family("mistral"),
    "MixtralForCausalLM": Family(
        "mixtral", renamed=((".mlp.", ".block_sparse_moe."),), experts=_NUMBERED
    ),
    "NemotronForCausalLM": Family("nemotron"),
    "OPTForCausalLM": Family(
        "opt",
        inner="model.decoder",
        after_embedding=("project_in",),
        positions="embed_positions",
        tail=("final_layer_norm", "project_out"),
    ),
    "Olmo2ForCausalLM": Family("olmo2"),
    "Olmo3ForCausalLM": Family("olmo3"),
    "OlmoForCausalLM": Family("olmo"),
    "OlmoeForCausalLM": Family("olmoe", experts=_GATED),
    "PersimmonForCausalLM": Family("persimmon", tail=("final_layernorm",)),
    "Phi3ForCausalLM": Family("phi3"),
    "PhiForCausalLM": Family("phi", tail=("final_layernorm",)),
    "PhimoeForCausalLM": Family(
        "phimoe",
        renamed=((".mlp.router.", ".block_sparse_moe.gate."), (".mlp.", ".block_sparse_moe.")),
        experts=_NUMBERED,
    ),
    "Qwen2ForCausalLM": Family("qwen2"),
    "Qwen2MoeForCausalLM": Family("qwen2_moe", experts=_GATED),
    "Qwen3ForCausalLM": Family("qwen3"),
    "Qwen3MoeForCausalLM": Family("qwen3_moe", experts=_GATED),
    "RecurrentGemmaForCausalLM": Family(
        "recurrent_gemma",
        attention="temporal_block",
        tail=("final_norm",),
        recurrence=_GRIFFIN,
        multipliers=("normalizer",),
    ),
    "SeedOssForCausalLM": Family("seed_oss"),
    "SmolLM3ForCausalLM": Family("smollm3"),
    "SolarOpenForCausalLM": Family("solar_open", experts=_GATED),
    "StableLmForCausalLM": Family("stablelm"),
    "Starcoder2ForCausalLM": Family("starcoder2"),
    "VaultGemmaForCausalLM": Family("vaultgemma"),
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
