"""What the cases time of a function of the inputs x: `wrap(function)(x)` is the call.

x.leaves: the tensors that get gradients. x.upstream: the gradient of the output.
"""

from collections.abc import Callable

import torch

import transformer_fast as tf

from .case import OURS, Candidate
from .graphs import graphed

__all__ = ["OURS_CUDA", "backward_only", "cuda_candidate", "forward_only", "replayed", "with_gradients"]

OURS_CUDA = f"{OURS} cuda"  # the CUDA C++ kernels; OURS is the default choice of kernels


def replayed(wrap: Callable, device: str) -> Callable:
    """`wrap`, with its calls in CUDA graphs on a GPU: the time of short kernels is that of the kernels alone. Launching
    them one by one takes longer than they run; that time is measured by the cases of the group host."""

    def with_graphs(function: Callable) -> Callable:
        prepare = wrap(function)
        return lambda x: graphed(lambda: prepare(x)) if device == "cuda" else prepare(x)

    return with_graphs


def forward_only(function: Callable) -> Callable:
    def prepare(x):
        def call():
            with torch.no_grad():
                return function(x)

        return call

    return prepare


def with_gradients(function: Callable) -> Callable:
    """Forward and backward; returns the output and the gradients of every leaf."""

    def prepare(x):
        def call():
            out = function(x)
            return out, *torch.autograd.grad(out, x.leaves, x.upstream)

        return call

    return prepare


def backward_only(function: Callable) -> Callable:
    """The backward alone, repeated on one graph: gradients of every leaf."""

    def prepare(x):
        out = function(x)
        return lambda: torch.autograd.grad(out, x.leaves, x.upstream, retain_graph=True)

    return prepare


def cuda_candidate(prepare: Callable) -> Candidate:
    """The same call with the CUDA C++ kernels. The backend is set in each call, forward and backward."""

    def prepare_on_cuda(x):
        with tf.backend("cuda"):
            call = prepare(x)

        def forced():
            with tf.backend("cuda"):
                return call()

        return forced

    return Candidate(OURS_CUDA, prepare_on_cuda, works_on=("cuda",))
