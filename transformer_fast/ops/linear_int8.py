"""y = activation(x W^T + b) in int8 arithmetic. Weights are quantised once, the rows of x in every call."""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from ..backends import eager_int8, memory, native
from . import _common
from .activation import ACTIVATIONS

__all__ = [
    "GROUP",
    "GROUPS",
    "LONG_GROUP",
    "Int8BlockWeights",
    "Int8Norm",
    "Int8Weight",
    "attention_dtype",
    "group_of",
    "int8_block",
    "linear_int8",
    "quantize_weight",
]

GROUP = 128  # inputs per scale
LONG_GROUP = 256  # faster with many rows
GROUPS = (32, 64, GROUP, LONG_GROUP)
_WIDE = 768  # narrower weights lose too much accuracy with LONG_GROUP
_PANEL = 32  # output columns per panel: csrc/cpu/linear_int8.hpp
_ops = torch.ops.transformer_fast


class Int8Weight:
    """A weight (out, in) in int8, for inference: w[n, k] = scale[n, k // group] * q[n, k], q in -127..127.

    shape: (out, in). data: the weight in the layout of the kernels, or None if there is no kernel; then q and scale are
    kept instead.
    """

    __slots__ = ("data", "group", "shape", "_parts")

    def __init__(self, q: torch.Tensor, scale: torch.Tensor, group: int = GROUP):
        """q: int8 (out, in); scale: float32 (out, ceil(in / group)). Raises TypeError or ValueError for anything
        else."""
        if q.dtype != torch.int8 or q.dim() != 2:
            raise TypeError(f"q: wanted an int8 tensor (out, in), got {q.dtype} {tuple(q.shape)}")
        _check_group(group)
        wanted = (q.shape[0], eager_int8.groups(q.shape[1], group))
        if tuple(scale.shape) != wanted or scale.dtype != torch.float32:
            raise ValueError(f"scale: wanted float32 {wanted}, got {scale.dtype} {tuple(scale.shape)}")
        if not bool(scale.isfinite().all()):
            raise ValueError("scale: wanted finite numbers, got NaN or infinity")
        self.shape, self.group = q.shape, group
        self.data: torch.Tensor | None = None
        self._parts: tuple[torch.Tensor, torch.Tensor] | None = (q, scale)
        if q.device.type != "cpu" or not q.numel() or native.load():
            return
        self.data = torch.empty(_panels_shape(q.shape, group), dtype=torch.int8)
        _ops.cpu_int8_to_panels.default(q.contiguous(), scale.contiguous(), group, self.data)
        self._parts = None

    @classmethod
    def of(cls, weight: torch.Tensor, group: int = GROUP) -> "Int8Weight":
        """Quantise a floating-point weight (out, in). Raises ValueError if it is not finite."""
        _common.check_floating("weight", weight)
        if weight.dim() != 2:
            raise ValueError(f"weight: wanted shape (out, in), got {tuple(weight.shape)}")
        _check_group(group)
        return cls(*quantize_weight(weight, group), group)

    def parts(self) -> tuple[torch.Tensor, torch.Tensor]:
        """q int8 (out, in) and scale float32 (out, ceil(in / group))."""
        if self._parts is not None:
            return self._parts
        q = torch.empty(self.shape, dtype=torch.int8)
        scale = torch.empty((self.shape[0], eager_int8.groups(self.shape[1], self.group)))
        _ops.cpu_int8_from_panels.default(self.data, self.group, q, scale)
        return q, scale

    def __repr__(self) -> str:
        return f"Int8Weight(shape={tuple(self.shape)}, group={self.group})"


def group_of(inner: int, longest: int) -> int:
    """The group for a weight with `inner` inputs: `longest`, but LONG_GROUP only if the weight is wide and is divided
    into whole groups."""
    fits = longest != LONG_GROUP or (inner >= _WIDE and inner % LONG_GROUP == 0)
    return longest if fits else GROUP


def _check_group(group: int) -> None:
    if group not in GROUPS:
        raise ValueError(f"group: wanted one of {', '.join(map(str, GROUPS))}, got {group}")


