"""accelerate(model): replaces parts of any torch or Hugging Face model by parts that run this package's kernels."""

import collections
import dataclasses
import sys
from typing import Any

import torch

from .._version import old_transformers
from . import swaps
from .huggingface import NAME

_STATE = "_transformer_fast_attention"


class _PreviousAttention(dict):
    """{place: attention implementation before `accelerate`}, kept on the model, so that pickled and copied models can
    be restored too. It is a class of this package so that unpickling imports the package, which registers the
    implementation."""


@dataclasses.dataclass
class Report:
    """What `accelerate` swapped and what it left. print(report) shows it; undo() reverts all changes.

    swapped: {module path: op}, with attention under "attention" or "attention (path)".  left: {module path: reason}.
    """

    model: torch.nn.Module = dataclasses.field(repr=False)
    swapped: dict[str, str]
    left: dict[str, str]

    def undo(self) -> torch.nn.Module:
        """`restore` the model: revert its classes and attention implementation."""
        return restore(self.model)

    def __str__(self) -> str:
        lines = [f"transformer_fast in {type(self.model).__name__}"]
        for title, found in (("swapped", self.swapped), ("left", self.left)):
            lines += [f"  {title}: {line}" for line in self._grouped(found)] or [f"  {title}: nothing"]
        return "\n".join(lines)

    def _grouped(self, found: dict[str, str]) -> list[str]:
        groups = collections.defaultdict(list)
        for path, text in found.items():
            groups[self._class_of(path), text].append(path)
        return [
            f"{what} -> {text}"
            + ("" if paths == [""] or paths[0] == what else f" ({len(paths)}: {paths[0]}{' ...' if paths[1:] else ''})")
            for (what, text), paths in groups.items()
        ]

    def _class_of(self, path: str) -> str:
        if path.startswith("attention"):
            return path
        try:
            return type(self.model.get_submodule(path)).__name__
        except AttributeError:
            return path


def accelerate(model: Any, *, precision: str | None = None, adopt: bool = True, verbose: bool = True) -> Report:
    """Speed up any model in place, as far as possible, and report what was changed, what was not, and why.

    Hugging Face models that this package has a class for get that class, at any depth (in a SentenceTransformer, a PEFT
    model, a module of your own): they are as fast as by the model import. In every other model, attention, norms and
    activations are swapped for this package's.

    Args:
        model: a torch.nn.Module, or an object with one as its attribute `model` (a pipeline). Attention: models of
            transformers with an attention interface get attn_implementation="transformer_fast". Norms:
            torch.nn.LayerNorm, torch.nn.RMSNorm and modules named *Norm* with one weight (and bias) whose own forward
            agrees with layer_norm, rms_norm or Gemma's rms_norm with 1 + weight. Activations: modules named *gelu*,
            *silu*, *swish* whose own forward agrees with gelu, gelu_tanh or silu. Agreement is checked by running both
            on random input.
        precision: "int8" or "bf16": quantize the models that got this package's classes, see `quantize`. undo() does
            not revert it, `dequantize` does but for the rounding.
        adopt: False: no model gets this package's class; attention, norms and activations are swapped in all of them.
        verbose: print the report.

    Parameters and their names, the state dict, isinstance, hooks, training mode and gradients do not change. deepcopy,
    pickle and save_pretrained work, and saved models load without this package. Models imported from this package are
    not changed. A second call changes nothing more.

    Returns:
        A `Report`; `report.undo()` or `restore(model)` reverts all changes.

    Raises:
        TypeError: model is neither a torch.nn.Module nor has one.
        ImportError: the installed transformers is too old.
        ValueError: the precision is unknown, or no part of the model can be quantised so.

    Examples:
        >>> import torch, transformer_fast
        >>> model = torch.nn.Sequential(torch.nn.LayerNorm(8), torch.nn.GELU())
        >>> sorted(transformer_fast.accelerate(model, verbose=False).swapped)
        ['0', '1']
    """
    from ..quantization import PRECISIONS

    model = _module_of(model)
    if precision is not None and precision not in PRECISIONS:
        raise ValueError(f"precision: wanted one of {', '.join(PRECISIONS)}, got {precision!r}")
    report = Report(model, {}, {})
    before = {id(m) for m in model.modules() if _is_ours(m)}
    if adopt and "transformers.modeling_utils" in sys.modules:  # else there are no transformers models
        if old := old_transformers():
            raise ImportError(f"accelerate: {old}")
        from . import adoption

        adopted, report.left = adoption.adopt(model)
        report.swapped |= {path: f"transformer_fast.{ours.__name__}" for path, ours in adopted.items()}
    if precision is not None:
        _set_precision(model, precision)
    own = {id(m) for module in model.modules() if _is_ours(module) for m in module.modules()}
    _swap_attention(model, report, own)
    for path, module in model.named_modules():
        if id(module) in own or isinstance(module, swaps.Swapped):
            continue
        if isinstance(module, torch.nn.MultiheadAttention):
            report.left[path] = (
                "it has no attention interface; transformer_fast.layers.MultiheadAttention takes its state dict"
            )
        what = swaps.candidate(module)
        if what is None:
            continue
        kind, reason = swaps.recognise(module, what)
        if kind is None:
            report.left[path] = reason
        else:
            module.__class__ = swaps.swapped_class(type(module), kind)  # type: ignore[arg-type]
            report.swapped[path] = kind
    if before:
        report.left["modules of transformer_fast"] = "they run on its kernels already"
    if verbose:
        print(report)
    return report


