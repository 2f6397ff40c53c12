"""bias + activation (+ gate), fused: one read and one write."""

import torch

from ..backends import Backend, eager, memory, remembered, select
from ..backends.contract import Repeat
from . import _common

ACTIVATIONS = ("gelu", "gelu_tanh", "relu", "silu")


def _select(x: torch.Tensor, gated: bool) -> Backend:
    return select(("bias_activation", x.device.type, x.dtype, x.shape[-1], ("gate",) if gated else ()))


def _rows(t: torch.Tensor) -> torch.Tensor:
    if t.dim() != 2:
        t = t.reshape(-1, t.shape[-1])
    return memory.unit_stride(t)


def _forward(x: torch.Tensor, bias: torch.Tensor | None, gate: torch.Tensor | None, activation: str) -> torch.Tensor:
    return _launch(x, bias, gate, activation)[0]


def _launch(x, bias, gate, activation) -> tuple[torch.Tensor, Repeat | None]:
    """The result of _forward, and a function that makes the call again."""
    y = memory.empty_like(x)
    if not y.numel():
        return y, None
    chosen = _select(x, gate is not None)
    if x.dim() == 2 and x.stride(1) == 1 and (gate is None or gate.stride(1) == 1):
        return y, chosen.bias_activation_forward(x, bias, gate, activation, y)
    gate = None if gate is None else _rows(gate)
    return y, chosen.bias_activation_forward(_rows(x), bias, gate, activation, y.view(-1, x.shape[-1]))


def _forward_fake(x, bias, gate, activation):
    return x.new_empty(x.shape)


