"""The backend interface: the raw methods that a backend may override, and `Call`, which describes a call to select for.

A backend supports an op when it overrides the method that `METHODS` names for the op. A new op needs a method here, a
line in `METHODS`, an override in eager.py (its definition in plain PyTorch) and an override in each backend with a
kernel for it.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from . import memory
from .specs import (
    AdditiveAttentionSpec,
    AttentionSpec,
    CrossEntropySpec,
    EmbeddingSpec,
    NormSpec,
    RecurrenceSpec,
    RecurrentStepSpec,
    RotaryAppendSpec,
)

Tensor = torch.Tensor
# Makes a call again. Takes the tensors in the order of the spec or the method, then the buffers. For attention: query,
# key, value, cu_seqlens (of queries and keys) and rng, the only tensors of its spec; in the backward pass grad_out, out
# and lse; then the buffers; the strides must be the same too. Returns False, and does nothing, if the settings on which
# the call depends have changed.
Repeat = Callable[..., object]

METHODS = {
    "additive_attention": "additive_attention_forward",
    "attention": "attention_forward",
    "bias_activation": "bias_activation_forward",
    "cross_entropy": "cross_entropy_forward",
    "dropout": "dropout_forward",
    "embedding_layer_norm": "embedding_layer_norm_forward",
    "norm": "norm_forward",
    "recurrence": "recurrence_forward",
    "recurrent_step": "recurrent_step",
    "rotary_embedding": "rotary_embedding",
}
# Matrix products. ops/linear.py and ops/linear_panel.py call their kernels directly; backends only answer why_not.
PRODUCTS = ("linear", "linear_panel")
OPS = tuple(sorted((*METHODS, *PRODUCTS)))


class Call(NamedTuple):
    """What a backend needs to know to decide whether it can run a call.

    Attributes:
        op: one of OPS.
        device: torch's device type.
        dtype: dtype of the data.
        size: head dim of attention, normalised width of norms, and so on.
        features: sorted names, e.g. ("causal", "dropout"); "backward" for the gradients of attention.
        length: the larger of the numbers of queries and keys, rounded up to a power of two; 0 where no selection
            depends on it.
    """

    op: str
    device: str
    dtype: torch.dtype
    size: int
    features: tuple[str, ...] = ()
    length: int = 0


class Backend:
    """One implementation of the ops.

    Raw methods write into buffers that the op has allocated. None instead of a buffer means that the result is not
    needed. Those of norms, activations and attention may return a Repeat, which makes the call again on other tensors
    that are contiguous, of any number of dimensions, and have the same dtypes, sizes and alignment to 16 bytes.

    The specs are those of specs.py; their data has unit stride along the last dimension.
    """

    name = ""
    products: frozenset[str] = frozenset()
    # Whether norm_backward and bias_activation_backward write the gradients of the parameters in the dtype of the
    # tensors they get, rounded once from float32; else these tensors must be float32.
    narrows_parameter_gradients = False

    # ---- selection ---------------------------------------------------------------------------------
    def why_not(self, call: Call) -> tuple[str, ...]:
        """Every reason why this backend cannot run the call; empty when it can."""
        raise NotImplementedError

    def detour(self, call: Call) -> str:
        """Why this backend, though it can run the call, is slow at it. Other backends are then tried first."""
        return ""

    def status(self) -> str:
        """Whether this backend is active on this machine, for `transformer-fast info`."""
        return "active"

    @classmethod
    def ops(cls) -> frozenset[str]:
        """The ops of this backend: those whose method it overrides, and its matrix products."""
        found = {op for op, method in METHODS.items() if getattr(cls, method) is not getattr(Backend, method)}
        return frozenset(found | cls.products)

    # ---- attention ---------------------------------------------------------------------------------
    def attention_forward(self, spec: AttentionSpec, out: Tensor, lse: Tensor) -> Repeat | None:
        raise NotImplementedError

    def attention_append(self, spec: AttentionSpec, key: Tensor, value: Tensor, out: Tensor, lse: Tensor) -> None:
        """Append key and value to the caches in place, then run attention_forward on the caches.

        spec.key and spec.value (B, key heads, capacity, D) are the caches; spec.key_lengths (B,) rows of each sequence
        are in use before the append.
        """
        assert spec.key_lengths is not None
        sequences = torch.arange(key.shape[0], device=key.device)[:, None]
        rows = spec.key_lengths[:, None] + torch.arange(key.shape[2], device=key.device)
        for cache, new in ((spec.key, key), (spec.value, value)):
            cache.transpose(1, 2)[sequences, rows] = new.transpose(1, 2)
        spec = spec._replace(key_lengths=spec.key_lengths + key.shape[2])
        self.attention_forward(spec, out, lse)

    def attention_backward(
        self, spec: AttentionSpec, grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor, dq: Tensor,
        dk: Tensor, dv: Tensor, dbias: Tensor | None, dtable: Tensor | None,
    ) -> Repeat | None:  # fmt: skip
        raise NotImplementedError

    def additive_attention_forward(self, spec: AdditiveAttentionSpec, out: Tensor, weights: Tensor) -> None:
        raise NotImplementedError

    def additive_attention_backward(
        self, spec: AdditiveAttentionSpec, grad_out: Tensor, grad_weights: Tensor | None, weights: Tensor,
        grad_query: Tensor, grad_key: Tensor, grad_value: Tensor, grad_score: Tensor,
    ) -> None:  # fmt: skip
        raise NotImplementedError

    # ---- norms and row-wise ops ----------------------------------------------------------------------
    def norm_forward(
        self, spec: NormSpec, y: Tensor, sum_out: Tensor | None, mean: Tensor | None, rstd: Tensor | None
    ) -> Repeat | None:
        raise NotImplementedError

    def norm_backward(
        self, spec: NormSpec, grad_y: Tensor, grad_sum: Tensor | None, mean: Tensor | None, rstd: Tensor,
        grad_v: Tensor, grad_x: Tensor | None, grad_weight: Tensor | None, grad_bias: Tensor | None,
    ) -> Repeat | None:  # fmt: skip
        raise NotImplementedError

    def norm(
        self, x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, rng: Tensor | None,
        eps: float, rms: bool, dropout_p: float, need_sum: bool,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """norm_forward without gradients, for contiguous tensors; returns (y, sum or None). Only the CPU backend has
        it, where a small call costs less than the preparations for norm_forward."""
        raise NotImplementedError

    def bias_activation_forward(
        self, x: Tensor, bias: Tensor | None, gate: Tensor | None, activation: str, y: Tensor
    ) -> Repeat | None:
        raise NotImplementedError

    def bias_activation_backward(
        self, grad: Tensor, x: Tensor, bias: Tensor | None, gate: Tensor | None, activation: str, grad_x: Tensor,
        grad_bias: Tensor | None, grad_gate: Tensor | None,
    ) -> Repeat | None:  # fmt: skip
        raise NotImplementedError

    def bias_activation(self, x: Tensor, bias: Tensor | None, gate: Tensor | None, activation: str) -> Tensor:
        """bias_activation_forward without gradients, for contiguous tensors. Only the CPU backend has it, as `norm`."""
        raise NotImplementedError

    def dropout_forward(self, x: Tensor, rng: Tensor, p: float, y: Tensor) -> None:
        raise NotImplementedError

    def rotary_embedding(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        positions: Tensor | None,
        interleaved: bool,
        inverse: bool,
        y: Tensor,
    ) -> None:
        raise NotImplementedError

    def rotary_append(self, spec: RotaryAppendSpec, y: Tensor) -> None:
        """Write the normed and rotated queries to y, and append the normed and rotated keys and the values to the
        caches in place. This default runs one op after the other."""
        length, device = spec.query.shape[1], spec.query.device
        rows = spec.cache_lengths[:, None].long() + torch.arange(length, device=device)
        positions = rows if spec.positions is None else spec.positions
        keys = memory.empty(tuple(spec.key.shape), spec.key.dtype, device)
        for x, weight, out in ((spec.query, spec.query_weight, y), (spec.key, spec.key_weight, keys)):
            if weight is not None:
                flat = x.reshape(-1, x.shape[-1])
                normed = memory.empty(tuple(flat.shape), flat.dtype, device)
                self.norm_forward(
                    NormSpec(flat, None, weight, None, None, spec.eps, True, 0.0), normed, None, None, None
                )
                x = normed.view(x.shape)
            self.rotary_embedding(x, spec.cos, spec.sin, positions, spec.interleaved, False, out)
        sequences = torch.arange(len(rows), device=device)[:, None]
        for cache, new in ((spec.key_cache, keys), (spec.value_cache, spec.value)):
            cache.transpose(1, 2)[sequences, rows] = new

    def embedding_layer_norm_forward(self, spec: EmbeddingSpec, y: Tensor, mean: Tensor, rstd: Tensor) -> None:
        raise NotImplementedError

    def embedding_layer_norm_backward(
        self, spec: EmbeddingSpec, grad: Tensor, mean: Tensor, rstd: Tensor, grad_word: Tensor | None,
        grad_position: Tensor | None, grad_type: Tensor | None, grad_weight: Tensor | None, grad_bias: Tensor | None,
    ) -> None:  # fmt: skip
        raise NotImplementedError

    # ---- recurrent layers ----------------------------------------------------------------------------
    def recurrence_forward(
        self, spec: RecurrenceSpec, out: Tensor, last: Tensor, last_memory: Tensor | None, saved: Tensor | None,
        memories: Tensor | None,
    ) -> None:  # fmt: skip
        raise NotImplementedError

    def recurrence_backward(
        self, spec: RecurrenceSpec, grads: Sequence[Tensor | None], out: Tensor, saved: Tensor, memories: Tensor,
        grad_gates: Tensor, grad_weight: Tensor, grad_bias: Tensor, grad_hidden: Tensor, grad_memory: Tensor,
    ) -> None:  # fmt: skip
        """grads: the gradients to out, the last hidden state and the last memory. A buffer is an empty tensor where
        the spec has no such input."""
        raise NotImplementedError

    def recurrent_step(
        self, spec: RecurrentStepSpec, logits: Tensor, hidden: Tensor, memory: Tensor | None, feed: Tensor | None
    ) -> None:
        """One step of a recurrent decoder, without gradients."""
        raise NotImplementedError

    # ---- losses --------------------------------------------------------------------------------------
    def cross_entropy_forward(self, spec: CrossEntropySpec, losses: Tensor, largest: Tensor, total: Tensor) -> None:
        raise NotImplementedError

    def cross_entropy_backward(
        self, spec: CrossEntropySpec, grad_losses: Tensor, largest: Tensor, total: Tensor, grad: Tensor
    ) -> None:
        raise NotImplementedError
