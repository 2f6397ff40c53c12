"""Shared by all ops: registration with torch.library, the paths from a call to its kernel, and input checks."""

import collections
import numbers
import sys
import typing
from collections.abc import Callable, Sequence

import torch
from torch.autograd import forward_ad

from ..backends import forced_name
from ..backends.specs import SymInt, layout

# Schemas are registered from Python. The raw kernels come from backends/.
LIBRARY = torch.library.Library("transformer_fast", "FRAGMENT")

_PLAIN = (torch.Tensor, torch.nn.Parameter)
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_FLOATING = (*_FLOATS, torch.float64)
_batched = torch._C._functorch.is_legacy_batchedtensor


def schema_of(spec: type[tuple]) -> str:
    """The argument list of a schema, generated from the fields of a spec."""
    hints = typing.get_type_hints(spec, include_extras=True)
    return ", ".join(f"{_SCHEMA_TYPES[hints[name]]} {name}" for name in hints)


_SCHEMA_TYPES = {
    torch.Tensor: "Tensor", torch.Tensor | None: "Tensor?", list[torch.Tensor | None]: "Tensor?[]", SymInt: "SymInt",
    int: "int", float: "float", bool: "bool",
}  # fmt: skip


def define(name: str, schema: str, forward, fake, *, setup_context=None, backward=None, eager=None) -> Callable:
    """Register one op with its fake kernel and, if given, its gradient.

    Args:
        name: name of the op.
        schema: its arguments and results.
        forward: function of the arguments.
        fake: the same for fake tensors: returns empty tensors of the right shapes and dtypes.
        setup_context: function (ctx, inputs, output) that saves what the backward pass needs.
        backward: function (ctx, need, *grads) that returns gradients by argument name; `need` says by name which are
            needed. A name that is missing, or not needed, gets None.
        eager: function of the arguments that is called instead of forward where torch's dispatcher is not. Its results
            may be None, where those of forward are empty tensors.

    Returns:
        A function that calls the op. It goes through torch's dispatcher under a compiler, a tracer, a dispatch mode or
        with tensor subclasses. Otherwise it calls the same functions directly, as the dispatcher costs more than a
        small call.
    """
    LIBRARY.define(name + schema)
    LIBRARY.impl(name, forward, "CompositeExplicitAutograd")
    qualified = f"transformer_fast::{name}"
    torch.library.register_fake(qualified, fake, lib=LIBRARY)
    op = getattr(torch.ops.transformer_fast, name).default
    run = eager = eager or forward
    if backward is not None:
        gradients = by_position(backward, tuple(a.name for a in op._schema.arguments))
        torch.library.register_autograd(qualified, gradients, setup_context=setup_context, lib=LIBRARY)
        run = _function(name, eager, setup_context, gradients).apply

    def call(*args):
        if _watched():
            return op(*args)
        for t in args:
            if isinstance(t, torch.Tensor) and (type(t) not in _PLAIN or t.is_meta or _batched(t)):
                return op(*args)
        return run(*args)

    return call


def by_position(backward, names: tuple[str, ...], absent: tuple[str, ...] = ()):
    """The backward of an autograd.Function whose arguments have these names, from `backward` as for define. absent:
    names of arguments that the Function does not have, and `backward` knows."""
    needs, place = collections.namedtuple("needs", (*names, *absent)), {name: i for i, name in enumerate(names)}
    none = (False,) * len(absent)

    def gradients(ctx, *grads):
        need = needs._make((*ctx.needs_input_grad, *none))
        found = [None] * len(names)
        for name, grad in backward(ctx, need, *grads).items():
            if name in place and need[place[name]]:
                found[place[name]] = grad
        return tuple(found)

    return gradients


def _function(name: str, forward, setup_context, backward) -> type[torch.autograd.Function]:
    def forward_of(ctx, *args):
        output = forward(*args)
        setup_context(ctx, args, output)
        return output

    members = {"forward": staticmethod(forward_of), "backward": staticmethod(backward)}
    return type(f"transformer_fast::{name}", (torch.autograd.Function,), members)


def save(ctx, spec: tuple, *others: torch.Tensor) -> None:
    """Save a spec and further tensors for the backward pass."""
    where = layout(type(spec))
    ctx.kind, ctx.constants = type(spec), where.constants(spec)
    ctx.save_for_backward(*where.tensors(spec), *others)


def saved(ctx) -> tuple:
    """What `save` has saved: the spec, then the further tensors."""
    tensors, where = ctx.saved_tensors, layout(ctx.kind)
    return ctx.kind(*where.order((*tensors[: where.tensor_count], *ctx.constants))), *tensors[where.tensor_count :]


def direct(*tensors: torch.Tensor | None) -> bool:
    """True when a call may skip torch's dispatcher: plain tensors with memory, no gradient needed, no tracing. Only the
    first tensor is checked for the meta device."""
    if _watched() or (tensors[0] is not None and tensors[0].is_meta):
        return False
    grad = torch.is_grad_enabled()
    for t in tensors:  # noqa: SIM110 - runs on every call, and a generator takes three times as long
        if t is not None and (type(t) not in _PLAIN or (grad and t.requires_grad)):
            return False
    return True


