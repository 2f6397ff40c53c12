"""Small random decoders with a step description: their result in plain PyTorch without a cache, and by the native
step."""

import copy
import math

import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

from transformer_fast.backends import eager
from transformer_fast.generation import StepDescription
from transformer_fast.generation.native_step import NativeStepper
from transformer_fast.generation.stepper import Prompt
from transformer_fast.layers import LayerWeights, TransformerSpec
from transformer_fast.layers.projection import register_transposed
from transformer_fast.ops.decoder_step import DecoderCache, DecoderCopies, DecoderWeights

register_transposed(Conv1D)
VOCABULARY, POSITIONS, OFFSET, MAX_DISTANCE = 61, 40, 2, 12


class Decoder(nn.Module):
    """A decoder with all the options in which families differ."""

    def __init__(self, *, width=24, heads=3, head_dim=8, inner=40, layers=2, pre_norm=True, rms=False, bias=True,
                 fused=False, transposed=False, gated=False, activation="gelu_tanh", positions=True, relative=False,
                 cross=False, embedding_norm=False, final_norm=True, embed_scale=1.0, head_scale=1.0, head_bias=False,
                 scale=None, scale_by_layer=False, key_heads=None, rotary=0, interleaved=False, head_norms=False,
                 by_head=False, after_norms=False, parallel=False, softcap=0.0, logits_softcap=0.0,
                 windows=()):  # fmt: skip
        super().__init__()
        self.spec = TransformerSpec(
            heads, head_dim, scale, True, "pre" if pre_norm else "post", activation, gated,
            scale_by_layer=scale_by_layer, key_heads=key_heads, parallel=parallel, softcap=softcap, windows=windows,
            rotary_interleaved=interleaved, qkv_by_head=by_head,
        )  # fmt: skip
        self.config = {"embed_scale": embed_scale, "head_scale": head_scale, "logits_softcap": logits_softcap}
        self.rotary = rotary  # number of rotated pairs of columns
        attention, keys = heads * head_dim, self.spec.heads_of_keys * head_dim

        def linear(n, m):
            if transposed:
                module = Conv1D(m, n)
                nn.init.normal_(module.weight, std=n**-0.5)
                nn.init.normal_(module.bias)
                return module
            return nn.Linear(n, m, bias)

        def norm(n=width):
            module = nn.RMSNorm(n, 1e-6) if rms else nn.LayerNorm(n, 1e-5)
            for p in module.parameters():
                nn.init.uniform_(p, 0.5, 1.5)
            return module

        self.layers = nn.ModuleList()
        for _ in range(layers):
            inputs = {"query": attention, "key": keys, "value": keys}
            modules = {
                name: linear(width, n) for name, n in ({"qkv": attention + 2 * keys} if fused else inputs).items()
            }
            if head_norms:
                modules |= {"query_norm": norm(head_dim), "key_norm": norm(head_dim)}
            if after_norms:
                modules |= {"attention_after_norm": norm(), "output_after_norm": norm()}
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
            relative_max_distance=MAX_DISTANCE, rotary=self.angles if self.rotary else None, **self.config,
        )  # fmt: skip

    def angles(self, positions: int) -> tuple[torch.Tensor, torch.Tensor]:
        angle = torch.arange(positions)[:, None] * 10.0 ** -torch.linspace(0, 2, self.rotary)
        return angle.cos(), angle.sin()

    def to_copy(self, dtype: torch.dtype) -> "Decoder":
        return copy.deepcopy(self).to(dtype)

    def forward(self, ids, mask=None, positions=None, states=None, states_mask=None):
        """Logits (R, T, V) of whole rows ids (R, T). mask: (R, T), the positions that are attended to, besides a
        query's own position. positions: (R, T). states: (R, Se, E), with states_mask (R, Se)."""
        rows, length = ids.shape
        x = self.token(ids) * self.config["embed_scale"]
        positions = torch.arange(length).expand(rows, -1) if positions is None else positions
        if self.position is not None:
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
                keys = self.spec.heads_of_keys * self.spec.head_dim
                if self.spec.qkv_by_head:
                    qkv = [t.flatten(-2) for t in w["qkv"](y).unflatten(-1, (-1, 3, self.spec.head_dim)).unbind(-2)]
                elif "qkv" in w:
                    qkv = w["qkv"](y).split((self.spec.num_heads * self.spec.head_dim, keys, keys), -1)
                else:
                    qkv = [w[n](y) for n in ("query", "key", "value")]
                qkv = self._placed(w, *qkv, positions)
                return w["attention_output"](self._attention(*qkv, bias, index, self.spec.window_of(index)))

            def cross(y, w=w, index=index):
                if "cross_key_value" in w:
                    kv = w["cross_key_value"](states).chunk(2, -1)
                else:
                    kv = w["cross_key"](states), w["cross_value"](states)
                hidden = None
                if states_mask is not None:
                    hidden = torch.zeros(states_mask.shape, dtype=y.dtype).masked_fill(~states_mask, -math.inf)
                    hidden = hidden[:, None, None]
                return w["cross_output"](self._attention(w["cross_query"](y), *kv, hidden, index, None))

            def feed_forward(y, w=w):
                gate = w["gate"](y) if "gate" in w else None
                return w["down"](eager.bias_activation(w["up"](y), None, gate, self.spec.activation))

            if self.spec.parallel:
                x = x + attend(w["attention_norm"](x)) + feed_forward(w["output_norm"](x))
                continue
            x = self._sublayer(w["attention_norm"], x, attend, w.get("attention_after_norm"))
            if "cross_query" in w:
                x = self._sublayer(w["cross_norm"], x, cross)
            x = self._sublayer(w["output_norm"], x, feed_forward, w.get("output_after_norm"))
        if self.final_norm is not None:
            x = self.final_norm(x)
        logits = self.head(x * self.config["head_scale"])
        logits = logits if self.head_bias is None else logits + self.head_bias
        return capped(logits, self.config["logits_softcap"])

    def _sublayer(self, norm, x, f, after=None):
        if self.spec.norm_position == "post":
            return norm(x + f(x))
        return x + (f(norm(x)) if after is None else after(f(norm(x))))

    def _placed(self, w, q, k, v, positions):
        """Apply the norm per head and the rotation to queries and keys."""

        def place(t, norm):
            t = t.unflatten(-1, (-1, self.spec.head_dim))
            t = t if norm is None else norm(t)
            if self.rotary:
                tables = self.angles(POSITIONS)
                t = eager.rotary_embedding(t, *tables, positions, self.spec.rotary_interleaved, False)
            return t.flatten(-2)

        return place(q, w.get("query_norm")), place(k, w.get("key_norm")), v

    def _attention(self, q, k, v, bias, index, window):
        q, k, v = (t.unflatten(-1, (-1, self.spec.head_dim)).transpose(1, 2) for t in (q, k, v))
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
        scale = self.spec.scale_of(index)
        scores = q @ k.transpose(-1, -2) * (self.spec.head_dim**-0.5 if scale is None else scale)
        scores = capped(scores, self.spec.softcap)
        if bias is not None:
            scores = scores + bias
        if window is not None:
            scores = scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).tril(-window), -math.inf)
        return (F.softmax(scores, -1) @ v).transpose(1, 2).contiguous().flatten(-2)  # Conv1D takes views


