"""Whether a model's fast path may run or HF's code has to: the fast path is for stock models only (see
layers.stock)."""

import copy
import functools
import inspect
import sys
from typing import Any

import torch
from torch import nn
from transformers import GenerationMixin
from transformers.pytorch_utils import Conv1D

from .. import ops
from .._transformers import IS_TESTED, collects_outputs, is_capturing_hook, register_outputs
from ..layers import stock
from ..layers.quantized import COMPILER_SEES_MODULES, is_int8, lay_out_all
from ._layer import Layer

__all__ = ["BUILT", "READ_WHOLE", "remember", "remember_config", "watch", "why_hf_forward", "why_hf_loop"]

# Methods of HF's model classes that neither forward nor the generation loop computes with: they may be overridden.
_APART = {
    "__init__", "_init_weights", "generate", "get_decoder", "get_encoder", "get_input_embeddings",
    "get_output_embeddings", "set_input_embeddings", "set_output_embeddings", "tie_weights",
}  # fmt: skip
_DEPTHS = ("num_hidden_layers", "decoder_layers", "num_decoder_layers")
# Fields of configurations that HF's modules read in their constructors only, and our code in every call.
_BUILT_IN = frozenset(
    ("activation", "activation_function", "afn", "attention_head_size", "attention_layers", "attn_logit_softcapping",
     "classifier_activation", "d_kv", "d_model", "decoder_attention_heads", "dense_act_fn", "dim",
     "do_layer_norm_before", "encoder_attention_heads", "head_dim", "hidden_act", "hidden_activation", "hidden_size",
     "is_gated_act", "n_embd", "n_head", "n_heads", "num_attention_heads", "num_heads", "num_key_value_heads",
     "pos_att_type", "query_pre_attn_scalar", "scale_attn_by_inverse_layer_idx", "scale_attn_weights",
     "use_parallel_residual", "window_size")
)  # fmt: skip
BUILT = "_built_with"  # a model's attribute: {field: value at construction}
READ_WHOLE = "_read_whole"  # an attribute of models whose outputs a model of HF around them reads, padding too
_GENERATION = {name for name in vars(GenerationMixin) if not name.startswith("__")}


def remember(model: nn.Module, kind: type) -> None:
    """Record the modules and the configuration of `model`, and of each model of class `kind` inside it."""
    for module in model.modules():
        if isinstance(module, kind):
            stock.remember(module)
            remember_config(module)
            register_outputs(module)


def remember_config(model: Any) -> None:
    """Record the fields of _BUILT_IN. Users change a configuration to build another model with it, which must not
    change this one."""
    fields = model.config.__dict__
    model.__dict__[BUILT] = {name: copy.copy(fields[name]) for name in _BUILT_IN & fields.keys()}


def _changed_config(model: Any) -> str:
    fields = model.config.__dict__
    for name, value in model.__dict__.get(BUILT, {}).items():
        if (now := fields.get(name)) != value:
            return f"config.{name} is {now!r}, but was {value!r} when the model was built"
    return ""


def why_hf_forward(model: Any, gathered: bool = False) -> str:
    """'' if the fast path computes what HF's forward of `model` would, in its present state; else the reason why not.
    gathered: FSDP2 gathers the model's own shards before its forward."""
    if not IS_TESTED and model.runs_as_hugging_face:
        return "the installed transformers is untested, and a tiny model of the class differs from its own"
    if getattr(model, "calls_loss_function", False) and "_loss_function" in model.__dict__:
        return "its loss_function was set"
    if not torch.compiler.is_compiling():
        if torch.jit.is_tracing() or torch.onnx.is_in_onnx_export():
            return "it is being traced"
        if collects_outputs():
            return "a model around it collects the outputs of its layers"
    if ops.exporting():
        return "it is being exported"
    if torch.compiler.is_compiling() and COMPILER_SEES_MODULES:
        lay_out_all(model)
    if torch.compiler.is_compiling() and not COMPILER_SEES_MODULES:
        return f"the compiler of torch {torch.__version__} cannot inspect a model's modules"
    if torch.compiler.is_compiling() and (wrapped := _wrapped_part(model)):
        return f"it is being compiled, and {wrapped}"
    return _why_not_stock(model, gathered)


@torch.compiler.assume_constant_result
def _wrapped_part(model: Any) -> str:
    return stock.wrapped_part(model)


# {name of the module: {class: its forward}}, recorded when this package's models were defined.
_forwards: dict[str, dict[type, Any]] = {}


def watch(ours: type) -> None:
    """Record the forwards of `ours` and of the classes in HF's modules for it, to notice when one is replaced."""
    _forwards.setdefault(ours.__module__, {})[ours] = ours.__dict__.get("forward")
    for name in {cls.__module__ for cls in ours.__mro__ if cls.__module__.startswith("transformers.models.")}:
        if name not in _forwards:
            found = [cls for cls in vars(sys.modules[name]).values() if inspect.isclass(cls)]
            _forwards[name] = {
                cls: cls.__dict__.get("forward")
                for cls in found
                if issubclass(cls, nn.Module) and cls.__module__ == name
            }


