"""T5's relative position bias as the kernels read it: one value per head and distance (key - query position)."""

import functools
from collections.abc import Callable

import torch

from .eager import relative_buckets


def lookup(spec, reach: int | None = None) -> tuple[int, torch.Tensor | None]:
    """reach, and the bias of each head at distances -reach .. reach, (H, 2 * reach + 1) float32.

    If reach is None, it is the smallest distance beyond which all keys fall into the last bucket.
    """
    table = spec.relative_bias
    if table is None:
        return 0, None
    reach, bucket = buckets(spec, reach)
    return reach, table.detach().float().t().index_select(1, bucket)


def buckets(spec, reach: int | None = None) -> tuple[int, torch.Tensor]:
    """reach, and the bucket of each distance -reach .. reach, int32 (2 * reach + 1,)."""
    table = spec.relative_bias
    if reach is None:
        reach = max(spec.relative_max_distance, table.shape[0])
    build: Callable[..., torch.Tensor] = _bucket_vector
    if table.is_cuda and torch.cuda.is_current_stream_capturing():
        build = _bucket_vector.__wrapped__  # do not cache: a tensor in a CUDA graph's pool must not outlive the graph
    return reach, build(table.shape[0], spec.relative_max_distance, spec.relative_bidirectional, reach, table.device)


@functools.lru_cache(maxsize=64)
def _bucket_vector(count, max_distance, bidirectional, reach, device) -> torch.Tensor:
    distance = torch.arange(-reach, reach + 1, device=device)
    return relative_buckets(distance, count, max_distance, bidirectional).to(torch.int32)
