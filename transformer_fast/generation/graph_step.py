"""Decoding on a GPU as one captured CUDA graph per token. Not yet run on a GPU.

Every tensor of a step keeps its address: tokens, positions and lengths as inputs, logits as output, and the caches, to
which attention appends in place. The first step runs kernel by kernel, the second is captured, and the following ones
replay the graph, so a step is one launch instead of a few hundred. On the CPU (in tests) the same steps run without a
capture.
"""

import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from .. import ops
from ..layers import Rotary, StackCall, Unpadding, normed_input, transformer_layer
from ..layers.projection import linear, norm
from .described_step import DescribedStepper
from .model_step import ModelStepper
from .prompts import encoder_states, kept_columns, kept_first
from .step_description import StepDescription
from .stepper import Prompt

__all__ = ["GraphStepper"]


class AppendedCache:
    """Keys and values of all layers, (layers, 2, rows, H, capacity, D), to which attention appends.

    lengths: (rows,) int32, positions in use per row. filled: lengths after the current step. layers.transformer_layer
    calls `attend` of a cache that has it; cross_attention_cache and is_updated are those of an EncoderDecoderCache.
    """

    def __init__(self, store: torch.Tensor, lengths: torch.Tensor, cross: Any):
        self.store, self.lengths, self.filled = store, lengths, lengths + 1
        self.cross_attention_cache = cross
        self.is_updated = {} if cross is None else dict.fromkeys(range(len(cross.layers)), True)

    def attend(self, query, key, value, index: int, place: dict[str, Any] | None, **options) -> torch.Tensor:
        """Append one position per row and attend to all positions of the row, or to those of a window.

        query, key, value: (rows, H, 1, D). place: arguments of ops.rotary_cache_append if queries and keys have not
        been rotated yet, else None. options: of attention. Returns (rows, H, 1, D).
        """
        keys, values = self.store[index]
        if place is None:
            return ops.kv_cache_attention(query, key, value, keys, values, self.lengths, **options)
        query = ops.rotary_cache_append(query, key, value, keys, values, self.lengths, **place)
        return ops.scaled_dot_product_attention(
            query, keys, values, key_lengths=self.filled, causal_alignment="bottom_right", enable_gqa=True, **options
        )


_NORMS = ("attention_norm", "cross_norm", "output_norm", "query_norm", "key_norm", "attention_after_norm",
          "output_after_norm")  # fmt: skip


def _ready(module: Any) -> Any:
    """A norm for many steps. If its factor is 1 + weight (Gemma), an RMSNorm whose weight is that sum."""
    if not getattr(module, "adds_one", False):
        return module
    made = nn.RMSNorm(tuple(module.weight.shape), module.eps, device="meta")
    made.weight = nn.Parameter(1.0 + module.weight.float(), requires_grad=False)
    return made


def _is_on_the_left(padding: torch.Tensor) -> bool:
    """Whether all padding precedes the tokens of its row. padding: (B, S) bool."""
    return bool((padding[:, :-1] | ~padding[:, 1:]).all())


