"""int8 Linear modules, and the part of a layer that runs as one op if all its modules are int8."""

import concurrent.futures
import threading
import weakref
from typing import Any

import torch
from torch import nn
from torch.utils.weak import WeakTensorKeyDictionary

from ..ops import exporting, linear_int8
from ..ops.linear_int8 import Int8BlockWeights, Int8Norm, Int8Weight

__all__ = ["Int8Linear"]

# From torch 2.13, assume_constant_result accepts a module as an argument.
COMPILER_SEES_MODULES = tuple(int(n) for n in torch.__version__.split(".")[:2]) >= (2, 13)
_changing = threading.RLock()  # threads that share a model may make its first call at the same time


class Int8Linear(nn.Module):
    """y = x W^T + b with int8 weights and int8 arithmetic (see ops.linear_int8); replaces an nn.Linear or a Conv1D.

    State dict: weight int8 (out, in), weight_scale float32 (out, ceil(in / group)), bias (out,) or none. From the first
    call on the weight is stored only in the layout of the kernels. For inference: train(True) and inputs that require a
    gradient raise ValueError.
    """

    weight: torch.Tensor
    weight_scale: torch.Tensor
    panels: torch.Tensor | None
    replaces: type[nn.Module] = nn.Linear  # the class of the layer that was here before

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, group: int = linear_int8.GROUP,
        device: torch.device | str | None = None, dtype: torch.dtype | None = None,
    ):  # fmt: skip
        super().__init__()
        self.in_features, self.out_features, self.group = in_features, out_features, group
        self.register_buffer("weight", torch.zeros((out_features, in_features), dtype=torch.int8, device=device))
        shape = (out_features, -(-in_features // group))
        self.register_buffer("weight_scale", torch.zeros(shape, dtype=torch.float32, device=device))
        b = torch.zeros(out_features, device=device, dtype=dtype) if bias else None
        self.bias = None if b is None else nn.Parameter(b, requires_grad=False)
        # The weight in the layout of the kernels, so that the buffers of a model say what memory it takes.
        self.register_buffer("panels", None, persistent=False)
        self._int8: Int8Weight | None = None
        self._left: torch.Tensor | None = None  # what is in self.weight then
        self.training = False

    @classmethod
    def of(cls, weight: torch.Tensor, bias: torch.Tensor | None, group: int = linear_int8.GROUP) -> "Int8Linear":
        """Quantise a weight (out, in), with bias (out,) or None. Raises ValueError if the weight is not finite."""
        q, scale = linear_int8.quantize_weight(weight, group)
        if not bool(scale.isfinite().all()):
            raise ValueError("weight: wanted finite numbers, got NaN or infinity")
        module = cls(weight.shape[1], weight.shape[0], False, group, "meta")
        module.weight, module.weight_scale = q, scale
        module.bias = None if bias is None else nn.Parameter(bias.detach().reshape(-1), requires_grad=False)
        return module

    def int8_weight(self) -> Int8Weight:
        if self._modules:
            self._refuse("weight", "parametrised")
        if _is_recording():
            return _PlainWeight(self)
        if torch.compiler.is_compiling():
            if COMPILER_SEES_MODULES:
                _lay_out(self)
            elif self._int8 is None:
                return _PlainWeight(self)
        elif self._is_replaced():
            return Int8Weight(self.weight, self.weight_scale, self.group)
        return self._in_int8() if self._int8 is None else self._int8

    def _is_replaced(self) -> bool:
        """True if torch.func.functional_call, or accelerate, has put another weight in place of the one in _int8."""
        weight: Any = self._buffers["weight"]
        return self._int8 is not None and weight is not self._left and weight.shape[1] > 0

    def _in_int8(self, keep: bool = False) -> Int8Weight:
        """keep: leave the weight as it was too."""
        if self.weight.is_meta:
            return _PlainWeight(self)
        with _changing:
            if self._int8 is not None:
                return self._int8
            found = Int8Weight(self.weight, self.weight_scale, self.group)
            self.panels = found.data
            if not keep and found.data is not None:  # transformers reads the number of outputs where it ties weights
                empty = self.out_features, 0
                self.weight, self.weight_scale = self.weight.new_empty(empty), self.weight_scale.new_empty(empty)
            self._int8, self._left = found, self.weight
            return found

    def dequantized(self) -> torch.Tensor:
        """The weight as float32 (out, in)."""
        q, scale = self.int8_weight().parts()
        return q * scale.repeat_interleave(self.group, 1)[:, : self.in_features]

    def forward(self, input: torch.Tensor, activation: str | None = None) -> torch.Tensor:
        return linear_int8.linear_int8(input, self.int8_weight(), self.bias, activation)

    def train(self, mode: bool = True) -> "Int8Linear":
        if mode:
            raise ValueError(
                "mode: an int8 model is for inference and cannot be trained; train the model before it is quantised, "
                "or dequantize() it"
            )
        return super().train(False)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("weight", "weight_scale") and self.__dict__.get("_int8") is not None:
            self._restore()  # the other one belongs to the new one
        super().__setattr__(name, value)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As torch's. ValueError for the parameters by which torch prunes or normalises a weight."""
        if name.startswith("weight"):
            self._refuse(name, "pruned or normalised")
        super().register_parameter(name, param)

    def _refuse(self, name: str, what: str) -> None:
        if what == "parametrised" and name not in getattr(self, "parametrizations", ()):
            return
        raise ValueError(f"{name}: an int8 weight cannot be {what}; do that before the model is quantised")

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"group={self.group}"
        )

    # ---- state dict: always (out, in), whatever the layout of the weight in memory -----------------
    def _restore(self) -> None:
        with _changing:
            weight = None if self._is_replaced() else self._int8
            self._int8 = self._left = self.panels = None
            if weight is not None and weight.data is not None:
                self.weight, self.weight_scale = weight.parts()

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        with _changing:
            weight = self._int8
            if weight is None or weight.data is None or self._is_replaced():
                return super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.bias is not None:
            destination[f"{prefix}bias"] = self.bias if keep_vars else self.bias.detach()
        destination[f"{prefix}weight"], destination[f"{prefix}weight_scale"] = weight.parts()
        return None

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, unexpected, errors):
        given = state_dict.get(f"{prefix}weight")
        if isinstance(given, torch.Tensor) and given.dtype != torch.int8:  # copying would cut off the fractions
            errors.append(
                f"{prefix}weight: wanted int8, as this layer is quantised, got {given.dtype}; load the weights before "
                "quantize"
            )
            return
        self._restore()
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)

    def _apply(self, fn, recurse: bool = True):
        self._restore()
        scale = self.weight_scale
        super()._apply(fn, recurse)
        if self.weight_scale.dtype != torch.float32:  # .half() and similar must not change the scales
            self.weight_scale = scale.to(self.weight.device)
        return self


