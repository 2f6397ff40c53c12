"""Sequences split over several devices: context parallelism on torch.distributed."""

from .context import context_parallel, current, resumed

__all__ = ["context_parallel", "current", "resumed"]