def restore(model: torch.nn.Module) -> torch.nn.Module:
    """Undo `accelerate`: revert every class and attention implementation.

    Args:
        model: the model that `accelerate` was called with.

    Returns:
        The model.

    Raises:
        TypeError: model is neither a torch.nn.Module nor has one.

    Examples:
        >>> import torch, transformer_fast
        >>> model = torch.nn.Sequential(torch.nn.LayerNorm(8), torch.nn.GELU())
        >>> report = transformer_fast.accelerate(model, verbose=False)
        >>> restored = transformer_fast.restore(model)
    """
    model = _module_of(model)
    if "transformers.modeling_utils" in sys.modules:
        from .adoption import release

        release(model)
    for module in model.modules():
        if isinstance(module, swaps.Swapped):
            module.__class__ = module._original
        previous = vars(module).get(_STATE)
        if previous is not None:
            delattr(module, _STATE)
            _put_back(module, previous)
    return model


def _module_of(model: Any) -> torch.nn.Module:
    """The module itself, or the `model` of a pipeline."""
    held = model if isinstance(model, torch.nn.Module) else getattr(model, "model", None)
    if not isinstance(held, torch.nn.Module):
        raise TypeError(f"model: wanted a torch.nn.Module or an object with a `model`, got {type(model).__name__}")
    return held


def _set_precision(model: torch.nn.Module, precision: str) -> None:
    from ..models._base import ModelMixin
    from ..quantization import is_int8_model, quantize

    inside: set[int] = set()
    for module in model.modules():
        if isinstance(module, ModelMixin) and id(module) not in inside:
            inside |= {id(m) for m in module.modules()}
            if precision != "int8" or not is_int8_model(module):
                quantize(module, precision)
    if not inside:
        raise ValueError(
            f"precision: no part of {type(model).__name__} can be quantised to {precision!r}; "
            "transformer_fast.quantize takes any module"
        )


def _is_ours(module: torch.nn.Module) -> bool:
    return type(module).__module__.startswith("transformer_fast.")


# ---- attention ------------------------------------------------------------------------------------------
def _swap_attention(model, report: Report, own: set[int]) -> None:
    modeling = sys.modules.get("transformers.modeling_utils")
    if modeling is None:  # there are no transformers models
        return
    inside: set[int] = set()
    for path, module in model.named_modules():
        if not isinstance(module, modeling.PreTrainedModel) or id(module) in inside or id(module) in own:
            continue
        inside |= {id(m) for m in module.modules()}
        where = f"attention ({path})" if path else "attention"
        if _STATE in vars(module):
            continue
        reason = _set_attention(module)
        if reason:
            report.left[where] = reason
        else:
            report.swapped[where] = f'attn_implementation="{NAME}"'


def _set_attention(model) -> str:
    """Set our attention on the outermost Hugging Face model `model`. Returns '', or the reason why that is
    impossible."""
    from .._transformers import stored_attention, takes_attention

    if not takes_attention(model):
        return f"{type(model).__name__} has no attention interface in transformers: attention is written into the model"
    previous = _PreviousAttention({place: stored_attention(config) for place, config in _configs(model)})
    if set(previous.values()) == {NAME}:
        return f'it was loaded with attn_implementation="{NAME}"'
    try:
        model.set_attn_implementation(NAME)
    except (ValueError, ImportError) as error:
        _put_back(model, previous)
        return f"transformers refuses: {str(error).splitlines()[0]}"
    setattr(model, _STATE, previous)
    return ""


def _put_back(model, previous) -> None:
    from .._transformers import set_attention

    for place, config in _configs(model):
        if place in previous:
            set_attention(config, previous[place])


def _configs(model) -> list[tuple[str, Any]]:
    """(name, config) of every config object in the model, each once. A copy of the model has the same names."""
    from .._transformers import holds_attention

    found: dict[int, tuple[str, Any]] = {}

    def visit(place: str, config) -> None:
        if config is None or id(config) in found or not holds_attention(config):
            return
        found[id(config)] = (place, config)
        for name in getattr(config, "sub_configs", {}):
            visit(f"{place}/{name}", getattr(config, name, None))

    for path, module in model.named_modules():
        visit(path, getattr(module, "config", None))
    return list(found.values())