@torch.compiler.assume_constant_result  # torch.compile runs this, and records none of it
def _lay_out(module: Int8Linear) -> bool:
    # The compiler may have a guard on the weight, where the code around the module reads its dtype.
    return module._in_int8(keep=True).data is not None


@torch.compiler.assume_constant_result
def lay_out_all(model: nn.Module) -> bool:
    """Lay out the weights of all Int8Linear modules in `model` for the kernels, before torch.compile has seen them.
    Returns True, as the compiler cannot take None."""
    for module in model.modules():
        if isinstance(module, Int8Linear):
            module._in_int8()
    return True


# ---- what is exported or traced has PyTorch's own ops, and runs without this package ----------------
class _PlainWeight(Int8Weight):
    """A weight for plain PyTorch. Its values may be fake tensors, so they are not looked at."""

    __slots__ = ()

    def __init__(self, module: Int8Linear):
        self.shape, self.group = torch.Size((module.out_features, module.in_features)), module.group
        self.data, self._parts = None, _weight_to_record(module)


def _is_recording() -> bool:
    """True in torch.export, torch.jit.trace and torch.onnx.export, which uses torch.export."""
    if exporting():
        return True
    if torch.compiler.is_compiling() or not (tracing := torch.jit.is_tracing()):
        return False
    if torch.onnx.is_in_onnx_export():  # its graph of the sizes is wrong: onnxruntime cannot run it
        raise ValueError(
            "dynamo: torch.onnx.export(dynamo=False) cannot record int8 layers; export model.dequantize(), or use "
            "dynamo=True"
        )
    return tracing


_recorded: Any = WeakTensorKeyDictionary()  # panels -> weak references to the constants made from them


def _weight_to_record(module: Int8Linear) -> tuple[torch.Tensor, torch.Tensor]:
    """The module's buffers; once they are laid out for the kernels, constants. These are made in a thread of their own:
    no tracer or dispatch mode is active there."""
    weight = module._int8
    if weight is None or weight.data is None or module._left is None or module._left.numel() or module._is_replaced():
        return module.weight, module.weight_scale
    if torch.compiler.is_dynamo_compiling():
        return _constant(module, 0), _constant(module, 1)
    q, scale = (t() for t in _recorded.get(weight.data, (_nothing, _nothing)))  # a module may be called several times
    if q is None or scale is None:
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            q, scale = pool.submit(weight.parts).result()
        _recorded[weight.data] = weakref.ref(q), weakref.ref(scale)
    return q, scale


def _nothing() -> None:
    return None


@torch.compiler.assume_constant_result
def _constant(module: Int8Linear, which: int) -> torch.Tensor:
    return module._int8.parts()[which]  # type: ignore[union-attr]


def is_int8(*modules: Any) -> bool:
    """True if all modules are Int8Linear without hooks or a replaced forward."""
    return all(
        type(m) is Int8Linear
        and not (m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks)
        and "forward" not in m.__dict__
        for m in modules
    )


def int8_linears(modules: list[Any], x: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """The concatenated outputs of up to three Int8Linear modules of one input. dtype: of the result, None for x's."""
    weights = [m.int8_weight() for m in modules]
    return linear_int8.linear_int8(x, weights, [m.bias for m in modules], None, dtype)


def block_weights(w: Any, spec: Any, attention_norm: Int8Norm | None, output_norm: Int8Norm, rms: bool):
    """The Int8BlockWeights of a layer, or None if a module is not int8 or there is no kernel."""
    gates = (w.gate,) if spec.gated else ()
    if spec.activation is None or not is_int8(w.attention_output, w.up, w.down, *gates):
        return None
    gate = w.gate if spec.gated else None
    biases = (w.attention_output.bias, w.up.bias, None if gate is None else gate.bias, w.down.bias)
    found = Int8BlockWeights(
        w.attention_output.int8_weight(), w.up.int8_weight(), None if gate is None else gate.int8_weight(),
        w.down.int8_weight(), biases, attention_norm, output_norm, rms, spec.activation,
    )  # fmt: skip
    return None if found.why_not() else found