def _replaced_forward(ours: type) -> str:
    for name in _modules_of(ours):  # type: ignore[arg-type]
        for cls, forward in _forwards.get(name, {}).items():
            if cls.__dict__.get("forward") is not forward:
                return f"the forward of class {cls.__name__} was replaced"
    return ""


@functools.cache
def _modules_of(ours: Any) -> tuple[str, ...]:
    return tuple(dict.fromkeys(cls.__module__ for cls in ours.__mro__))


@torch.compiler.assume_constant_result
def _why_not_stock(model: Any, gathered: bool = False) -> str:
    kind = stock.before_fsdp(type(model)) or type(model)
    ours = _our_class(kind)  # type: ignore[arg-type]
    if replaced := _replaced_forward(ours) or _changed_config(model):
        return replaced
    if kind is not ours:  # a user's subclass
        methods = stock.methods_over(kind, ours, _computing(ours) - {"forward"})
        if methods:
            return f"{kind.__name__} has a {methods[0]} of its own"
    return stock.why_changed(model, _GENERATION | _APART, gathered)


def why_hf_loop(model: Any) -> str:
    """'' if generate may decode with our engine, which calls no method of the model after the prompt; else why not."""
    if reason := why_hf_forward(model):
        return reason
    if any(getattr(model.config, name, 1) == 0 for name in _DEPTHS):
        return "it has no layers"
    for part in model.modules():
        if BUILT in part.__dict__ and (changed := _changed_config(part)):
            return changed
    if wrapped := stock.wrapped_part(model):
        return wrapped
    kind = type(model)
    ours = _our_class(kind)  # type: ignore[arg-type]
    if methods := stock.methods_over(kind, ours, (_computing(ours) | {"forward"} | _GENERATION) - _APART):
        return f"{kind.__name__} has a {methods[0]} of its own"
    if hooks := stock.hooks_on(model):
        return f"{kind.__name__} has {hooks}"
    for name in stock.own_methods(model, _APART):
        if not _hands_on(model.__dict__[name]):
            return f"{kind.__name__} has a {name} of its own"
    return ""


def _our_class(kind: Any) -> type:
    return next(cls for cls in kind.__mro__ if cls.__module__.startswith(f"{__package__}."))


@functools.cache
def _computing(ours: Any) -> set[str]:
    """The methods of HF's model class that its forward or generate may call."""
    theirs = [cls for cls in ours.__mro__ if cls.__module__.startswith("transformers.models.")]
    return {name for cls in theirs for name, value in vars(cls).items() if callable(value)} - _APART


def _hands_on(method: Any) -> bool:
    """True for PEFT's prepare_inputs_for_generation without prompt learning: it only calls the model's."""
    owner = getattr(method, "__self__", None)
    if (
        getattr(method, "__name__", "") != "prepare_inputs_for_generation"
        or type(owner).__module__ != "peft.peft_model"
    ):
        return False
    return not owner.active_peft_config.is_prompt_learning


# ---- modules and hooks of other libraries that the fast path allows ----------------------------------
def _is_lora(module: Any, kind: type) -> bool:
    """True for PEFT's LoRA on a linear layer: x W + x A B, row by row."""
    cls = type(module)
    if (cls.__module__, cls.__name__) != ("peft.tuners.lora.layer", "Linear") or kind not in (nn.Linear, Conv1D):
        return False
    if type(module.base_layer) is not kind or module.lora_variant:
        return False
    known = (cls, nn.Linear, Conv1D, nn.ModuleDict, nn.ParameterDict, nn.Dropout, nn.Identity)
    return all(
        (type(m) in known or type(m).__module__.startswith("peft."))
        and not stock.hooks_on(m)
        and not stock.own_methods(m)
        and all(type(p) in (nn.Parameter, torch.Tensor) for p in m._parameters.values() if p is not None)
        for m in module.modules()
    )


def _is_int8(module: Any, kind: type) -> bool:
    return kind in (nn.Linear, Conv1D) and is_int8(module) and not stock.own_methods(module)


stock.allow_leaf(_is_lora)
stock.allow_leaf(_is_int8)


# The names of the families' token embeddings, which are called as modules.
_WORDS = {"embed_in", "embed_tokens", "shared", "tok_embeddings", "tokens_embed", "word_embeddings", "wte"}


def _is_called(module: nn.Module, kind: type, name: str) -> bool:
    """True for modules that the fast path calls as modules: layers, the embeddings of encoders (see run_stack), and
    leaves, which layers.projection and layers.embeddings call where they are not plain."""
    if isinstance(module, Layer) or name == "embeddings" or kind in (nn.Linear, Conv1D, nn.LayerNorm, nn.RMSNorm):
        return True
    return "is_rms_norm" in kind.__dict__ or (issubclass(kind, nn.Embedding) and name in _WORDS)


stock.allow_called(_is_called)


def _is_for_gradients(hook: Any) -> bool:
    """True for the hook of HF and PEFT that makes embeddings require a gradient, for checkpointing."""
    return getattr(hook, "__module__", "").startswith(("transformers.", "peft.")) and getattr(
        hook, "__name__", ""
    ).startswith("make_inputs_require_grad")


stock.allow_hook(is_capturing_hook)
stock.allow_hook(_is_for_gradients)
