"""Code that every family shares: replacing the classes of HF's modules by ours, and reading a forward's arguments."""

from typing import Any, NamedTuple

import torch
from torch import nn

from ..layers import StackCall, Unpadding, stock
from ..layers.quantized import Int8Linear
from ..layers.quantizing import is_int8_model
from . import _quantizer as _quantizer  # registers the quantizer that reads int8 checkpoints
from . import _stock
from ._explain import explain_model
from ._heads import keep_positions
from ._layer import AttentionModule
from ._loading import LoadingErrors
from ._self_check import runs_as_hugging_face

__all__ = [
    "Adopted",
    "Encoded",
    "Flags",
    "ModelMixin",
    "Outputs",
    "Want",
    "activation_name",
    "check_inputs",
    "check_integers",
    "read_flags",
]


class Want(NamedTuple):
    """The positions that a head reads from its base model.

    first_only: only the first position. read_first: the first position too. read: (B, S) bool, positions that are
    computed even where they are padding, for example because they have a label. returned: the last state is returned
    beside the pooled one, which is computed from it, so that it gets its gradient.
    """

    first_only: bool = False
    read_first: bool = False
    returned: bool = False
    read: torch.Tensor | None = None


class Encoded(NamedTuple):
    """The outputs of a base model for its head, before padding is restored.

    rows: (total, E), or (B, S, E) when nothing was dropped; None when only the first positions were computed.
    """

    rows: Any  # torch.Tensor | None
    unpadding: Unpadding
    pooled: torch.Tensor | None
    past_key_values: Any
    hidden_states: tuple | None
    attentions: tuple | None
    cross_attentions: tuple | None
    last: torch.Tensor | None = None

    @classmethod
    def of(cls, rows, call: StackCall, pooled, past_key_values, flags: "Flags", layers: int, last) -> "Encoded":
        """last: the last state (B, S, E), or None where it has not been restored yet."""
        hidden = attentions = cross = None
        if flags.hidden_states:
            states = call.hidden_states | ({layers: last} if layers in flags.keep_hidden else {})
            hidden = tuple(states.get(i) for i in range(layers + 1))
        if flags.attentions:
            attentions, cross = (
                tuple(d[i] for i in sorted(d)) for d in (call.attentions or {}, call.cross_attentions or {})
            )
        return cls(rows, call.unpadding, pooled, past_key_values, hidden, attentions, cross, last)

    def restored(self) -> torch.Tensor:
        return self.unpadding.pad(self.rows) if self.last is None else self.last

    def kept(self, which: int | torch.Tensor) -> "Encoded":
        """Only the positions that HF's logits_to_keep selects; for 0 all, unchanged. See _heads.keep_positions."""
        if isinstance(which, int) and not which:
            return self
        rows = keep_positions(self.restored(), which)
        return self._replace(rows=rows, unpadding=Unpadding(*rows.shape[:2]), last=None)

    def extras(self, cross: bool = False) -> dict:
        """hidden_states and attentions, by the names of the output classes' fields."""
        found = {"hidden_states": self.hidden_states, "attentions": self.attentions}
        return found | {"cross_attentions": self.cross_attentions} if cross else found


class Flags(NamedTuple):
    attentions: bool
    hidden_states: bool
    keep_hidden: frozenset[int]


def read_flags(config, kwargs: dict, layers: int) -> Flags:
    """The output switches of a forward call; the configuration's values where the call does not set them."""

    def switch(name: str, default):
        value = kwargs.get(name)
        return getattr(config, name, default) if value is None else value

    wanted = switch("output_hidden_states", False)
    count = layers + 1
    if isinstance(wanted, bool) or wanted is None:
        keep = frozenset(range(count)) if wanted else frozenset()
    else:
        chosen = [wanted] if isinstance(wanted, int) else list(wanted)
        keep = frozenset(i % count for i in chosen if -count <= i < count)
        wanted = True
    return Flags(bool(switch("output_attentions", False)), bool(wanted), keep)


