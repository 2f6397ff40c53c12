"""Launch plans: the launches of a kind of call are computed once and then repeated with other tensors.

Grids, block sizes, strides and Triton's choice of a compiled kernel depend only on shapes, strides, dtypes and options.
Computing them takes far longer than a launch. `run` caches them by a key of everything they depend on. A plan
is a list of steps on numbered tensors: first the inputs of the call, then the tensors that the plan allocates. Triton
chooses the compiled kernel in the first run of a plan; later runs launch its handle directly. Under the interpreter,
and with Triton versions whose handle is not known here, every launch goes through Triton's public interface.
"""

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
import triton
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from . import remembered

_MOST = 1024
_plans: dict[Hashable, "Steps"] = {}
# The call of a compiled kernel, private to Triton, is (grid, stream, function, metadata, hooks, arguments) in these.
_KNOWN = (3, 6) <= tuple(int(n) for n in triton.__version__.split(".")[:2]) < (3, 11)


class Plan:
    """The steps of one kind of call. They are built with the tensors of the first such call."""

    def __init__(self, inputs: Sequence[torch.Tensor | None]):
        # detach() makes an alias of each: a tensor that is passed twice needs two numbers, because a later call may
        # pass two tensors there.
        self.tensors: list[Any] = [None if t is None else t.detach() for t in inputs]
        self.inputs = tuple(self.tensors)
        self.steps: list[Callable] = []
        self.cached = _KNOWN

    def _number(self, t: torch.Tensor) -> int:
        return next(i for i, known in enumerate(self.tensors) if known is t)

    def empty(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device, zeros: bool = False):
        """A tensor that every call allocates anew."""
        make = torch.zeros if zeros else torch.empty
        shape = tuple(shape)
        self.steps.append(lambda tensors: tensors.append(make(shape, dtype=dtype, device=device)))
        self.tensors.append(torch.empty(shape, dtype=dtype, device=device))
        return self.tensors[-1]

    def then(self, function: Callable, *tensors: torch.Tensor) -> None:
        """Run function(*tensors) in every call."""
        numbers = [self._number(t) for t in tensors]
        self.steps.append(lambda found: function(*[found[i] for i in numbers]))

    def call(self, kernel, grid: tuple[int, ...], *arguments, **options) -> None:
        """`launch` with positional arguments, for the launchers in kernels/."""
        self.launch(kernel, grid, dict(zip(kernel.arg_names, arguments)) | options)

    def launch(self, kernel, grid: tuple[int, ...], arguments: dict) -> None:
        """Run kernel[grid](**arguments) in every call."""
        options = {name: value for name, value in arguments.items() if name not in kernel.arg_names}
        values = [arguments[name] for name in kernel.arg_names]
        places = [(i, self._number(v)) for i, v in enumerate(values) if isinstance(v, torch.Tensor)]
        for place, _ in places:
            values[place] = None
        self.cached = self.cached and isinstance(kernel, JITFunction)
        self.steps.append(_Launch(kernel, grid, values, places, options))


class _Launch:
    def __init__(self, kernel, grid, values, places, options):
        self.kernel, self.grid, self.values, self.places, self.options = kernel, grid, values, places, options
        self.direct: tuple | None = None

    def __call__(self, tensors) -> None:
        values = self.values.copy()
        if self.direct is None or _hooked():
            for place, number in self.places:
                values[place] = tensors[number]
            names = self.kernel.arg_names
            compiled = self.kernel[self.grid](**dict(zip(names, values)), **self.options)
            if _KNOWN and isinstance(compiled, CompiledKernel):
                x, y, z = (*self.grid, 1, 1)[:3]
                # A plan is for one device, which is the current one when it runs.
                device, stream = driver.active.get_current_device(), driver.active.get_current_stream
                self.direct = (
                    compiled.run, (x, y, z), stream, device,
                    (compiled.function, compiled.packed_metadata, None, None, None),
                )  # fmt: skip
            return
        run, grid, stream, device, handle = self.direct
        for place, number in self.places:
            values[place] = tensors[number].data_ptr()  # of a tensor, Triton would ask the driver about its address
        run(*grid, stream(device), *handle, *values)


def _hooked() -> bool:
    """Whether a profiler has hooked launches. They must then go through Triton, which calls the hooks."""
    return bool(getattr(knobs.runtime.launch_enter_hook, "calls", None)) or knobs.runtime.debug


class Steps(list):
    """The steps of a plan. Calling it runs them on the given tensors, in the order of the plan's inputs."""

    def __call__(self, *tensors: torch.Tensor | None) -> None:
        found = list(tensors)
        for step in self:
            step(found)


def run(
    key: Hashable, inputs: Sequence[torch.Tensor | None], build: Callable[[Plan], None], strided: int | None = None
) -> Steps | None:
    """Run the plan that `build(plan)` makes from plan.inputs, or the cached plan of an earlier call with the same key.

    key: what the plan depends on, the device included. Shape, strides, dtype and alignment of the inputs are added. Of
    the inputs after the first `strided`, only dtype and alignment are: they are contiguous, in shapes that follow.
    Returns the plan for further calls, if it may be kept.
    """
    whole = [key]
    for t in inputs[:strided]:
        whole.append(None if t is None else (t.shape, t.stride(), t.dtype, t.data_ptr() % 16))
    if strided is not None:
        for t in inputs[strided:]:
            whole.append(None if t is None else (t.dtype, t.data_ptr() % 16))
    name = tuple(whole)
    steps = _plans.get(name)
    if steps is not None:
        steps(*inputs)
        return steps
    plan = Plan(inputs)
    build(plan)
    steps = Steps(plan.steps)
    steps(*inputs)
    if not plan.cached:
        return None
    if len(_plans) >= _MOST:
        _plans.pop(next(iter(_plans)), None)
    _plans[name] = steps
    return steps


def forget() -> None:
    """Drop all cached plans."""
    _plans.clear()
    remembered.forget()
