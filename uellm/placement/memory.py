"""What a stage needs of its device's memory."""

from dataclasses import dataclass

from uellm.core.model import ModelProfile

WORKSPACE_BYTES = 256 << 20
"""Activations, logits and what libraries allocate, per stage."""

USABLE = 0.95
"""Share of a device's memory that a plan fills: allocators round up, and others live there too."""


@dataclass(frozen=True, slots=True)
class Need:
    """What a model needs of memory, when so many sequences of such a length run at once.

    Attributes:
        model: whose.
        slots: most sequences that run at once.
        max_tokens: longest context.
        kv_tokens: KV room of all sequences together; 0: the longest context for every slot.
        workspace_bytes: what every stage needs besides weights and KV cache.
    """

    model: ModelProfile
    slots: int
    max_tokens: int
    kv_tokens: int = 0
    workspace_bytes: int = WORKSPACE_BYTES

    @property
    def cached_tokens(self) -> int:
        """Tokens that the KV cache has room for: no more than all slots could fill."""
        most = self.slots * self.max_tokens
        return min(self.kv_tokens, most) if self.kv_tokens else most

    def layer(self, index: int) -> int:
        """Weights, KV cache and recurrent states of a layer."""
        return self.model.layers[index].weight_bytes + self.kv(index, index)

    def fixed(self, *, first: bool, last: bool) -> int:
        """What a stage needs besides its layers.

        A tied head is the embedding: stored once where both are on one device, else on both ends.
        """
        embed = self.model.embed_bytes if first else 0
        head = self.model.head_bytes if last else 0
        if first and last and self.model.tied:
            return self.workspace_bytes + max(embed, head)
        return self.workspace_bytes + embed + head

    def kv(self, first_layer: int, last_layer: int) -> int:
        """KV cache and recurrent states of a range of layers, both ends included."""
        layers = self.model.layers[first_layer : last_layer + 1]
        cache = self.cached_tokens * sum(layer.kv_bytes_per_token for layer in layers)
        return cache + self.slots * sum(layer.state_bytes for layer in layers)

    def stage(self, first_layer: int, last_layer: int) -> int:
        """All that a range of layers needs, both ends included."""
        layers = sum(self.layer(index) for index in range(first_layer, last_layer + 1))
        last = last_layer == len(self.model.layers) - 1
        return layers + self.fixed(first=first_layer == 0, last=last)

    def in_parts(self, count: int) -> int:
        """All that the model needs when it is cut into so many stages."""
        layers = sum(self.layer(index) for index in range(len(self.model.layers)))
        if count == 1:
            return layers + self.fixed(first=True, last=True)
        ends = self.fixed(first=True, last=False) + self.fixed(first=False, last=True)
        return layers + ends + (count - 2) * self.workspace_bytes
