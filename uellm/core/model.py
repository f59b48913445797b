"""What a model needs, as plain data; read from a checkpoint by ``uellm.models.profile``."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class LayerProfile:
    """One layer's needs.

    Attributes:
        weight_bytes: its weights as they are held: in the compute dtype, or quantised.
        kv_bytes_per_token: KV cache for one token, in the compute dtype.
        flops_per_token: work for one token, attention over the context aside.
        state_bytes: recurrent state of one sequence, however long it is.
    """

    weight_bytes: int
    kv_bytes_per_token: int
    flops_per_token: float
    state_bytes: int = 0


@dataclass(frozen=True, slots=True)
class ModelProfile:
    """A model's needs; see ``uellm.v1.ModelProfile``."""

    layers: tuple[LayerProfile, ...]
    embed_bytes: int
    head_bytes: int
    tied: bool
    activation_bytes_per_token: int
    max_tokens: int
    vocab_size: int
    hidden_size: int
    architecture: str = ""
    stored_dtype: str = ""

    @property
    def kv_bytes_per_token(self) -> int:
        """KV cache for one token over all layers."""
        return sum(layer.kv_bytes_per_token for layer in self.layers)

    @property
    def state_bytes(self) -> int:
        """Recurrent state of one sequence over all layers."""
        return sum(layer.state_bytes for layer in self.layers)

    @property
    def flops_per_token(self) -> float:
        """Work for one token over all layers and the head, attention aside."""
        head = 2.0 * self.hidden_size * self.vocab_size
        return sum(layer.flops_per_token for layer in self.layers) + head

    @property
    def weight_bytes(self) -> int:
        """All weights, a tied head counted once."""
        head = 0 if self.tied else self.head_bytes
        return sum(layer.weight_bytes for layer in self.layers) + self.embed_bytes + head
