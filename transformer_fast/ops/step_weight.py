"""A weight that is used in every step of a loop. It is laid out once, and its gradient is one product over all
steps."""

import torch
from torch.autograd.function import once_differentiable

from ..backends import gemm
from .linear_panel import PanelWeight, linear_panel, to_panels

__all__ = ["StepWeight", "gru_step", "lstm_step"]


class StepWeight:
    """y_t = x_t W^T for the steps t of one pass. Make a new one for each pass; it can be called at most `steps` times.

    In every step torch would add an outer product of the weight's size to the gradient. Here each step only stores its
    rows, and the backward pass computes one product. Differentiable once. weight: (out, in), on the CPU, float32,
    bfloat16 or float16; x_t: (rows, in) of the same dtype.
    """

    def __init__(self, weight: torch.Tensor, steps: int, rows: int):
        self._weight = weight.detach()
        self._panels = to_panels(self._weight, torch.float32)
        self._back: PanelWeight | None = None
        self.inputs: list[torch.Tensor] = []
        self._places: tuple[torch.Tensor, ...] = ()
        if weight.requires_grad and torch.is_grad_enabled():
            self._places = _Shared.apply(self.inputs, weight, steps, rows)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if not torch.is_grad_enabled():
            return self.product(x)
        place = self._places[len(self.inputs)] if self._places else None
        self.inputs.append(x.detach())
        return _Step.apply(self, x, place)

    def product(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return linear_panel(x, self._panels, None, None)

    def back(self, grad: torch.Tensor) -> torch.Tensor:
        if self._back is None:
            self._back = to_panels(self._weight.t(), torch.float32)
        with torch.no_grad():
            return linear_panel(grad, self._back, None, None)


class _Shared(torch.autograd.Function):
    """The weight's node in the autograd graph. It outputs one placeholder per step, without memory of its own, through
    which autograd passes the gradient of that step."""

    @staticmethod
    def forward(ctx, inputs, weight, steps, rows):
        ctx.inputs = inputs
        ctx.set_materialize_grads(False)
        return tuple(weight.new_empty(1).expand(rows, weight.shape[0]) for _ in range(steps))

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        pairs = [(g, x) for g, x in zip(grads, ctx.inputs) if g is not None]
        if not pairs:
            return None, None, None, None
        g, x = (torch.cat(rows) for rows in zip(*pairs))
        if g.dtype == torch.float32 and not gemm.why_not_onednn():
            return None, gemm.gradient(g.t(), x.t()), None, None
        return None, g.t() @ x, None, None


class _Step(torch.autograd.Function):
    @staticmethod
    def forward(ctx, owner, x, place):
        ctx.owner = owner
        return owner.product(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        grad = grad.contiguous()
        back = ctx.owner.back(grad) if ctx.needs_input_grad[1] else None
        return None, back, grad


class _Gru(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gates, products, hidden):
        width = hidden.shape[1]
        both = torch.sigmoid(gates[:, : 2 * width] + products[:, : 2 * width])
        reset, update = both.split(width, 1)
        fresh = torch.tanh(torch.addcmul(gates[:, 2 * width :], reset, products[:, 2 * width :]))
        ctx.save_for_backward(both, fresh, products, hidden)
        return torch.lerp(fresh, hidden, update)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        both, fresh, products, hidden = ctx.saved_tensors
        width = hidden.shape[1]
        reset, update = both.split(width, 1)
        grad_gates = torch.empty_like(products)
        back, slope = grad * update, both * (1 - both)
        new = (grad - back) * (1 - fresh * fresh)
        torch.mul(new * products[:, 2 * width :], slope[:, :width], out=grad_gates[:, :width])
        torch.mul(grad * (hidden - fresh), slope[:, width:], out=grad_gates[:, width : 2 * width])
        grad_gates[:, 2 * width :] = new
        grad_products = grad_gates.clone()
        grad_products[:, 2 * width :].mul_(reset)
        return grad_gates, grad_products, back


class _Lstm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gates, memory):
        width = memory.shape[1]
        kept = torch.sigmoid(gates)
        kept[:, 2 * width : 3 * width] = torch.tanh(gates[:, 2 * width : 3 * width])
        enter, stay, new, leave = kept.split(width, 1)
        after = torch.addcmul(stay * memory, enter, new)
        bent = torch.tanh(after)
        ctx.save_for_backward(kept, memory, bent)
        return leave * bent, after

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, grad_after):
        kept, memory, bent = ctx.saved_tensors
        width = memory.shape[1]
        enter, stay, new, leave = kept.split(width, 1)
        along = torch.addcmul(grad_after, grad * leave, 1 - bent * bent)
        slope = kept * (1 - kept)
        slope[:, 2 * width : 3 * width] = 1 - new * new
        grad_gates = torch.cat((along * new, along * memory, along * enter, grad * bent), 1).mul_(slope)
        return grad_gates, along * stay


def gru_step(gates: torch.Tensor, products: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    """The next hidden state (B, H) of a GRU. gates, products: (B, 3 * H), the contributions of the input and of the
    hidden state to the gates r, z, n."""
    return _Gru.apply(gates, products, hidden)


def lstm_step(gates: torch.Tensor, memory: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The next hidden state and memory (B, H) of an LSTM. gates: (B, 4 * H), the sums of the gates i, f, g, o before
    their activations."""
    return _Lstm.apply(gates, memory)
