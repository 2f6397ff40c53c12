"""Small random decoders as native_step describes them, and what they compute in plain PyTorch, without a cache."""

import copy
import math

import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

from transformer_fast.backends import eager
from transformer_fast.generation.native_step import StepDescription
from transformer_fast.layers import LayerWeights, TransformerSpec
from transformer_fast.layers.projection import register_transposed

register_transposed(Conv1D)
VOCABULARY, POSITIONS, OFFSET, MAX_DISTANCE = 61, 40, 2, 12


class Decoder(nn.Module):
    """As many of the options that families differ in as there are."""

    def __init__(self, *, width=24, heads=3, head_dim=8, inner=40, layers=2, pre_norm=True, rms=False, bias=True,
                 fused=False, transposed=False, gated=False, activation="gelu_tanh", positions=True, relative=False,
                 cross=False, embedding_norm=False, final_norm=True, embed_scale=1.0, head_scale=1.0, head_bias=False,
                 scale=None, scale_by_layer=False):  # fmt: skip
        super().__init__()
        self.spec = TransformerSpec(heads, head_dim, scale, True, "pre" if pre_norm else "post", activation, gated,
                                    scale_by_layer)  # fmt: skip
        self.config = {"embed_scale": embed_scale, "head_scale": head_scale}
        attention = heads * head_dim

        def linear(n, m):
            if transposed:
                module = Conv1D(m, n)
                nn.init.normal_(module.weight, std=n**-0.5)
                nn.init.normal_(module.bias)
                return module
            return nn.Linear(n, m, bias)

        def norm():
            module = nn.RMSNorm(width, 1e-6) if rms else nn.LayerNorm(width, 1e-5)
            for p in module.parameters():
                nn.init.uniform_(p, 0.5, 1.5)
            return module

        self.layers = nn.ModuleList()
        for _ in range(layers):
            inputs = {"qkv": 3} if fused else {"query": 1, "key": 1, "value": 1}
            modules = {name: linear(width, attention * n) for name, n in inputs.items()}
            modules |= {"attention_output": linear(attention, width), "attention_norm": norm(), "output_norm": norm()}
            modules |= {"up": linear(width, inner), "down": linear(inner, width)}
            if gated:
                modules["gate"] = linear(width, inner)
            if cross:
                inputs = {"cross_key_value": 2} if fused else {"cross_key": 1, "cross_value": 1}
                modules |= {name: linear(width, attention * n) for name, n in inputs.items()}
                modules |= {"cross_query": linear(width, attention), "cross_output": linear(attention, width)}
                modules["cross_norm"] = norm()
            self.layers.append(nn.ModuleDict(modules))
        self.token = nn.Embedding(VOCABULARY, width)
        self.position = nn.Embedding(POSITIONS + OFFSET, width) if positions else None
        self.relative = nn.Embedding(8, heads) if relative else None
        self.embedding_norm = norm() if embedding_norm else None
        self.final_norm = norm() if final_norm else None
        self.head = nn.Linear(width, VOCABULARY, bias=False)
        self.head.weight = self.token.weight
        self.register_buffer("head_bias", torch.randn(1, VOCABULARY) if head_bias else None)

    def step_description(self) -> StepDescription:
        return StepDescription(
            self, [LayerWeights(**dict(m.items())) for m in self.layers], self.spec, self.token, self.head,
            position=self.position, position_offset=OFFSET, embedding_norm=self.embedding_norm,
            final_norm=self.final_norm, head_bias=self.head_bias, relative_bias=self.relative,
            relative_max_distance=MAX_DISTANCE, **self.config,
        )  # fmt: skip

    def to_copy(self, dtype: torch.dtype) -> "Decoder":
        return copy.deepcopy(self).to(dtype)

    def forward(self, ids, mask=None, positions=None, states=None, states_mask=None):
        """Logits (R, T, V) of whole rows ids (R, T); mask (R, T): what is attended to beside a row's own position;
        positions: (R, T); states: (R, Se, E) with states_mask (R, Se)."""
        rows, length = ids.shape
        x = self.token(ids) * self.config["embed_scale"]
        if self.position is not None:
            positions = torch.arange(length).expand(rows, -1) if positions is None else positions
            x = x + self.position(positions + OFFSET)
        if self.embedding_norm is not None:
            x = self.embedding_norm(x)
        seen = torch.ones(length, length, dtype=torch.bool).tril().expand(rows, -1, -1)
        if mask is not None:
            seen = (seen & mask[:, None]) | torch.eye(length, dtype=torch.bool)
        bias = torch.zeros(seen.shape, dtype=x.dtype).masked_fill(~seen, -math.inf)[:, None]
        if self.relative is not None:
            distance = torch.arange(length) - torch.arange(length)[:, None]
            buckets = eager.relative_buckets(distance, self.relative.num_embeddings, MAX_DISTANCE, False)
            bias = bias + self.relative(buckets).permute(2, 0, 1)
        for index, modules in enumerate(self.layers):
            w = dict(modules.items())

            def attend(y, w=w, index=index):
                qkv = w["qkv"](y).chunk(3, -1) if "qkv" in w else [w[n](y) for n in ("query", "key", "value")]
                return w["attention_output"](self._attention(*qkv, bias, index))

            def cross(y, w=w, index=index):
                if "cross_key_value" in w:
                    kv = w["cross_key_value"](states).chunk(2, -1)
                else:
                    kv = w["cross_key"](states), w["cross_value"](states)
                hidden = None
                if states_mask is not None:
                    hidden = torch.zeros(states_mask.shape, dtype=y.dtype).masked_fill(~states_mask, -math.inf)
                    hidden = hidden[:, None, None]
                return w["cross_output"](self._attention(w["cross_query"](y), *kv, hidden, index))

            def feed_forward(y, w=w):
                gate = w["gate"](y) if "gate" in w else None
                return w["down"](eager.bias_activation(w["up"](y), None, gate, self.spec.activation))

            x = self._sublayer(w["attention_norm"], x, attend)
            if "cross_query" in w:
                x = self._sublayer(w["cross_norm"], x, cross)
            x = self._sublayer(w["output_norm"], x, feed_forward)
        if self.final_norm is not None:
            x = self.final_norm(x)
        logits = self.head(x * self.config["head_scale"])
        return logits if self.head_bias is None else logits + self.head_bias

    def _sublayer(self, norm, x, f):
        return x + f(norm(x)) if self.spec.norm_position == "pre" else norm(x + f(x))

    def _attention(self, q, k, v, bias, index):
        q, k, v = (t.unflatten(-1, (self.spec.num_heads, -1)).transpose(1, 2) for t in (q, k, v))
        scale = self.spec.scale_of(index)
        scores = q @ k.transpose(-1, -2) * (self.spec.head_dim**-0.5 if scale is None else scale)
        if bias is not None:
            scores = scores + bias
        return (F.softmax(scores, -1) @ v).transpose(1, 2).flatten(-2)


