"""Runs torch's GRU and LSTM modules by the fused ops."""

from typing import Any

import torch
from torch import nn

from .. import ops
from ..backends import Call, native, select
from ..backends.memory import keep_for_training
from .projection import is_plain

__all__ = ["recurrent_layers", "why_not_recurrent"]

_CELLS: dict[type[nn.RNNBase], Any] = {nn.GRU: ops.gru, nn.LSTM: ops.lstm}


def why_not_recurrent(module: Any, x: torch.Tensor) -> str:
    """'' if recurrent_layers can run the module, and faster than torch; else the reason why not."""
    if not any(is_plain(module, kind) for kind in _CELLS):
        return f"{type(module).__name__} is not a plain GRU or LSTM"
    if x.device.type != "cpu":
        return f"device {x.device} is not cpu"
    if getattr(module, "proj_size", 0):
        return "its states are projected"
    weight = module.weight_hh_l0
    if x.dtype != weight.dtype:
        return f"input is {x.dtype} and the weights are {weight.dtype}"
    if reason := native.load():
        return reason
    name = select(Call("recurrence", "cpu", x.dtype, weight.shape[1])).name
    return "" if name == "cpu" else f"the backend is {name}"


def recurrent_layers(
    module: nn.RNNBase,
    x: torch.Tensor,
    initial: torch.Tensor | tuple[torch.Tensor, torch.Tensor] | None = None,
    cu_seqlens: torch.Tensor | None = None,
) -> tuple[torch.Tensor, Any]:
    """The result of a plain GRU or LSTM with batch_first, all layers and directions.

    x: (B, T, in), or concatenated sequences (total, in) with cu_seqlens. initial: as the module's argument. Returns the
    states of the last layer, (B, T, directions * H) or (total, directions * H), and the last states
    (layers * directions, B, H), for an LSTM a pair of hidden states and memories.
    """
    keep_for_training(x)
    function, lstm = _CELLS[type(module)], isinstance(module, nn.LSTM)
    directions = 2 if module.bidirectional else 1
    last: list[Any] = []
    for layer in range(module.num_layers):
        if layer and module.training and module.dropout:
            x = ops.dropout(x, module.dropout)
        outputs = []
        for direction in range(directions):
            index = layer * directions + direction
            suffix = f"_l{layer}{'_reverse' * direction}"
            weights = [getattr(module, f"{name}{suffix}") for name in ("weight_ih", "weight_hh")]
            biases = [getattr(module, f"{name}{suffix}") if module.bias else None for name in ("bias_ih", "bias_hh")]
            start: Any = None
            if initial is not None:
                start = tuple(s[index] for s in initial) if lstm else initial[index]  # type: ignore[union-attr]
            out, state = function(x, *weights, *biases, start, cu_seqlens=cu_seqlens, reverse=bool(direction))
            outputs.append(out)
            last.append(state)
        x = outputs[0] if directions == 1 else torch.cat(outputs, -1)
    if lstm:
        return x, tuple(torch.stack(states) for states in zip(*last))
    return x, torch.stack(last)