def _run_backward(
    grad: torch.Tensor, x: torch.Tensor, bias: torch.Tensor | None, gate: torch.Tensor | None, activation: str,
    need_bias: bool,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:  # fmt: skip
    """Gradients of x, bias and gate; None where there is no such tensor or, of the bias, where it is not needed.
    Without a bias, its gradient is what that of a bias would be."""
    return _launch_backward(grad, x, bias, gate, activation, need_bias)[0]


def _launch_backward(grad, x, bias, gate, activation, need_bias):
    """The results of _run_backward, and a function that makes the call again, if it writes exactly these."""
    width = x.shape[-1]
    chosen = _select(x, gate is not None)
    grad_x = memory.empty_like(x)
    grad_gate = None if gate is None else memory.empty_like(x)
    grad_bias = None
    if need_bias:
        summed = bias.dtype if bias is not None and chosen.narrows_parameter_gradients else _wide(x)
        grad_bias = memory.empty((width,), summed, x.device)
    repeat = None
    if grad_x.numel():
        repeat = chosen.bias_activation_backward(
            _rows(grad), _rows(x), bias, None if gate is None else _rows(gate), activation, grad_x.view(-1, width),
            grad_bias, None if grad_gate is None else grad_gate.view(-1, width),
        )  # fmt: skip
    elif grad_bias is not None:
        grad_bias.zero_()
    if grad_bias is not None and bias is not None and grad_bias.dtype != bias.dtype:
        grad_bias, repeat = grad_bias.to(bias.dtype), None
    return (grad_x, grad_bias, grad_gate), repeat


def _wide(x: torch.Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _backward_impl(
    grad: torch.Tensor,
    x: torch.Tensor,
    bias: torch.Tensor | None,
    gate: torch.Tensor | None,
    activation: str,
    need_bias: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As _run_backward, with empty tensors in place of None, for torch's dispatcher."""
    grad_x, grad_bias, grad_gate = _run_backward(grad, x, bias, gate, activation, need_bias)
    if grad_bias is None:
        grad_bias = x.new_empty(0, dtype=_wide(x) if bias is None else bias.dtype)
    return grad_x, grad_bias, x.new_empty(0) if grad_gate is None else grad_gate


def _backward_fake(grad, x, bias, gate, activation, need_bias):
    return (
        x.new_empty(x.shape),
        x.new_empty((x.shape[-1] if need_bias else 0,), dtype=_wide(x) if bias is None else bias.dtype),
        x.new_empty(x.shape if gate is not None else (0,)),
    )


_backward_op = _common.define(
    "bias_activation_backward",
    "(Tensor grad, Tensor x, Tensor? bias, Tensor? gate, str activation, bool need_bias) -> (Tensor, Tensor, Tensor)",
    _backward_impl,
    _backward_fake,
    eager=_run_backward,
)


def _setup(ctx, inputs, output):
    x, bias, gate, ctx.activation = inputs
    ctx.save_for_backward(x, bias, gate)


def _backward(ctx, need, grad):
    tensors, names = ctx.saved_tensors, ("x", "bias", "gate")
    if torch.is_grad_enabled():  # gradients of gradients run in plain PyTorch
        found = _common.gradients(lambda *t: (eager.bias_activation(*t, ctx.activation),), tensors, (grad,))
    else:
        found = _backward_op(grad, *tensors, ctx.activation, bool(need.bias))
    return dict(zip(names, found))


_op = _common.define(
    "bias_activation",
    "(Tensor x, Tensor? bias, Tensor? gate, str activation) -> Tensor",
    _forward,
    _forward_fake,
    setup_context=_setup,
    backward=_backward,
)


class _Known:
    """A kind of call that has passed its checks. repeat: launches it; None before the first call."""

    def __init__(self, activation: str):
        self.activation = activation
        self.repeat: Repeat | None = None

    def without_gradients(self, x, bias, gate) -> torch.Tensor:
        if self.repeat is None:
            y, self.repeat = _launch(x, bias, gate, self.activation)
            return y
        y = memory.empty_like(x)
        self.repeat(x, bias, gate, y)
        return y

    def with_gradients(self, x, bias, gate) -> torch.Tensor:
        return _KnownActivation.apply(x, bias, gate, self)


class _KnownActivation(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, bias, gate, known):
        ctx.known, ctx.activation = known, known.activation
        ctx.save_for_backward(x, bias, gate)
        return known.without_gradients(x, bias, gate)

    @staticmethod
    def backward(ctx, grad):
        known, need_bias = ctx.known, ctx.needs_input_grad[1]
        signature = None
        if not torch.is_grad_enabled():
            signature = _common.signature((grad,), known, need_bias)
        if signature is None:
            return _general_backward(ctx, grad)
        x, bias, gate = ctx.saved_tensors
        repeat = remembered.find(signature)
        if repeat is None:
            found, repeat = _launch_backward(grad, x, bias, gate, known.activation, need_bias)
            if repeat is not None:
                remembered.remember(signature, repeat)
            return *found, None
        grad_x = memory.empty_like(x)
        grad_gate = None if gate is None else memory.empty_like(x)
        grad_bias = memory.empty_like(bias) if need_bias else None
        repeat(grad, x, bias, gate, grad_x, grad_bias, grad_gate)
        return grad_x, grad_bias, grad_gate, None


_general_backward = _common.by_position(_backward, ("x", "bias", "gate", "known"))


def _remember(signature: tuple, x, bias, gate, activation: str) -> torch.Tensor:
    """Make the first call with this signature, and remember how."""
    chosen, needed = _select(x, gate is not None), signature[0]
    if chosen.name == "cpu" and not needed:

        def on_the_cpu(x, bias, gate):
            return chosen.bias_activation(x, bias, gate, activation)

        remembered.remember(signature, on_the_cpu)
        return on_the_cpu(x, bias, gate)
    if chosen.name in ("cpu", "eager") and needed:
        remembered.remember(signature, lambda x, bias, gate: _op(x, bias, gate, activation))
        return _op(x, bias, gate, activation)
    known = _Known(activation)
    call = known.with_gradients if needed else known.without_gradients
    y = call(x, bias, gate)
    if known.repeat is not None:
        remembered.remember(signature, call)
    return y


def bias_activation(
    input: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str = "gelu",
    *,
    gate: torch.Tensor | None = None,
) -> torch.Tensor:
    """y = act(x + bias), or act(x + bias) * gate.

    Args:
        input: (..., N), float16, bfloat16, float32 (or float64 in plain PyTorch).
        bias: (N,), floating point.
        activation: "gelu" (erf), "gelu_tanh", "relu" or "silu".
        gate: the shape and dtype of input, for gated units as in T5 v1.1. input and gate may be column slices of one
            wider tensor.

    Returns:
        A tensor of input's shape and dtype. All tensors get gradients, which are deterministic.

    Raises:
        TypeError, ValueError: if an argument is invalid; the message names it, its value and what is expected.

    Source:
        Hendrycks and Gimpel, "Gaussian Error Linear Units", 2016; Shazeer, "GLU Variants Improve Transformer", 2020.

    Examples:
        >>> import torch, transformer_fast
        >>> transformer_fast.bias_activation(torch.randn(4, 8), torch.zeros(8), "gelu_tanh").shape
        torch.Size([4, 8])
    """
    signature = None
    if type(activation) is str:
        signature = _common.signature((input, bias, gate), activation)
        if signature is not None:
            known = remembered.find(signature)
            if known is not None:
                return known(input, bias, gate)
    _common.check_floating("input", input)
    if input.dim() == 0:
        raise ValueError("input: wanted at least one dimension, got a scalar")
    _common.check_choice("activation", activation, ACTIVATIONS)
    if bias is not None:
        _common.check_vector("bias", bias, input.shape[-1], input)
    if gate is not None:
        _common.check_floating("gate", gate)
        _common.check_same("gate", gate, "input", input)
        if gate.shape != input.shape:
            raise ValueError(f"gate: wanted the shape of input {tuple(input.shape)}, got {tuple(gate.shape)}")
    if _common.transformed():
        return eager.bias_activation(input, bias, gate, activation)
    if signature is not None and input.numel():
        return _remember(signature, input, bias, gate, activation)
    if not _common.direct(input, bias, gate):
        return _op(input, bias, gate, activation)
    return _forward(input, bias, gate, activation)
