"""T5's relative position bias as the GPU kernels take it: one value a head and distance."""

import functools
from collections.abc import Callable

import torch

from .eager import relative_buckets


def lookup(spec) -> tuple[int, torch.Tensor | None]:
    """reach, and the bias of each head at distances -reach .. reach, (H, 2 * reach + 1) float32. Farther keys share
    the bucket at the end."""
    table = spec.relative_bias
    if table is None:
        return 0, None
    reach, bucket = buckets(spec)
    return reach, table.float().t().index_select(1, bucket)


def buckets(spec) -> tuple[int, torch.Tensor]:
    """reach, and the bucket of each of the distances -reach .. reach, int32."""
    table = spec.relative_bias
    reach = max(spec.relative_max_distance, table.shape[0])
    build: Callable[..., torch.Tensor] = _bucket_vector
    if table.is_cuda and torch.cuda.is_current_stream_capturing():
        build = _bucket_vector.__wrapped__  # memory of a graph's pool must not outlive it in the cache
    return reach, build(table.shape[0], spec.relative_max_distance, spec.relative_bidirectional, reach, table.device)


@functools.lru_cache(maxsize=32)
def _bucket_vector(count, max_distance, bidirectional, reach, device) -> torch.Tensor:
    distance = torch.arange(-reach, reach + 1, device=device)
    return relative_buckets(distance, count, max_distance, bidirectional).to(torch.int32)
