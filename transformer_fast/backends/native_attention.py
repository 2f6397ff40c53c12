"""The arguments of the native attention ops, the same on the CPU and on a GPU: csrc/bindings/attention.hpp."""

import operator

import torch

from .specs import AttentionSpec

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Fields that the native ops do not take: they get the relative bias at each distance, not the bucket table.
_TABLE = ("relative_max_distance", "relative_bidirectional")
_fields = operator.attrgetter(*(name for name in AttentionSpec._fields if name not in _TABLE))


def arguments(spec: AttentionSpec, relative_bias: torch.Tensor | None) -> tuple:
    """The fields of the spec in their order. relative_bias, (H, distances), replaces the table: see
    relative_bias.lookup()."""
    bias = spec.bias
    if bias is None and relative_bias is None:
        return _fields(spec)
    if bias is not None:
        bias = bias.detach()
        if bias.dtype not in _DTYPES:
            bias = bias.to(torch.float32)
    return _fields(spec._replace(bias=bias, relative_bias=relative_bias))
