"""Weights in a panel layout for products with few rows, whose time is that of reading the weight."""

import torch
import torch.nn.functional as F

from ..backends import Call, memory, select
from ..backends.contents import Contents, FileMappings
from . import _common
from .activation import ACTIVATIONS, bias_activation

_PANEL = 32  # output columns per panel: csrc/cpu/linear.hpp
_SCALES = 4  # extra rows of an int8 panel, which hold its scales
STORAGES = (torch.float32, torch.bfloat16, torch.int8)


def panel_rows(inner: int, dtype: torch.dtype) -> int:
    """The number of rows of each panel of a weight with `inner` inputs."""
    return inner + (_SCALES if dtype == torch.int8 else 0)


class PanelWeight:
    """A copy of a weight in panels, the layout of the kernel for few rows. For inference; made by to_panels.

    It does not follow later changes of the weight: check matches(weight), and make a new one if that is False. shape:
    (out, in). dtype: storage dtype. data: the panels (ceil(out / 32), rows, 32), or the plain weight if there is no
    kernel.
    """

    __slots__ = ("data", "dtype", "panels", "shape", "_contents")

    def __init__(self, weight: torch.Tensor, dtype: torch.dtype):
        weight = weight.detach()
        self.shape, self.dtype = weight.shape, dtype
        self._contents: Contents | None = None
        out, inner = weight.shape
        call = Call("linear_panel", weight.device.type, torch.float32, inner)
        self.panels = weight.numel() > 0 and weight.dtype != torch.float64 and select(call).name == "cpu"
        if not self.panels:
            self.data = _stored(weight, dtype)
            return
        self._contents = Contents()
        self._contents.note([weight], FileMappings())
        self.data = torch.empty((out + _PANEL - 1) // _PANEL, panel_rows(inner, dtype), _PANEL, dtype=dtype)
        rows = weight if 1 in weight.stride() or inner == 1 else weight.contiguous()
        torch.ops.transformer_fast.cpu_to_panels.default(rows, self.data)

    @classmethod
    def of_panels(cls, panels: torch.Tensor, out: int) -> "PanelWeight":
        """Wrap panels (ceil(out / 32), panel_rows(in), 32) that already exist. The result matches no weight."""
        made = object.__new__(cls)
        inner = panels.shape[1] - panel_rows(0, panels.dtype)
        made.shape, made.dtype = torch.Size((out, inner)), panels.dtype
        made.panels, made.data, made._contents = True, panels, None
        return made

    def matches(self, weight: torch.Tensor) -> bool:
        """True if to_panels would return the same for `weight` now, whatever may have written to it in the meantime.

        A weight in unwritten pages of a mapped checkpoint file is recognised by its pages. Otherwise the whole weight
        is hashed (or, without panels, converted again and compared), at the rate at which memory is read. A weight with
        other strides does not match.
        """
        weight = weight.detach()
        if self._contents is not None:
            return weight.device == self.data.device and self._contents.same([weight])
        if self.panels or weight.shape != self.shape or weight.device != self.data.device:
            return False
        return _same_bits(_stored(weight, self.dtype), self.data)

    def __repr__(self) -> str:
        return f"PanelWeight(shape={tuple(self.shape)}, dtype={self.dtype})"


def _rounded(weight: torch.Tensor) -> torch.Tensor:
    """A weight (out, in) rounded as by int8 storage, in the weight's dtype."""
    if not weight.numel():
        return weight.clone()
    wide = weight.float()
    size = wide.abs().amax(1, keepdim=True)
    inverse = 127 / size
    return ((wide * inverse.where(inverse.isfinite(), 0)).round() * (size / 127)).to(weight.dtype)


def _stored(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A copy of the weight in the storage dtype, without panels."""
    return _rounded(weight) if dtype == torch.int8 else weight.to(dtype, copy=True)


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return a.dtype == b.dtype and torch.equal(a.view(integers), b.view(integers))


def to_panels(weight: torch.Tensor, dtype: torch.dtype | None = None) -> PanelWeight:
    """Copy a weight into the panel layout for linear(x, panels) with few rows, as in decoding. Products then read it in
    memory order.

    Args:
        weight: (out, in), float16, bfloat16 or float32.
        dtype: storage dtype: torch.float32, torch.bfloat16 or torch.int8. Sums are always float32. int8 stores
            round(w / s) with s = max |w| / 127 per output. None: bfloat16 for a bfloat16 weight, else float32.

    Returns:
        A PanelWeight, for inference. It does not follow later changes of the weight: see PanelWeight.matches.

    Raises:
        TypeError, ValueError: if an argument is invalid; the message names it, its value and what is expected.

    Source:
        Goto and van de Geijn, "Anatomy of High-Performance Matrix Multiplication", 2008, for panels.

    Examples:
        >>> import torch, transformer_fast
        >>> panels = transformer_fast.to_panels(torch.randn(64, 32), torch.int8)
        >>> transformer_fast.linear(torch.randn(1, 32), panels).shape
        torch.Size([1, 64])
    """
    _common.check_floating("weight", weight)
    if weight.dim() != 2:
        raise ValueError(f"weight: wanted shape (out, in), got {tuple(weight.shape)}")
    if dtype is None:
        dtype = torch.bfloat16 if weight.dtype == torch.bfloat16 else torch.float32
    if not isinstance(dtype, torch.dtype) or dtype not in STORAGES:
        raise TypeError(f"dtype: wanted torch.float32, torch.bfloat16, torch.int8 or None, got {dtype!r}")
    return PanelWeight(weight, dtype)


def _forward(x: torch.Tensor, panels: torch.Tensor, bias: torch.Tensor | None, out: int, activation: int):
    y = memory.empty((*x.shape[:-1], out), x.dtype, x.device)
    rows = memory.unit_stride(x.reshape(-1, x.shape[-1]))
    bias = None if bias is None else bias.to(torch.float32).contiguous()
    torch.ops.transformer_fast.cpu_linear_panel.default(rows, panels, bias, activation, y.view(-1, out))
    return y


def _fake(x, panels, bias, out, activation):
    return x.new_empty((*x.shape[:-1], out))


_op = _common.define(
    "linear_panel", "(Tensor x, Tensor panels, Tensor? bias, int out, int activation) -> Tensor", _forward, _fake
)


def linear_panel(
    input: torch.Tensor, weight: PanelWeight, bias: torch.Tensor | None, activation: str | None
) -> torch.Tensor:
    """activation(x W^T + b) with a PanelWeight; see linear. Raises ValueError if a gradient is needed."""
    if torch.is_grad_enabled() and (input.requires_grad or (bias is not None and bias.requires_grad)):
        raise ValueError("weight: a PanelWeight is a snapshot for inference and has no gradient; "
                         "call under torch.no_grad()")  # fmt: skip
    autocast = _common.autocast_dtype(input.device)
    if autocast is not None and input.dtype != torch.float64:
        input = input.to(autocast)
    if not weight.panels or input.dtype == torch.float64 or input.device != weight.data.device:
        if weight.panels:
            raise TypeError(f"input: wanted a float16, bfloat16 or float32 tensor on {weight.data.device}, "
                            f"got {input.dtype} on {input.device}")  # fmt: skip
        b = None if bias is None else bias.to(input.dtype)
        if activation is None:
            return F.linear(input, weight.data.to(input.dtype), b)
        return bias_activation(F.linear(input, weight.data.to(input.dtype), b), None, activation)
    code = -1 if activation is None else ACTIVATIONS.index(activation)
    run = _forward if _common.direct(input, bias) else _op
    return run(input, weight.data, bias, weight.shape[0], code)
