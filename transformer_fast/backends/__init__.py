"""Backend selection: which backend runs a call, and why the others do not.

Every op gets its backend from `select(call)`. Automatic selection tries the backend that measured.py names for the
call, then those of `ORDER` for the call's device, and takes the first one that can run the call.
`with backend("triton")` or TRANSFORMER_FAST_BACKEND=triton forces one. A call that the forced backend cannot run raises
an error with every reason.
"""

import contextlib
import functools
import importlib
import os
from collections.abc import Iterator

import torch

from .contract import OPS, Backend, Call

__all__ = ["Backend", "Call", "NAMES", "OPS", "ORDER", "backend", "explain", "info", "select"]

# measured.py puts another backend first for the calls that it was measured faster for.
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
    """Force every op inside the block onto one backend.

    This applies to the whole process, because the backward pass may run on another thread.

    Args:
        name: "eager", "cpu", "triton", "cuda" or "sdpa".

    Returns:
        A context manager.

    Raises:
        ValueError: for an unknown name.
        BackendError: from an op inside the block that the backend cannot run, with every reason.

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


# Read on every call. Decoding by os.environ would cost more than the rest of the selection.
_environment = getattr(os.environ, "_data", os.environ)
_VARIABLE = getattr(os.environ, "encodekey", str)("TRANSFORMER_FAST_BACKEND")


def forced_name() -> str | None:
    """The backend that backend() or the environment variable forces now; None for automatic selection."""
    if _forced is None and _VARIABLE in _environment:
        return os.environ["TRANSFORMER_FAST_BACKEND"] or None
    return _forced


def select(call: Call | tuple) -> Backend:
    """The backend that runs this call. `call` may be a plain tuple of a Call's fields, which is cheaper to create."""
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


def _verified():
    from . import verified

    return verified


def _measured(call: Call):
    from . import measured  # imported here, because it imports Call from this module

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
    """Say which backend runs `call`, and why each of the others does not. A forced backend is the only one listed.

    Args:
        call: a `Call`.

    Returns:
        A text: a line that describes the call, then one line per backend.

    Raises:
        ValueError: for an op that does not exist.
        TypeError: if `call` is not a `Call`.

    Examples:
        >>> import torch, transformer_fast
        >>> call = transformer_fast.backends.Call("norm", "cpu", torch.float32, 768)
        >>> lines = transformer_fast.explain(call).splitlines()
    """
    if not isinstance(call, (str, tuple)):
        came = f"the class {call.__name__}" if isinstance(call, type) else type(call).__name__
        raise TypeError(f"explain: wanted a model (a torch.nn.Module) or a Call, got {came}")
    op = call if isinstance(call, str) else call[0]
    if op not in OPS:
        raise ValueError(f"explain: there is no op {op!r}; there are {', '.join(OPS)}")
    if isinstance(call, str):
        raise TypeError(f"explain: wanted a Call, got the name of an op; pass Call({op!r}, device, dtype, size)")
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
        lines.append("  order: by design, not measured on a GPU")
    return "\n".join(lines)


def without_kernels(model: torch.nn.Module) -> str:
    """A line of `explain` for a model on a CPU without the native kernels; '' for other models."""
    device = next((p.device.type for p in model.parameters()), "cpu")
    reason = _native().load() if device == "cpu" else ""
    return f"  kernels: none, the fast path runs in plain PyTorch: {reason}" if reason else ""


def info() -> dict[str, str]:
    """What is active, what is missing and what the missing parts would bring. `transformer-fast info` prints it.

    Returns:
        A dict of texts with the keys "torch", "GPU", "native CPU kernels", "Triton kernels", "CUDA kernels", "tested on
        a GPU" and "forced backend".

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
        "tested on a GPU": _verified().summary(),
        "forced backend": forced_name() or "none",
    }