def check_inputs(
    input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None, width: int, prefix: str = ""
) -> torch.Tensor:
    """Return input_ids or inputs_embeds, whichever was given, after checking shape and dtype (ValueError, TypeError).
    prefix: put before their names in messages ("decoder_")."""
    ids, embeds = f"{prefix}input_ids", f"{prefix}inputs_embeds"
    if (input_ids is None) == (inputs_embeds is None):
        came = "neither" if input_ids is None else "both"
        raise ValueError(f"{ids}, {embeds}: wanted exactly one of them, got {came}")
    if input_ids is not None:
        check_integers(ids, input_ids)
        if input_ids.dim() != 2:
            raise ValueError(f"{ids}: wanted shape (batch, length), got {tuple(input_ids.shape)}")
        return input_ids
    if inputs_embeds.dim() != 3 or inputs_embeds.shape[2] != width:  # type: ignore[union-attr]
        raise ValueError(f"{embeds}: wanted (batch, length, {width}), got {tuple(inputs_embeds.shape)}")  # type: ignore[union-attr]
    return inputs_embeds  # type: ignore[return-value]


def check_integers(name: str, t: torch.Tensor, shape: tuple[int, int] | None = None) -> None:
    """Check that `t` is an int32 or int64 tensor; with `shape` (batch, length), that it has this shape or one row."""
    if not isinstance(t, torch.Tensor) or t.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name}: wanted an int32 or int64 tensor, got {getattr(t, 'dtype', type(t).__name__)}")
    if shape is not None and tuple(t.shape) not in (shape, (1, shape[1]), shape[1:]):
        raise ValueError(f"{name}: wanted shape {shape}, got {tuple(t.shape)}")


class Adopted:
    """A family's table {HF class: our subclass of it}: modules made by HF's constructors get our classes in place."""

    def __init__(self):
        self._classes: dict[type, type] = {}

    def register(self, cls: type) -> type:
        """Class decorator: `cls` replaces its HF base, the next subclass of nn.Module in its __mro__."""
        for base in cls.__mro__[1:]:
            if issubclass(base, nn.Module) and not issubclass(base, ModelMixin):
                self._classes[base] = cls
                return cls
        raise TypeError(f"{cls.__name__}: has no nn.Module base to take the place of")

    def adopt(self, model: nn.Module) -> None:
        for module in model.modules():
            ours = self._classes.get(type(module))
            if ours is not None:
                module.__class__ = ours
                if isinstance(module, AttentionModule):
                    module.keep_config()


class Outputs:
    """Mixin with the conversion of a forward's output."""

    config: Any

    def _finish(self, output, flags_from: dict):
        """The output, as a tuple where return_dict is off."""
        return_dict = flags_from.get("return_dict")
        if return_dict is None:
            return_dict = getattr(self.config, "return_dict", True)
        return output if return_dict else output.to_tuple()


