"""The computation of a transformer layer (TransformerSpec) and the modules that hold its weights (LayerWeights)."""

from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import nn

__all__ = ["LayerWeights", "SlotTable", "TransformerSpec"]


@dataclass(frozen=True)
class TransformerSpec:
    """The arithmetic of a model family, the same for every layer. Dropout, which may change in training, is read from
    the modules.

    num_heads, head_dim: of the attention; its inner width is their product. scale: factor of the scores, default
        1 / sqrt(head_dim). causal: queries do not attend to later keys.
    norm_position: "post" (x = norm(x + f(x)): Vaswani et al., 2017, BERT) or "pre" (x = x + f(norm(x)): GPT-2, T5).
        The norm modules determine the kind of norm and its eps.
    activation: a name that ops.bias_activation accepts, or None to call the module in the slot `activation_fn`.
    gated: the gated unit act(x W) * (x W_gate) of T5 v1.1 (Shazeer, 2020), with W_gate in the slot `gate`. Without that
        slot `up` computes both, concatenated (ModernBERT).
    clamp_float16: replace float16 states that overflowed by the largest finite numbers: after each residual sum in
        pre-norm layers, at the end of the layer in post-norm layers.
    scale_by_layer: divide the scale of layer i by i + 1 (GPT-2's scale_attn_by_inverse_layer_idx).
    key_heads: number of key and value heads, each shared by num_heads / key_heads query heads; None: num_heads.
    parallel: x + attention(norm(x)) + feed_forward(output_norm(x)) (GPT-J, GPT-NeoX, Phi); only with norm_position
        "pre".
    softcap: scores become softcap * tanh(scores / softcap) (Gemma 2); 0 for none.
    windows: per layer, how many keys a query attends to, counting its own position and those before it; None for all.
        () means all keys in all layers. If not causal, a query attends to as many keys after its position.
    rotary_interleaved: which columns form a pair, see ops.rotary_embedding.
    qkv_by_head: the outputs of `qkv` are query, key and value of the first head, then of the second, and so on
        (GPT-NeoX); else all queries, all keys, all values.
    disentangled: scores have content and distance terms (DeBERTa), see Disentangled.
    """

    num_heads: int
    head_dim: int
    scale: float | None = None
    causal: bool = False
    norm_position: str = "post"
    activation: str | None = "gelu"
    gated: bool = False
    clamp_float16: bool = False
    scale_by_layer: bool = False
    key_heads: int | None = None
    parallel: bool = False
    softcap: float = 0.0
    windows: tuple[int | None, ...] = ()
    rotary_interleaved: bool = False
    qkv_by_head: bool = False
    disentangled: bool = False

    def __post_init__(self):
        if self.norm_position not in ("post", "pre"):
            raise ValueError(f"norm_position: wanted 'post' or 'pre', got {self.norm_position!r}")
        if self.parallel and self.norm_position != "pre":
            raise ValueError(f"parallel: needs norm_position 'pre', got {self.norm_position!r}")
        if self.num_heads % self.heads_of_keys:
            raise ValueError(f"key_heads: wanted a divisor of num_heads = {self.num_heads}, got {self.key_heads}")
        if self.qkv_by_head and self.num_heads != self.heads_of_keys:
            raise ValueError(f"key_heads: wanted {self.num_heads} with qkv_by_head, got {self.key_heads}")

    @property
    def heads_of_keys(self) -> int:
        return self.num_heads if self.key_heads is None else self.key_heads

    def window_of(self, index: int) -> int | None:
        """How many keys the queries of layer `index` attend to; None for all."""
        return self.windows[index] if self.windows else None

    def scale_of(self, index: int) -> float | None:
        """The factor of the scores of layer `index`; None for 1 / sqrt(head_dim)."""
        if not self.scale_by_layer:
            return self.scale
        return (self.head_dim**-0.5 if self.scale is None else self.scale) / (index + 1)


class LayerWeights(NamedTuple):
    """The modules of one layer by role.

    These are modules and not tensors: a wrapped (LoRA, quantised) or hooked module is called, a plain one runs by the
    fused ops. Projections are either query, key and value, or one `qkv` with their concatenated outputs; for
    cross-attention either cross_key and cross_value, or one `cross_key_value`. A dropout may be a number, the
    probability that applies now.
    """

    attention_output: nn.Module
    attention_norm: nn.Module
    up: nn.Module  # first linear of the feed-forward block
    down: nn.Module  # second linear of the feed-forward block
    output_norm: nn.Module
    query: nn.Module | None = None
    key: nn.Module | None = None
    value: nn.Module | None = None
    qkv: nn.Module | None = None
    attention_dropout: nn.Module | float | None = None  # on the attention weights
    attention_output_dropout: nn.Module | float | None = None
    output_dropout: nn.Module | float | None = None
    activation_dropout: nn.Module | float | None = None
    activation_fn: nn.Module | None = None
    gate: nn.Module | None = None
    cross_query: nn.Module | None = None
    cross_key: nn.Module | None = None
    cross_value: nn.Module | None = None
    cross_key_value: nn.Module | None = None
    cross_output: nn.Module | None = None
    cross_norm: nn.Module | None = None
    cross_dropout: nn.Module | float | None = None
    cross_output_dropout: nn.Module | float | None = None
    query_norm: nn.Module | None = None  # norm over each head, before the rotation
    key_norm: nn.Module | None = None
    attention_after_norm: nn.Module | None = None  # norm of what the sublayer adds to the residual
    output_after_norm: nn.Module | None = None
    relative_bias: nn.Module | None = None  # (buckets, heads), only for this layer's self-attention
    position_key: nn.Module | None = None  # projections of the table of distances
    position_query: nn.Module | None = None
    position_dropout: nn.Module | float | None = None


class SlotTable:
    """A family's table {slot: path of the submodule inside its layer class}. Optional slots may be absent. A path may
    end at a number: a dropout probability, which applies while the module that has it is in training mode.

    >>> SlotTable(query="attention.self.query", ...).read(layer)
    """

    def __init__(self, **paths: str):
        unknown = sorted(set(paths) - set(LayerWeights._fields))
        wanted = set(LayerWeights._fields) - set(LayerWeights._field_defaults)
        missing = sorted((wanted if "qkv" in paths else wanted | {"query", "key", "value"}) - set(paths))
        if unknown or missing:
            raise ValueError(f"slots: unknown {unknown}, missing {missing}; there are {LayerWeights._fields}")
        self._paths = {slot: tuple(path.split(".")) for slot, path in paths.items()}

    def read(self, layer: nn.Module) -> LayerWeights:
        """The LayerWeights of a layer. Read it in each forward pass, as adapters may replace submodules at any time; it
        takes microseconds."""
        found: dict[str, Any] = {}
        for slot, path in self._paths.items():
            owner: nn.Module | None = None
            module: nn.Module | None = layer
            for part in path:
                owner, module = module, None if module is None else module._modules.get(part)
            if module is not None:
                found[slot] = module
            elif owner is not None and isinstance(p := getattr(owner, path[-1], None), (int, float)):
                found[slot] = float(p) if owner.training else 0.0
        return LayerWeights(**found)
