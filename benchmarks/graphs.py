"""Calls as CUDA graphs: replaying one times its kernels without the CPU's part of launching them."""

import contextlib
import functools
from collections.abc import Callable

import torch

__all__ = ["graphed"]

_failed: list[torch.cuda.CUDAGraph] = []  # kept, because torch's allocators may still refer to them


@functools.cache
def _stream() -> torch.cuda.Stream:
    """The stream of all captures. Autograd runs a backward pass on the stream of its forward pass, and waits for the
    stream where a leaf was first used: with several streams, a capture would wait for work outside it."""
    return torch.cuda.Stream()


def graphed(prepare: Callable[[], Callable[[], object]]) -> Callable[[], object]:
    """A CUDA graph of the call that prepare() makes. Every replay returns the same output, in the graph's memory.

    prepare runs on the stream of the capture, as a backward pass runs on the stream of its forward pass. If the call
    cannot be captured, its error is raised, and torch is left as it was before.
    """
    stream, current = _stream(), torch.cuda.current_stream()
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        call = prepare()
        for _ in range(3):
            call()
    current.wait_stream(stream)
    graph, pool, device = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle(), torch.cuda.current_device()
    generator = torch.cuda.default_generators[device]
    state, first = generator.clone_state(), None
    try:
        with torch.cuda.graph(graph, pool=pool, stream=stream):
            try:
                output = call()
            except Exception as error:
                first = error
                raise
    except Exception as error:
        # torch.cuda.graph then restores nothing: it stays on the stream of the capture, allocates from the graph's
        # memory, and its random numbers are those of a capture, which every later torch.randn refuses.
        _failed.append(graph)
        torch.cuda.set_stream(current)
        generator.graphsafe_set_state(state)
        with contextlib.suppress(RuntimeError):  # the first raises if the capture itself ended in order
            torch._C._cuda_endAllocateToPool(device, pool)
            torch._C._cuda_releasePool(device, pool)
        raise first or error from None  # the end of a broken capture fails too, and hides the reason

    def replay():
        graph.replay()
        return output

    return replay