def capped(x, softcap):
    return softcap * torch.tanh(x / softcap) if softcap else x


# The options of known families.
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
    "mbart": {"embedding_norm": True, "cross": True, "activation": "gelu", "head_bias": True, "embed_scale": 24**0.5},
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
    "llama": {
        "rms": True,
        "bias": False,
        "positions": False,
        "gated": True,
        "activation": "silu",
        "rotary": 4,
        "heads": 4,
        "key_heads": 2,
    },
    "qwen3": {
        "rms": True,
        "bias": False,
        "positions": False,
        "gated": True,
        "activation": "silu",
        "rotary": 8,
        "heads": 4,
        "key_heads": 1,
        "head_dim": 16,
        "head_norms": True,
    },
    "mistral": {
        "rms": True,
        "bias": False,
        "positions": False,
        "gated": True,
        "activation": "silu",
        "rotary": 4,
        "windows": (3, None),
    },
    "gemma2": {
        "rms": True,
        "bias": False,
        "positions": False,
        "gated": True,
        "rotary": 4,
        "heads": 4,
        "key_heads": 2,
        "after_norms": True,
        "softcap": 0.5,
        "logits_softcap": 0.7,
        "windows": (3, None),
        "embed_scale": 24**0.5,
        "scale": 0.3,
    },
    "neox": {"positions": False, "fused": True, "by_head": True, "rotary": 2, "parallel": True, "activation": "gelu"},
    "by head, without angles": {"fused": True, "by_head": True},
    "phi": {"positions": False, "rotary": 2, "parallel": True, "head_norms": True},
    "gpt-neo": {"scale": 1.0, "windows": (None, 3)},
    "gptj": {"positions": False, "rotary": 3, "interleaved": True, "parallel": True},
    "even": {"width": 64, "heads": 2, "head_dim": 32, "inner": 128, "cross": True, "layers": 1},
}


