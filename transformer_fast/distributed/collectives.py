"""Communication between processes, with gradients.

Gradients are sums over processes: each process has its own loss, and the gradients of received tensors are sent back to
the processes they came from.
"""

import torch
import torch.distributed as dist

__all__ = ["Ring", "all_gather", "exchange", "from_first"]


class Ring:
    """Sends tensors to the next process while it receives those of the previous one."""

    def __init__(self, group: dist.ProcessGroup):
        self.group, self.rank, self.size = group, dist.get_rank(group), dist.get_world_size(group)
        self._next = dist.get_global_rank(group, (self.rank + 1) % self.size)
        self._before = dist.get_global_rank(group, (self.rank - 1) % self.size)

    def start(self, tensors: list[torch.Tensor]) -> tuple[list[torch.Tensor], list]:
        """(the tensors to receive, the requests to wait for). tensors: contiguous; must not be written to until
        then."""
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
    """All-to-all. x (size, ...): slice i goes to process i. Returns (size, ...): slice i is from process i."""
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
    """x of every process: (size, *x.shape)."""
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
    """Broadcast x of the first process to all."""
    return _FromFirst.apply(x, group)
