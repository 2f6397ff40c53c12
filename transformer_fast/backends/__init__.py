"""Who computes a call: the backends, the choice among them, and why one cannot.

Every op asks `select(call)` for a backend. Automatic choice goes down `ORDER` for the call's device, after what
measured.py puts first, and takes the first backend that can; `with backend("triton")` or
TRANSFORMER_FAST_BACKEND=triton forces one, and then a call it cannot take raises with every reason.
"""

import contextlib
import functools
import importlib
import os
from collections.abc import Iterator

import torch

from .contract import OPS, Backend, Call

__all__ = ["Backend", "Call", "NAMES", "OPS", "ORDER", "backend", "explain", "info", "select"]

# "cuda" stands behind "triton" until a GPU has shown it faster: measured.py then puts it first where it is.
ORDER = {"cuda": ("triton", "cuda", "sdpa", "eager"), "cpu": ("cpu", "eager")}
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NAMES = tuple(dict.fromkeys(name for names in ORDER.values() for name in names))


class BackendError(RuntimeError):
    """A forced backend cannot run the call."""


_instances: dict[str, Backend] = {}
_forced: str | None = None


def get(name: str) -> Backend:
    if name not in NAMES:
        raise ValueError(f"backend: {name!r} is unknown; there are {', '.join(NAMES)}")
    if name not in _instances:
        module = importlib.import_module(f"{__name__}.{name}")
        _instances[name] = module.BACKEND
    return _instances[name]


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Force every op inside the block onto one backend. Process-wide, as the backward pass may run on another thread.

    Args:
        name: "eager", "cpu", "triton", "cuda" or "sdpa".

    Returns:
        A context manager.

    Raises:
        ValueError: for an unknown name.
        BackendError: in a call that the backend cannot take, with every reason.

    Examples:
        >>> import torch, transformer_fast
        >>> with transformer_fast.backend("eager"):
        ...     y = transformer_fast.layer_norm(torch.randn(2, 8), 8)
    """
    global _forced
    get(name)
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


# Asked in every call, where os.environ's own decoding costs more than all the rest of the choice.
_environment = getattr(os.environ, "_data", os.environ)
_VARIABLE = getattr(os.environ, "encodekey", str)("TRANSFORMER_FAST_BACKEND")


def forced_name() -> str | None:
    """The backend that is forced now, by backend() or the environment."""
    if _forced is None and _VARIABLE in _environment:
        return os.environ["TRANSFORMER_FAST_BACKEND"] or None
    return _forced


def select(call: Call | tuple) -> Backend:
    """The backend that will run this call. A plain tuple of a Call's fields does too, and is quicker to make."""
    return _select(call, forced_name())


@functools.lru_cache(maxsize=4096)
def _select(call: Call | tuple, forced: str | None) -> Backend:
    call = Call(*call)
    if forced:
        chosen = get(forced)
        reasons = chosen.why_not(call)
        if reasons:
            raise BackendError(f"backend {forced!r} cannot run {_describe(call)}: " + "; ".join(reasons))
        return chosen
    for name in _order(call):
        candidate = get(name)
        if not candidate.why_not(call):
            break
    if candidate.name == "eager" and call.device == "cpu" and call.dtype in KERNEL_DTYPES and _native().load():
        _native().warn_missing()
    return candidate


def _native():
    from . import native

    return native


def _measured(call: Call):
    from . import measured  # it imports Call from here

    return measured.line(call)


def _order(call: Call) -> tuple[str, ...]:
    line = _measured(call)
    kernels = [name for name in ORDER.get(call.device, ()) if name != "eager"]
    kernels.sort(key=lambda name: bool(get(name).detour(call)))
    return tuple(dict.fromkeys([*([line.backend] if line else ()), *kernels, "eager"]))


def _describe(call: Call) -> str:
    features = f" with {', '.join(call.features)}" if call.features else ""
    features += f", length {call.length}" if call.length else ""
    return f"{call.op} on {call.device} in {str(call.dtype).removeprefix('torch.')}, size {call.size}{features}"


def explain(call: Call) -> str:
    """Which backend runs `call`, why each earlier one does not, and what a forced one cannot.

    Args:
        call: a `Call`.

    Returns:
        A line per backend.

    Raises:
        ValueError: for an op that does not exist.
        TypeError: for the name of one in the place of a Call.

    Examples:
        >>> import torch, transformer_fast
        >>> call = transformer_fast.backends.Call("norm", "cpu", torch.float32, 768)
        >>> lines = transformer_fast.explain(call).splitlines()
    """
    op = call if isinstance(call, str) else call[0]
    if op not in OPS:
        raise ValueError(f"explain: there is no op {op!r}; there are {', '.join(OPS)}")
    if isinstance(call, str):
        raise TypeError(f"explain: wanted a Call, got an op's name: Call({op!r}, device, dtype, size) says it all")
    call = Call(*call)
    lines = [_describe(call)]
    forced, line = forced_name(), _measured(call)
    if forced:
        reasons = get(forced).why_not(call)
        lines.append(f"  {forced}: forced" + (", but cannot: " + "; ".join(reasons) if reasons else ""))
        return "\n".join(lines)
    chosen = select(call).name
    for name in _order(call):
        reasons = get(name).why_not(call)
        text = "chosen" if name == chosen else "; ".join(reasons) or "could, comes later"
        if not reasons and get(name).detour(call):
            text += f" ({get(name).detour(call)})"
        if line and name == line.backend:
            text += f" (measured fastest: {line.measured})"
        lines.append(f"  {name}: {text}")
    if call.device == "cuda" and not line:
        lines.append("  order: by design, not yet run on a GPU")
    return "\n".join(lines)


def info() -> dict[str, str]:
    """What is active, what is missing and what it would bring; printed by `transformer-fast info`.

    Returns:
        A text by name: "torch", "GPU", "native CPU kernels", "Triton kernels", "CUDA kernels", "forced backend".

    Examples:
        >>> import transformer_fast
        >>> native = transformer_fast.info()["native CPU kernels"]
    """
    native_reason = _native().load()
    triton_backend = get("triton")
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none: kernels run on the CPU"
    return {
        "torch": torch.__version__,
        "GPU": gpu,
        "native CPU kernels": f"active ({_native().current_isa()})"
        if not native_reason
        else f"missing: {native_reason}. They would bring fused attention, norms and activations on the CPU",
        "Triton kernels": triton_backend.status(),
        "CUDA kernels": get("cuda").status(),
        "forced backend": forced_name() or "none",
    }
