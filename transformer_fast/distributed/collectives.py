"""What processes say to one another, with gradients.

Gradients are sums over processes: a process's loss counts by itself, and whatever it read from others sends its
gradient back to them.
"""

import torch
import torch.distributed as dist

__all__ = ["Ring", "all_gather", "exchange", "from_first"]


class Ring:
    """Tensors on their way to the next process, while those of the one before are on theirs here."""

    def __init__(self, group: dist.ProcessGroup):
        self.group, self.rank, self.size = group, dist.get_rank(group), dist.get_world_size(group)
        self._next = dist.get_global_rank(group, (self.rank + 1) % self.size)
        self._before = dist.get_global_rank(group, (self.rank - 1) % self.size)

    def start(self, tensors: list[torch.Tensor]) -> tuple[list[torch.Tensor], list]:
        """(what will have arrived, the requests to wait for). tensors: contiguous; not written to until then."""
        arriving = [torch.empty_like(t) for t in tensors]
        calls = []
        for leaving, coming in zip(tensors, arriving):
            calls.append(dist.P2POp(dist.isend, leaving, self._next, self.group))
            calls.append(dist.P2POp(dist.irecv, coming, self._before, self.group))
        return arriving, dist.batch_isend_irecv(calls) if calls else []


def wait(requests: list) -> None:
    for request in requests:
        request.wait()


def _swap(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    x = x.contiguous()
    out = torch.empty_like(x)
    dist.all_to_all_single(out, x, group=group)
    return out


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return _swap(x, group)

    @staticmethod
    def backward(ctx, grad):
        return _swap(grad, ctx.group), None


def exchange(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """x (size, ...): slice i goes to process i; returns (size, ...), slice i from process i."""
    return _Exchange.apply(x, group)


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return _gathered(x, group)

    @staticmethod
    def backward(ctx, grad):
        return _swap(grad, ctx.group).sum(0), None


def _gathered(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    x = x.contiguous()
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, x, group=group)
    return torch.stack(parts)


def all_gather(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """(size, *x.shape): x of every process."""
    return _AllGather.apply(x, group)


class _FromFirst(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        x = x.contiguous().clone()
        dist.broadcast(x, dist.get_global_rank(group, 0), group=group)
        return x

    @staticmethod
    def backward(ctx, grad):
        grad = grad.contiguous().clone()
        dist.all_reduce(grad, group=ctx.group)
        return grad if dist.get_rank(ctx.group) == 0 else torch.zeros_like(grad), None


def from_first(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """x of the first process, in all of them."""
    return _FromFirst.apply(x, group)
