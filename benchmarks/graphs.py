"""Calls as CUDA graphs: replaying one times its kernels without the CPU's part of launching them."""

import contextlib
import functools
from collections.abc import Callable, Iterator

import torch

__all__ = ["graphed", "on_capture_stream"]

_failed: list[torch.cuda.CUDAGraph] = []  # kept, because torch's allocators may still refer to them


@functools.cache
def _stream() -> torch.cuda.Stream:
    """The stream of all captures. Autograd runs a backward pass on the stream of its forward pass, and waits for the
    stream where a leaf was first used: with several streams, a capture would wait for work outside it."""
    return torch.cuda.Stream()


@contextlib.contextmanager
def on_capture_stream() -> Iterator[None]:
    """Run the block on the stream of the captures, after the work of the current stream and before its later work. The
    forward pass of a backward pass that is to be captured must run here."""
    stream, current = _stream(), torch.cuda.current_stream()
    stream.wait_stream(current)
    try:
        with torch.cuda.stream(stream):
            yield
    finally:
        current.wait_stream(stream)


def graphed(call: Callable[[], object]) -> Callable[[], object]:
    """A CUDA graph of `call`. Every replay returns the same output, in the graph's memory.

    If `call` cannot be captured, its error is raised, and torch is left as it was before.
    """
    with on_capture_stream():
        for _ in range(3):
            call()
    graph, pool, current = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle(), torch.cuda.current_stream()
    device = torch.cuda.current_device()
    generator = torch.cuda.default_generators[device]
    state = generator.clone_state()
    try:
        with torch.cuda.graph(graph, pool=pool, stream=_stream()):
            output = call()
    except Exception as error:
        # torch.cuda.graph then restores nothing: it stays on the stream of the capture, allocates from the graph's
        # memory, and its random numbers are those of a capture, which every later torch.randn refuses.
        _failed.append(graph)
        torch.cuda.set_stream(current)
        generator.graphsafe_set_state(state)
        with contextlib.suppress(RuntimeError):  # the first raises if the capture itself ended in order
            torch._C._cuda_endAllocateToPool(device, pool)
            torch._C._cuda_releasePool(device, pool)
        # The error of the call comes first; that the capture ended with an error follows from it.
        raise (error.__context__ if isinstance(error.__context__, Exception) else error) from None

    def replay():
        graph.replay()
        return output

    return replay
