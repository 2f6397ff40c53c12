"""Norms and activations of any torch model on this package's kernels, by changing the class of the module.

An instance keeps its parameters, buffers, hooks, training mode and place in the tree. Its new class is a subclass of
its former class, with another forward. So state dicts, isinstance, hooks, deepcopy and pickle work as before, and
setting the class back undoes the swap.
"""

import copy
import inspect
import re
import weakref
from collections.abc import Callable
from typing import Any

import torch

from ..ops import bias_activation, layer_norm, rms_norm

_EPS_NAMES = ("eps", "variance_epsilon", "epsilon", "layer_norm_eps")
_NORM_NAME = re.compile(r"norm(?!alize$)", re.IGNORECASE)  # sentence-transformers' Normalize makes unit vectors
_ACTIVATION_NAME = re.compile(r"gelu|silu|swish", re.IGNORECASE)


# ---- forwards -------------------------------------------------------------------------------------------
def _eps(module: torch.nn.Module) -> float | None:
    for name in _EPS_NAMES:
        if hasattr(module, name):
            return getattr(module, name)
    return None


def _same_dtype(x: torch.Tensor, *parameters: torch.Tensor | None) -> bool:
    """Whether x and the parameters have one dtype. With mixed dtypes the model's own forward runs, because models
    differ in the result's dtype."""
    return x.is_floating_point() and all(p is None or p.dtype == x.dtype for p in parameters)


def _layer_norm(module, x, original):
    weight, bias = module.weight, getattr(module, "bias", None)
    if x.is_cuda and torch.is_autocast_enabled("cuda"):
        x = x.float()  # as torch's layer norm does under autocast
    if not _same_dtype(x, weight, bias):
        return original(module, x)
    shape = module.normalized_shape if hasattr(module, "normalized_shape") else weight.shape
    return layer_norm(x, shape, weight, bias, _eps(module))


def _rms_norm(module, x, original):
    weight = module.weight
    if not _same_dtype(x, weight):
        return original(module, x)
    shape = module.normalized_shape if hasattr(module, "normalized_shape") else weight.shape
    return rms_norm(x, shape, weight, _eps(module))


def _rms_norm_offset(module, x, original):
    weight = module.weight
    if not _same_dtype(x, weight):
        return original(module, x)
    wide = weight if weight.dtype == torch.float64 else weight.float()
    return rms_norm(x, weight.shape, 1.0 + wide, _eps(module))


def _activation(name: str) -> Callable:
    def run(module, x, original):
        return bias_activation(x, None, name) if x.is_floating_point() and x.dim() else original(module, x)

    return run


NORMS: dict[str, Callable] = {
    "layer_norm": _layer_norm,
    "rms_norm": _rms_norm,
    "rms_norm (1 + weight)": _rms_norm_offset,
}
ACTIVATIONS: dict[str, Callable] = {name: _activation(name) for name in ("gelu", "gelu_tanh", "silu")}
_FORWARDS = {**NORMS, **ACTIVATIONS}


class Swapped:
    """Mixin of every swapped module's class. _original: the module's former class; _kind: the op it calls."""

    _original: type
    _kind: str

    def __reduce_ex__(self, protocol):
        # The class is made at run time: pickle and deepcopy make it again from the former class.
        return _remake, (self._original, self._kind), self.__getstate__()


# By (original, kind), as long as there are modules of it.
_swapped_classes: weakref.WeakValueDictionary[tuple[type, str], type] = weakref.WeakValueDictionary()


def swapped_class(original: Any, kind: str) -> type:
    """The subclass of `original` whose forward is op `kind`. Same name, so printed models read the same."""
    if (known := _swapped_classes.get((original, kind))) is not None:
        return known
    run, before = _FORWARDS[kind], original.forward

    def forward(self, input):
        return run(self, input, before)

    names: dict[str, Any] = {"forward": forward, "_original": original, "_kind": kind, "__doc__": original.__doc__}
    names["__module__"], names["__qualname__"] = original.__module__, original.__qualname__
    made = type(original.__name__, (Swapped, original), names)
    return _swapped_classes.setdefault((original, kind), made)


def _remake(original: type, kind: str) -> torch.nn.Module:
    cls: Any = swapped_class(original, kind)
    return cls.__new__(cls)