class ModelMixin(Outputs, LoadingErrors):
    """First base of each model class, before HF's. Parameters, names and initialisation are HF's own."""

    _adopted: Adopted
    runs_as_hugging_face = False  # True: transformers is an untested release, and a tiny model of the class differs
    calls_loss_function = False  # HF's forward calls self.loss_function, which users set, and ours has its own loss

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        if cls.__module__.startswith(f"{__package__}."):
            _stock.watch(cls)

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.runs_as_hugging_face = runs_as_hugging_face(type(self))
        if not self.runs_as_hugging_face:
            self._adopted.adopt(self)  # type: ignore[arg-type]
        _stock.remember(self, ModelMixin)  # type: ignore[arg-type]

    def train(self, mode: bool = True):
        """As torch's. An int8 model of which no parameter requires a gradient raises ValueError, before any module has
        changed its mode. In other int8 models, the modules that have such parameters, and no int8 layers, change it."""
        linear = next((m for m in self.modules() if isinstance(m, Int8Linear)), None) if mode else None  # type: ignore[attr-defined]
        if linear is None:
            return super().train(mode)  # type: ignore[misc]
        if not any(p.requires_grad for p in self.parameters()):  # type: ignore[attr-defined]
            linear.train(mode)
        for module in self.modules():  # type: ignore[attr-defined]
            trained = any(p.requires_grad for p in module.parameters())
            module.training = trained and not any(isinstance(m, Int8Linear) for m in module.modules())
        return self

    def half(self, *args):
        """As torch's; for an int8 model, whose transformers' method refuses, that of what is not int8."""
        return self.to(torch.float16) if is_int8_model(self) else super().half(*args)  # type: ignore[arg-type,attr-defined,misc]

    def float(self, *args):
        """As torch's; for an int8 model, whose transformers' method refuses, that of what is not int8."""
        return self.to(torch.float32) if is_int8_model(self) else super().float(*args)  # type: ignore[arg-type,attr-defined,misc]

    def save_pretrained(self, *args, **kwargs):
        """As HF's. The configuration of a model with int8 parts says so, whichever part was quantised."""
        if getattr(self.config, "quantization_config", None) is None:  # type: ignore[attr-defined]
            groups = [m.group for m in self.modules() if isinstance(m, Int8Linear)]  # type: ignore[attr-defined]
            if groups:
                _quantizer.mark(self, (), max(groups))  # type: ignore[arg-type]
        return super().save_pretrained(*args, **kwargs)  # type: ignore[misc]

    def load_state_dict(self, state_dict, *args, **kwargs):
        """As torch's. RuntimeError where a layer is int8 in `state_dict` only, with strict=False too."""
        scale = ".weight_scale"
        int8 = [key.removesuffix(scale) for key in state_dict if key.endswith(scale)]
        modules = dict(self.named_modules()) if int8 else {}  # type: ignore[attr-defined]
        for name in int8:
            if name in modules and not hasattr(modules[name], "weight_scale"):
                raise RuntimeError(
                    f"state_dict: {name} is int8, but the model's layer is not; quantize the model with the same "
                    "arguments first, or load the checkpoint with from_pretrained"
                )
        return super().load_state_dict(state_dict, *args, **kwargs)  # type: ignore[misc]

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args, **kwargs):
        """As HF's. ValueError if the output layer is int8."""
        table, head = self.get_input_embeddings(), self.get_output_embeddings()  # type: ignore[attr-defined]
        if new_num_tokens is not None and new_num_tokens != table.weight.shape[0] and isinstance(head, Int8Linear):
            raise ValueError(
                f"new_num_tokens: the int8 output layer has {head.out_features} outputs and cannot be resized, got "
                f"{new_num_tokens}; add tokens before the model is quantised, or dequantize() it first"
            )
        return super().resize_token_embeddings(new_num_tokens, *args, **kwargs)  # type: ignore[misc]

    @classmethod
    def is_custom_code(cls) -> bool:
        """False, as for transformers' own classes: then a seed gives the same initial weights as there."""
        return not cls.__module__.startswith(f"{__package__}.")

    def explain(self) -> str:
        """Which parts of this model use the fast path, and why the others do not; see transformer_fast.explain."""
        return explain_model(self, ModelMixin)  # type: ignore[arg-type]

    def post_init(self):
        """As HF's, after the layers got our classes, some of which support gradient checkpointing where HF's do not."""
        if not runs_as_hugging_face(type(self)):
            self._adopted.adopt(self)  # type: ignore[arg-type]
        super().post_init()  # type: ignore[misc]

    def why_hf_loop(self) -> str:
        """'' when generate may decode with this package's engine; else why transformers' loop runs."""
        return _stock.why_hf_loop(self)


stock.allow_called(lambda module, kind, name: isinstance(module, ModelMixin))


_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}


def activation_name(hidden_act) -> str | None:
    """The name of an HF activation in ops.bias_activation, or None: then its module is called."""
    return _ACTIVATIONS.get(hidden_act) if isinstance(hidden_act, str) else None