# ---- the native step -------------------------------------------------------------------------------
def rounded(weight: torch.Tensor, storage: torch.dtype, out: int) -> torch.Tensor:
    """A weight rounded as by the storage dtype. out: the dimension of its outputs."""
    if storage == torch.bfloat16:
        return weight.bfloat16().to(weight.dtype)
    scale = 2.0 ** (weight.abs().amax(1 - out, keepdim=True) / 127).log2().ceil()
    levels = (weight / scale).round()
    levels.select(1 - out, 0).fill_(127.0)  # the largest: the scale is then a power of two
    return levels * scale


def round_weights(model: Decoder, storage: torch.dtype) -> None:
    """Set the weights of all projections to small numbers that the storage dtype represents exactly."""
    tensors = model.step_description().tensors()
    for p in tensors.projections():
        for w in p.weights:
            w.data.copy_(rounded(w.data.float(), storage, 1 if p.transposed else 0) / 32)


def random_mask(rows: int, length: int) -> torch.Tensor:
    """A mask with padding on the left, on the right and in between; the last column of row 0 is kept."""
    mask = torch.rand(rows, length) > 0.3
    mask[0, -1] = True
    return mask


def weights_of(model: Decoder, storage: torch.dtype | None = None, copy: bool = True) -> DecoderWeights:
    tensors = model.step_description().tensors()
    return DecoderWeights(tensors, DecoderCopies(tensors, storage) if copy else None)


def make_cache(model, ids, states=None, states_mask=None, storage=None, copy=True, capacity=2) -> DecoderCache:
    """An empty DecoderCache for the rows of ids (R, T). Row r attends to the encoder's states of sequence r."""
    rows = ids.shape[0]
    cache = DecoderCache(weights_of(model, storage, copy), rows, capacity, None if states is None else states.shape[:2])
    if states is not None:
        inputs = {"encoder_outputs": (states,), "attention_mask": states_mask}
        NativeStepper(model, Prompt(ids, inputs=inputs))._load_encoder(cache, states)
        cache.sources.copy_(torch.arange(rows))
    return cache


def walk(model, cache: DecoderCache, ids, mask=None, positions=None) -> torch.Tensor:
    """Logits (R, n, V) by the native step, for the columns of ids (R, T) from the cache's length on. positions: (R, T);
    None: the columns."""
    found = []
    for t in range(cache.length, ids.shape[1]):
        at = None
        if model.position is not None or model.rotary:
            at = torch.full((len(ids),), t) if positions is None else positions[:, t].contiguous()
            at = at if model.position is None else at + OFFSET
        cache.cover(t + 1 + OFFSET)
        found.append(cache.step(ids[:, t], at).clone())
        if mask is not None:
            cache.table[: len(ids), t].masked_fill_(~mask[:, t], -1)
    return torch.stack(found, 1)


def decode(model: Decoder, ids, mask=None, **more) -> torch.Tensor:
    """Logits (R, T, V) by the native step, column by column. more: arguments of make_cache."""
    return walk(model, make_cache(model, ids, **more), ids, mask)