# ---- recognition ----------------------------------------------------------------------------------------
def candidate(module: torch.nn.Module) -> str | None:
    """ "norm" or "activation" if the module is a leaf whose class has such a name, else None."""
    name = type(module).__name__
    if next(module.children(), None) is not None:
        return None
    if _NORM_NAME.search(name):
        return "norm"
    if isinstance(module, (torch.nn.GELU, torch.nn.SiLU)) or _ACTIVATION_NAME.search(name):
        return "activation"
    return None


def recognise(module: torch.nn.Module, what: str) -> tuple[str | None, str]:
    """(kind, "") if the module computes the same as op `kind`, else (None, why it is left alone)."""
    if "forward" in vars(module):
        return None, "its forward was replaced on the instance"
    if hasattr(module, "parametrizations"):
        return None, "its weight is parametrized"
    if isinstance(module, torch.jit.ScriptModule):
        return None, "it is a script module"
    if isinstance(module, (torch.nn.modules.batchnorm._NormBase, torch.nn.GroupNorm, torch.nn.LocalResponseNorm)):
        return None, "there is no kernel for this norm"
    if getattr(module, "inplace", False):
        return None, "it works in place"
    if any(p.is_meta for p in module.parameters(recurse=False)):
        return None, "its parameters are on the meta device, where it cannot be run"
    if len(_inputs(module)) != 1:
        return None, f"its forward takes {len(_inputs(module))} inputs, wanted 1"
    return _recognise_norm(module) if what == "norm" else _recognise_activation(module)


def _inputs(module) -> list[inspect.Parameter]:
    return list(inspect.signature(type(module).forward).parameters.values())[1:]


def _recognise_norm(module) -> tuple[str | None, str]:
    parameters = dict(module.named_parameters(recurse=False))
    if any(True for _ in module.buffers(recurse=False)) or not set(parameters) <= {"weight", "bias"}:
        return None, "it has state other than weight and bias"
    if "weight" not in parameters:
        if type(module) in (torch.nn.LayerNorm, torch.nn.RMSNorm):
            return ("layer_norm" if type(module) is torch.nn.LayerNorm else "rms_norm"), ""
        return None, "it has no weight that shows its width"
    if not all(p.is_floating_point() for p in parameters.values()):
        return None, "its weight is not of a floating-point dtype"
    if _eps(module) is None and not isinstance(module, torch.nn.RMSNorm):
        return None, f"it has none of the attributes {', '.join(_EPS_NAMES)}"
    kinds = NORMS if _eps(module) is not None else {"rms_norm": _rms_norm}  # only rms_norm has a default eps
    kind = _behaves_like(module, _norm_probe(module, parameters), kinds)
    return kind, "" if kind else "its forward is neither layer norm nor RMS norm of its last dimension"


def _recognise_activation(module) -> tuple[str | None, str]:
    if any(True for _ in module.parameters()) or any(True for _ in module.buffers()):
        return None, "it has parameters or buffers"
    kind = _behaves_like(module, (module, [torch.linspace(-9, 9, 301, dtype=torch.float64, device="cpu")]), ACTIVATIONS)
    return kind, "" if kind else f"its forward is none of {', '.join(ACTIVATIONS)}"


def _norm_probe(module, parameters) -> tuple[torch.nn.Module, list[torch.Tensor]]:
    """A copy with random float32 weights on the CPU, and inputs on which the norms and their eps differ."""
    generator = torch.Generator().manual_seed(0)
    probe = copy.copy(module)
    probe.__dict__["_parameters"] = {
        name: torch.nn.Parameter(1 + torch.rand(p.shape, generator=generator)) if name in parameters else None
        for name, p in module._parameters.items()
    }
    shape = tuple(parameters["weight"].shape)
    x = torch.randn(3, *shape, generator=generator)
    eps = _eps(module) or torch.finfo(torch.float32).eps
    return probe, [x + 0.5, (x + 0.5) * max(float(eps), 1e-12) ** 0.5]


def _behaves_like(module, probe, kinds: dict[str, Callable]) -> str | None:
    """The kind whose values equal the module's own forward within float32 rounding, on every probe input; else None."""
    stand_in, inputs = probe
    forward = type(module).forward
    with torch.no_grad():
        try:
            wanted = [forward(stand_in, x) for x in inputs]
        except Exception:  # a foreign forward may raise anything: then it is none of the kinds
            return None
        for kind, run in kinds.items():
            found = [run(stand_in, x, forward) for x in inputs]
            if all(
                isinstance(w, torch.Tensor) and w.shape == f.shape and torch.allclose(w.to(f), f, rtol=1e-4, atol=1e-5)
                for w, f in zip(wanted, found)
            ):
                return kind
    return None