def _panels_shape(shape: torch.Size, group: int) -> tuple[int, int]:
    out, inner = shape
    return -(-out // _PANEL), -(-inner // 4) * 4 * _PANEL + eager_int8.groups(inner, group) * 8 * _PANEL


def quantize_weight(weight: torch.Tensor, group: int = GROUP) -> tuple[torch.Tensor, torch.Tensor]:
    """weight (out, in), any strides -> q int8 (out, in), scale float32 (out, groups)."""
    weight = weight.detach()
    if weight.device.type != "cpu" or weight.dtype == torch.float64 or not weight.numel() or native.load():
        return eager_int8.quantize_weight(weight, group)
    q = torch.empty(weight.shape, dtype=torch.int8)
    scale = torch.empty((weight.shape[0], eager_int8.groups(weight.shape[1], group)))
    _ops.cpu_quantize_weight.default(weight, group, q, scale)
    return q, scale


# ---- products --------------------------------------------------------------------------------------
def _rows(x: torch.Tensor) -> torch.Tensor:
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(-1) == 1 or rows.shape[1] == 1 else rows.contiguous()


def _wide(t: torch.Tensor | None) -> torch.Tensor | None:
    if t is None or (t.dtype is torch.float32 and t.is_contiguous()):  # most are, and a layer has ten of these
        return t
    return t.detach().to(torch.float32).contiguous()


def _forward(x, panels, biases, outs, group, activation, dtype):
    y = memory.empty((*x.shape[:-1], sum(outs)), dtype, x.device)
    if y.numel():
        _ops.cpu_linear_int8.default(_rows(x), panels, biases, outs, group, activation, y.view(-1, y.shape[-1]))
    return y


def _fake(x, panels, biases, outs, group, activation, dtype):
    return x.new_empty((*x.shape[:-1], sum(outs)), dtype=dtype)


_op = _common.define(
    "linear_int8",
    "(Tensor x, Tensor[] panels, Tensor?[] biases, int[] outs, int group, int activation, ScalarType dtype) -> Tensor",
    _forward,
    _fake,
)


def linear_int8(
    input: torch.Tensor,
    weights: Int8Weight | Sequence[Int8Weight],
    biases: torch.Tensor | None | Sequence[torch.Tensor | None] = None,
    activation: str | None = None,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """activation(x W^T + b) in int8. Each row of x is quantised in groups of inputs, with a scale and a zero point
    each.

    The sums within a group are exact in int32. They are added in float32 in the same order everywhere, so without an
    activation every machine gives the same bits. A row with NaN or infinity gives NaN.

    Args:
        input: (..., in), float16, bfloat16 or float32.
        weights: one weight, or up to three with the same input width and group; their outputs are concatenated.
        biases: (out,) or None for each weight.
        activation: None or one of bias_activation's names.
        dtype: dtype of the result; default input's.

    Returns:
        (..., out), out being the sum of the weights' outputs.

    Raises:
        TypeError, ValueError: with the name of the argument; also if a gradient is needed.
    """
    weights = [weights] if isinstance(weights, Int8Weight) else list(weights)
    biases = [biases] if biases is None or isinstance(biases, torch.Tensor) else list(biases)
    biases = biases * len(weights) if len(biases) == 1 else biases
    _check(input, weights, biases, activation)
    dtype = input.dtype if dtype is None else dtype
    outs, group = [w.shape[0] for w in weights], weights[0].group
    panels = [w.data for w in weights]
    if input.device.type == "cpu" and all(p is not None for p in panels) and input.dtype != torch.float64:
        code = -1 if activation is None else ACTIVATIONS.index(activation)
        return _op(input, panels, [_wide(b) for b in biases], outs, group, code, dtype)
    rows = input.reshape(-1, input.shape[-1])
    found = []
    for w, b in zip(weights, biases):
        q, scale = (t.to(input.device) for t in w.parts())
        found.append(eager_int8.finish(eager_int8.linear_int8(rows, q, scale, group), b, activation, dtype))
    return torch.cat(found, -1).view(*input.shape[:-1], sum(outs))


def _check(input, weights, biases, activation) -> None:
    _common.check_floating("input", input)
    if not 1 <= len(weights) <= 3 or len(biases) != len(weights):
        raise ValueError(f"weights, biases: wanted one to three each, got {len(weights)} and {len(biases)}")
    first = weights[0]
    for w, b in zip(weights, biases):
        if w.shape[1] != first.shape[1] or w.group != first.group:
            raise ValueError(f"weights: wanted one input width and group, got {', '.join(map(repr, weights))}")
        if b is not None and tuple(b.shape) != (w.shape[0],):
            raise ValueError(f"biases: wanted shape ({w.shape[0]},), got {tuple(b.shape)}")
    if not input.dim() or input.shape[-1] != first.shape[1]:
        raise ValueError(f"input: wanted shape (..., {first.shape[1]}) as the weight is {tuple(first.shape)}, "
                         f"got {tuple(input.shape)}")  # fmt: skip
    _common.check_choice("activation", activation, (None, *ACTIVATIONS))
    if torch.is_grad_enabled() and (input.requires_grad or any(b is not None and b.requires_grad for b in biases)):
        raise ValueError("input: int8 weights have no gradient and pass none on; call under torch.no_grad(), or train "
                         "the model before it is quantised")  # fmt: skip


def attention_dtype(x: torch.Tensor) -> torch.dtype | None:
    """The dtype for queries, keys and values that come from int8 products: bfloat16 if the processor multiplies it, as
    its rounding is far below the quantisation error; else None, for x's own dtype."""
    fast = x.dtype == torch.float32 and x.device.type == "cpu" and native.multiplies_bfloat16()
    return torch.bfloat16 if fast else None


# ---- the part of a layer after attention ---------------------------------------------------------
class Int8Norm(NamedTuple):
    """weight, bias: (E,) or None."""

    weight: torch.Tensor | None
    bias: torch.Tensor | None
    eps: float


class Int8BlockWeights(NamedTuple):
    """The weights of int8_block. biases: of output, up, gate, down. attention_norm: None in a pre-norm layer. rms: both
    norms are RMS norms."""

    output: Int8Weight
    up: Int8Weight
    gate: Int8Weight | None
    down: Int8Weight
    biases: tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]
    attention_norm: Int8Norm | None
    output_norm: Int8Norm
    rms: bool
    activation: str

    def why_not(self) -> str:
        """'' if there is a kernel for these weights, else the reason why not."""
        weights = [w for w in (self.output, self.up, self.gate, self.down) if w is not None]
        if any(w.data is None for w in weights):
            return native.load() or "a weight is not on the CPU"
        if self.gate is not None and self.gate.group != self.up.group:
            return "up and gate have different group sizes"
        return ""


def _block_forward(
    context, residual, panels, biases, feed_forward, groups, norms, eps, rms, activation
):  # fmt: skip
    y = memory.empty(residual.shape, residual.dtype, residual.device)
    if y.numel():
        _ops.cpu_int8_block.default(
            _rows(context), _rows(residual), panels, biases, feed_forward, groups, norms, eps, rms, activation,
            y.view(-1, y.shape[-1]),
        )  # fmt: skip
    return y


def _block_fake(context, residual, panels, biases, feed_forward, groups, norms, eps, rms, activation):
    return residual.new_empty(residual.shape)


_block_op = _common.define(
    "int8_block",
    "(Tensor context, Tensor residual, Tensor?[] panels, Tensor?[] biases, int feed_forward, int[] groups, "
    "Tensor?[] norms, float[] eps, bool rms, int activation) -> Tensor",
    _block_forward,
    _block_fake,
)


def int8_block(context: torch.Tensor, residual: torch.Tensor, w: Int8BlockWeights) -> torch.Tensor:
    """The part of a transformer layer after attention, in one pass over the rows.

    With r = residual + context W_output^T and f(x) = (activation(x W_up^T) [* x W_gate^T]) W_down^T, a post-norm layer
    (attention_norm is given) returns output_norm(x + f(x)) with x = attention_norm(r). A pre-norm layer returns
    r + f(output_norm(r)). context: (..., heads * D); residual: (..., E). Products are those of linear_int8. w.why_not()
    must be ''. Returns (..., E) in residual's dtype.
    """

    weights = (w.output, w.up, w.gate, w.down)
    first, second = w.attention_norm, w.output_norm
    norms = [None, None] if first is None else [first.weight, first.bias]
    norms = [_wide(t) for t in (*norms, second.weight, second.bias)]
    panels = [None if t is None else t.data for t in weights]
    return _block_op(
        context, residual, panels, [_wide(b) for b in w.biases], w.up.shape[0],
        [w.output.group, w.up.group, w.down.group], norms, [-1.0 if first is None else first.eps, second.eps], w.rms,
        ACTIVATIONS.index(w.activation),
    )  # fmt: skip