def signature(tensors: tuple[torch.Tensor | None, ...], *options, strided: bool = False) -> tuple | None:
    """All that the checks of a call and its kernels look at, for calls that may skip both torch's dispatcher and, once
    they have been made, the checks.

    Args:
        tensors: the arguments.
        options: the other arguments, hashable.
        strided: take tensors of any strides; else they must be contiguous.

    Returns:
        A key, or None if the call cannot be remembered: a tensor is traced, wrapped, not dense or not contiguous. Its
        first element says whether a gradient is needed.
    """
    if _watched():
        return None
    enabled, needed = torch.is_grad_enabled(), False
    about: list = []
    for t in tensors:
        if t is None:
            about.append(None)
            continue
        if type(t) not in _PLAIN or _batched(t) or t.is_meta or t.layout is not torch.strided or t.is_nested:
            return None
        if strided:
            about.append(t.stride())
        elif not t.is_contiguous():
            return None
        if enabled and t.requires_grad:
            needed = True
        about += (t.shape, t.dtype, t.device, t.data_ptr() & 15)
    return (needed, *about, options, forced_name())


def plain(*tensors: torch.Tensor | None) -> bool:
    """True when these tensors are not traced, transformed or wrapped, so that kernels may read their memory
    directly."""
    return not _watched() and is_plain(*tensors)


def batched(*tensors: torch.Tensor | None) -> bool:
    """True when one of these is a batched tensor of gradients (is_grads_batched, vectorized jacobians), which only
    torch's dispatcher can unpack."""
    return any(t is not None and _batched(t) for t in tensors)


def is_plain(*tensors: torch.Tensor | None) -> bool:
    for t in tensors:  # noqa: SIM110 - as above
        if t is not None and type(t) not in _PLAIN:
            return False
    return True


def concrete(t: torch.Tensor) -> bool:
    """Whether code may read the values of `t` and branch on them.

    Args:
        t: any tensor.

    Returns:
        False for fake and meta tensors, under torch.func.vmap, and while a graph is recorded that will run with other
        inputs (torch.export, torch.jit.trace); else True.
    """
    return not (
        type(t) not in _PLAIN
        or t.is_meta
        or exporting()
        or torch._C._get_tracing_state() is not None
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None
    )


def exporting() -> bool:
    """Whether torch.export is recording a graph.

    torch.compiler.is_exporting() cannot be used: the compiler of torch 2.11 treats it as True whenever it traces.

    Returns:
        A bool.
    """
    return torch.compiler._is_exporting_flag


def _watched() -> bool:
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._get_tracing_state() is not None
        or forward_ad._current_level >= 0
    )


def transformed() -> bool:
    """True under forward-mode differentiation and under torch.func's grad, jvp and similar. Registered ops have no
    rules for these, and tangents would be lost silently, so ops run in plain PyTorch there."""
    if torch.compiler.is_compiling():
        return False
    if forward_ad._current_level >= 0:
        return True
    if torch._C._functorch.peek_interpreter_stack() is None:
        return False
    vmap = torch._C._functorch.TransformType.Vmap
    return any(level.key() != vmap for level in torch._C._functorch.get_interpreter_stack() or ())


def gradients(
    function: Callable, inputs: Sequence[torch.Tensor | None], grads: Sequence[torch.Tensor | None]
) -> list[torch.Tensor | None]:
    """Differentiable gradients of function(*inputs), for a backward pass under create_graph.

    Args:
        function: plain PyTorch; returns as many tensors as there are grads.
        inputs: its arguments.
        grads: the gradient of each output; None where there is none.

    Returns:
        One gradient per input, None for inputs that need none.
    """
    with torch.enable_grad():
        # Aliases, because a tensor that is passed twice needs two gradients.
        inputs = [t.view_as(t) if t is not None and t.requires_grad else t for t in inputs]
        arriving = [(o, g) for o, g in zip(function(*inputs), grads) if g is not None]
        wanted = [t for t in inputs if t is not None and t.requires_grad]
        found = iter(torch.autograd.grad(
            [o for o, _ in arriving], wanted, [g for _, g in arriving], create_graph=True, materialize_grads=True
        ))  # fmt: skip
        return [next(found) if t is not None and t.requires_grad else None for t in inputs]


def gradients_of(
    function: Callable, spec: tuple, names: Sequence[str], grads: Sequence[torch.Tensor | None]
) -> dict[str, torch.Tensor | None]:
    """`gradients` for the fields `names` of a spec, by name. function: takes the spec."""
    index = [spec._fields.index(name) for name in names]  # type: ignore[attr-defined]

    def of_fields(*tensors):
        return function(spec._replace(**dict(zip(names, tensors))))  # type: ignore[attr-defined]

    return dict(zip(names, gradients(of_fields, [spec[i] for i in index], grads)))