# What the families of the field ask for, by name.
FAMILIES = {
    "gpt2": {"fused": True, "transposed": True},
    "gpt2-scaled": {"fused": True, "transposed": True, "scale_by_layer": True, "activation": "gelu", "cross": True},
    "gpt": {"fused": True, "transposed": True, "pre_norm": False, "final_norm": False, "activation": "gelu"},
    "bart": {
        "pre_norm": False,
        "final_norm": False,
        "embedding_norm": True,
        "cross": True,
        "activation": "gelu",
        "head_bias": True,
    },
    "marian": {
        "pre_norm": False,
        "final_norm": False,
        "cross": True,
        "activation": "silu",
        "head_bias": True,
        "embed_scale": 24**0.5,
    },
    "t5": {
        "rms": True,
        "bias": False,
        "positions": False,
        "relative": True,
        "cross": True,
        "activation": "relu",
        "scale": 1.0,
        "head_dim": 5,
        "head_scale": 24**-0.5,
    },  # fmt: skip
    "t5-v1.1": {
        "rms": True,
        "bias": False,
        "positions": False,
        "relative": True,
        "cross": True,
        "activation": "gelu_tanh",
        "gated": True,
        "scale": 1.0,
        "head_dim": 16,
    },  # fmt: skip
    "odd": {"width": 21, "heads": 2, "head_dim": 17, "inner": 33, "gated": True, "activation": "silu", "layers": 3},
    "even": {"width": 64, "heads": 2, "head_dim": 32, "inner": 128, "cross": True, "layers": 1},
}