class GraphStepper(DescribedStepper):
    """A Stepper that replays a CUDA graph per token."""

    anywhere = False  # tests set it to True to run without a capture on the CPU

    def __init__(self, model: Any, prompt: Prompt):
        super().__init__(model, prompt)
        self._replay: Callable[[], None] | None = None
        self._steps = 0
        self._angles: tuple[torch.Tensor, ...] = ()
        self._sharing = prompt.copies  # rows per set of encoder keys

    @classmethod
    def _why_not_on(cls, device: torch.device) -> str:
        return "" if device.type == "cuda" or cls.anywhere else f"device {device} has no CUDA graphs"

    @classmethod
    def _why_not_described(cls, description: StepDescription, prompt: Prompt) -> str:
        kept, device = kept_columns(prompt), prompt.input_ids.device
        if description.relative_bias is not None and not bool(kept.all()):
            return "relative positions count padding, which this cache does not store"
        if any(description.spec.windows) and not _is_on_the_left(~kept):
            return "windows count the padding after tokens, which this cache does not store"
        reason = description.why_not_modules()
        if reason:
            return reason
        away = {str(t.device) for t in description.tensors().sources()} - {str(device)}
        return f"weights are on {', '.join(sorted(away))} and the prompt on {device}" if away else ""

    # ---- Stepper -----------------------------------------------------------------------------------
    def start(self) -> torch.Tensor:
        prompt, description = self._prompt, self._description
        inner = ModelStepper(self._model, replace(prompt, copies=1, max_length=0))
        logits = inner.start()
        pairs, device, row = inner.key_values(), prompt.input_ids.device, self._prompt_of_row()
        kept = kept_columns(prompt)
        order, self._lengths = kept_first(kept)
        self._lengths = self._lengths[row]
        batch, heads, self._length, dim = pairs[0][0].shape
        self._shortest = int(kept.sum(1).min())  # reordering never moves positions before this
        store = pairs[0][0].new_empty((len(pairs), 2, prompt.rows, heads, self._room(self._length), dim))
        by_prompt = store.unflatten(2, (batch, prompt.copies))
        for index, pair in enumerate(pairs):
            for kind, states in enumerate(pair):
                if order is not None:
                    states = states.take_along_dim(order[:, None, :, None], 2)
                by_prompt[index, kind, :, :, :, : self._length] = states[:, None]
        cross, cross_lengths = self._cross(inner)
        self._cache = AppendedCache(store, self._lengths, cross)
        self._tokens = torch.zeros(prompt.rows, dtype=torch.int64, device=device)
        self._begin_positions()
        if self._positions is not None:
            self._positions = self._positions[row].contiguous()
        states = encoder_states(prompt)
        relative = description.relative_bias
        self._call = StackCall(
            replace(description.spec, causal=False),
            Unpadding(prompt.rows, 1),
            encoder_states=states,  # only enables cross-attention: its keys and values are in the cache
            encoder_lengths=cross_lengths,
            relative_bias=None
            if relative is None
            else ops.RelativeBias(relative.weight, description.relative_max_distance, False),
        )
        self._layers = [w._replace(**{n: _ready(getattr(w, n)) for n in _NORMS}) for w in description.layers]
        self._final_norm = _ready(description.final_norm)
        self._cover_angles()
        self._logits: torch.Tensor | None = None
        return logits

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        self._check_position()
        if self._length == self._cache.store.shape[4]:
            self._grow()
        position, rows = self._description.position, self._last + self._description.position_offset
        if hasattr(position, "cover") and rows >= position.weight.shape[0]:
            position.cover(2 * position.weight.shape[0])
            self._forget()
        self._cover_angles()
        self._tokens.copy_(tokens)
        if self._replay is None and self._steps and self._tokens.is_cuda:
            self._replay = self._captured()
        (self._replay or self._run)()
        self._steps += 1
        self._length += 1
        self._last += 1
        assert self._logits is not None
        return self._logits

    def reorder(self, index: torch.Tensor) -> None:
        part = self._cache.store[:, :, :, :, self._shortest : self._length]
        part.copy_(part.index_select(2, index))

    def keep(self, index: torch.Tensor) -> None:
        # A graph's tensors have fixed addresses and shapes, so this needs new tensors and a new graph.
        store = self._cache.store.index_select(2, index)
        self._lengths, self._tokens = (t.index_select(0, index) for t in (self._lengths, self._tokens))
        if self._positions is not None:
            self._positions = self._positions.index_select(0, index)
        self._place_angles()
        cross = self._cache.cross_attention_cache
        if cross is not None:
            self._spread_cross(cross, index)
        self._cache = AppendedCache(store, self._lengths, cross)
        self._call.unpadding = Unpadding(len(index), 1)
        self._forget()

    def key_values(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        store = self._cache.store[:, :, :, :, : self._length]
        kept = kept_columns(self._prompt)
        if not bool(kept.all()):  # move positions back to their columns, with zeros for the prompt's padding
            kept = torch.nn.functional.pad(kept, (0, self._length - kept.shape[1]), value=True)[self._prompt_of_row()]
            place = (kept.cumsum(1) - 1).clamp(min=0)[None, None, :, None, :, None]
            store = store.take_along_dim(place, 4) * kept[:, None, :, None]
        return [(pair[0], pair[1]) for pair in store]

    # ---- one step ----------------------------------------------------------------------------------
    def _run(self) -> None:
        description, cache = self._description, self._cache
        x = description.token.weight[self._tokens][:, None]
        if description.embed_scale != 1:
            x = x * description.embed_scale
        if description.position is not None:
            rows = description.positions(self._tokens, self._positions)  # type: ignore[arg-type]
            x = x + description.position.weight[rows][:, None]
        if description.embedding_norm is not None:
            x = norm(description.embedding_norm, x)
        states = () if self._call.encoder_states is None else (self._call.encoder_states,)
        cache.filled = cache.lengths + 1
        pre = description.spec.norm_position == "pre"
        following = [*(w.attention_norm for w in self._layers[1:]), self._final_norm]
        for index, weights in enumerate(self._layers):
            self._call.following = following[index] if pre else None
            x = transformer_layer(weights, x, self._call, index, False, cache, *states)
        if self._final_norm is not None:
            x = normed_input(self._final_norm, x, self._call)
        x = x[:, 0] if description.head_scale == 1 else x[:, 0] * description.head_scale
        logits = linear(description.head, x)
        if description.head_bias is not None:
            logits = logits + description.head_bias.view(-1)
        if description.logits_softcap:
            logits = description.logits_softcap * torch.tanh(logits / description.logits_softcap)
        if self._logits is None:
            self._logits = torch.empty_like(logits)
        self._logits.copy_(logits)
        self._lengths += 1
        if self._positions is not None:
            self._positions += 1

    def _cover_angles(self) -> None:
        """Make sure that the rotary tables, if there are any, cover the next position."""
        rotary, have = self._description.rotary, self._call.rotary
        if rotary is None or (have is not None and have.cos.shape[0] > self._last):  # type: ignore[union-attr]
            return
        device = self._tokens.device
        self._angles = tuple(t.to(device, torch.float32).contiguous() for t in rotary(self._room(self._last + 1)))
        self._place_angles()
        self._forget()

    def _place_angles(self) -> None:
        if self._description.rotary is not None:
            self._call.rotary = Rotary(*self._angles, self._positions[:, None])  # type: ignore[call-arg, index]

    def _captured(self) -> Callable[[], None]:
        """A function that replays one captured step, or that runs it kernel by kernel if it cannot be captured."""
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                self._run()
        except RuntimeError as error:
            warnings.warn(f"a decoding step could not be captured; steps are launched kernel by kernel: {error}",
                          stacklevel=2)  # fmt: skip
            return self._run
        return graph.replay

    def _forget(self) -> None:
        self._replay, self._logits, self._steps = None, None, 0

    def _grow(self) -> None:
        store = self._cache.store
        shape = (*store.shape[:4], store.shape[4] + self.growth, store.shape[5])
        self._cache.store = store.new_empty(shape)
        self._cache.store[:, :, :, :, : self._length] = store
        self._forget()

    # ---- the encoder ---------------------------------------------------------------------------------
    def _cross(self, inner: ModelStepper) -> tuple[Any, torch.Tensor | None]:
        """The encoder's keys and values, and how many of them each prompt attends to; (None, None) without an
        encoder."""
        if inner._cross is None or encoder_states(self._prompt) is None:
            return None, None
        cross, (order, lengths) = inner._cross.cross_attention_cache, self._kept_encoder()
        if order is None:
            return cross, None
        for layer in cross.layers:
            layer.keys, layer.values = (
                t.take_along_dim(order[:, None, :, None], 2) for t in (layer.keys, layer.values)
            )
        return cross, lengths

    def _spread_cross(self, cross: Any, index: torch.Tensor) -> None:
        """Give each row its own set of encoder keys and values: row r gets those of row index[r]."""
        source, self._sharing = index // self._sharing, 1
        for layer in cross.layers:
            layer.keys, layer.values = layer.keys.index_select(0, source), layer.values.index_select(0, source)
        if self._call.encoder_lengths is not None:
            self._call.encoder_lengths = self._call.encoder_lengths.index_select(0, source)