def draw_rng(device: torch.device, generator: torch.Generator | None = None) -> torch.Tensor:
    """{seed, offset}, int64 (2,), for the dropout of one call. They are drawn from torch's generator of `device`, so
    that manual_seed, fork_rng, checkpointing and CUDA graphs behave as they do for torch's dropout."""
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator: wanted a torch.Generator or None, got {type(generator).__name__}")
    return torch.randint(-(2**63), 2**63 - 1, (2,), dtype=torch.int64, device=device, generator=generator)


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype in which matrix products run under autocast; None outside it."""
    if device.type != "meta" and torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    return None


# ---- checks: each message names the argument, what was passed and what is expected ----------------
def check_tensor(name: str, t: object) -> None:
    if not isinstance(t, torch.Tensor):
        raise TypeError(f"{name}: wanted a tensor, got {type(t).__name__}")
    if t.layout is not torch.strided or t.is_nested:
        raise TypeError(f"{name}: wanted a dense tensor, got a {'nested' if t.is_nested else t.layout} one")


def check_floating(name: str, t: torch.Tensor) -> None:
    check_tensor(name, t)
    if t.dtype not in _FLOATING:
        raise TypeError(f"{name}: wanted a floating-point tensor (float16, bfloat16, float32), got {t.dtype}")


def check_integers(name: str, t: torch.Tensor) -> None:
    """An int32 or int64 tensor."""
    check_tensor(name, t)
    if t.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name}: wanted an int32 or int64 tensor, got {t.dtype}")


def check_choice(name: str, value: object, choices: Sequence[str | None]) -> None:
    if not isinstance(value, str | None) or value not in choices:
        raise ValueError(f"{name}: {value!r} is unknown; there are {', '.join(map(str, choices))}")


def check_same(name: str, t: torch.Tensor, other_name: str, other: torch.Tensor, *, dtype: bool = True) -> None:
    if t.device != other.device:
        raise ValueError(f"{name}: is on {t.device} but {other_name} is on {other.device}; wanted the same device")
    if dtype and t.dtype != other.dtype:
        raise TypeError(f"{name}: has dtype {t.dtype} but {other_name} has {other.dtype}; wanted the same dtype")


# Symbolic numbers under torch.compile are not float or int, and math.isfinite cannot be traced. Comparisons can.
def check_number(name: str, value: float, low: float = -sys.float_info.max, high: float = sys.float_info.max) -> None:
    """Check that low <= value <= high. The defaults accept every finite number."""
    if type(value) is float and low <= value <= high:  # the usual case, on the path of every call
        return
    if isinstance(value, bool) or not isinstance(value, (int, float, torch.SymFloat, torch.SymInt, numbers.Real)):
        raise TypeError(f"{name}: wanted a number, got {type(value).__name__}")
    if not low <= value <= high:
        if high < sys.float_info.max:
            wanted = f"a number in [{low:g}, {high:g}]"
        elif low > -sys.float_info.max:
            wanted = f"a finite number >= {low:g}"
        else:
            wanted = "a finite number"
        raise ValueError(f"{name}: wanted {wanted}, got {value!r}")


def check_integer(name: str, value: int, low: int, high: int | None = None) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt, numbers.Integral)):
        raise TypeError(f"{name}: wanted an integer, got {type(value).__name__}")
    if value < low or (high is not None and value > high):
        wanted = f"at least {low}" if high is None else f"an integer in [{low}, {high}]"
        raise ValueError(f"{name}: wanted {wanted}, got {value!r}")


def check_flag(name: str, value: bool) -> None:
    # numpy scalars have no __len__; numpy arrays have one.
    if not isinstance(value, (bool, int, torch.SymBool, torch.SymInt)) and (
        type(value).__module__ != "numpy" or hasattr(value, "__len__")
    ):
        raise TypeError(f"{name}: wanted True or False, got {type(value).__name__}")


def check_probability(name: str, p: float) -> None:
    check_number(name, p, 0.0, 1.0)


def check_vector(name: str, t: torch.Tensor | None, width: int, reference: torch.Tensor) -> None:
    if t is None:
        return
    # The usual case first, with the cheapest checks, because this runs on every call.
    if (
        isinstance(t, torch.Tensor) and t.layout is torch.strided and not t.is_nested and t.dtype in _FLOATS
        and t.shape == (width,) and t.device == reference.device
    ):  # fmt: skip
        return
    check_floating(name, t)
    if t.shape != (width,):
        raise ValueError(f"{name}: wanted shape ({width},), got {tuple(t.shape)}")
    check_same(name, t, "input", reference, dtype=False)


def refuse_gradients(op: str, *tensors: torch.Tensor | None) -> None:
    """Raise RuntimeError if a gradient is needed through an op that changes its arguments in place."""
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        raise RuntimeError(f"{op} has no gradient: call it under torch.no_grad()")
    if not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None:
        raise RuntimeError(f"{op} writes to its caches: call it outside torch.func's transforms")
