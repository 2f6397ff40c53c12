"""Converts every shape that torch's scaled_dot_product_attention accepts to the kernels' (B, H, S, D)."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F


class Shaped(NamedTuple):
    query: torch.Tensor  # (B, H, Sq, D)
    key: torch.Tensor  # (B, Hk, Sk, D), Hk divides H
    value: torch.Tensor  # (B, Hk, Sk, D)
    leading: tuple[int, ...]  # the dimensions of the result before (Sq, width)
    width: int  # head dim of the result; the kernels' D is the larger of it and query's head dim
    batch: tuple[int, ...]  # the leading dimensions that became B

    def restore(self, out: torch.Tensor) -> torch.Tensor:
        """(B, H, Sq, D) -> (*leading, Sq, width)."""
        return out[..., : self.width].reshape(*self.leading, *out.shape[2:3], self.width)

    def restore_lse(self, lse: torch.Tensor) -> torch.Tensor:
        return lse.reshape(*self.leading, lse.shape[2])

    def restrict(self, name: str, t: torch.Tensor) -> torch.Tensor:
        """Turn a mask or bias that broadcasts to (*leading, Sq, Sk) into one that broadcasts to (B, H, Sq, Sk)."""
        rank = len(self.leading) + 2
        if rank == 3 and t.dim() == 3:
            return t.unsqueeze(1)
        if rank <= 4:
            return t
        if t.dim() > rank:
            raise ValueError(f"{name}: wanted at most {rank} dimensions, got shape {tuple(t.shape)}")
        t = t[(None,) * (rank - t.dim())]
        rest = t.shape[-3:]
        if math.prod(t.shape[:-3]) == 1:
            return t.reshape(1, *rest)
        try:
            return t.expand(*self.batch, *rest).reshape(-1, *rest)
        except RuntimeError:
            raise ValueError(
                f"{name}: wanted leading dimensions that broadcast to {self.batch}, got shape {tuple(t.shape)}"
            ) from None


def shaped(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, enable_gqa: bool) -> Shaped:
    """Raises ValueError, with the name of the argument, for shapes that torch does not accept together either."""
    if query.dim() == key.dim() == value.dim() == 4:
        b, h, _, d = query.shape
        if key.shape == value.shape and key.shape[:2] == (b, h) and key.shape[3] == d and h:
            return Shaped(query, key, value, (b, h), d, (b,))  # the usual case, on the path of every call
    tensors = {"query": query, "key": key, "value": value}
    for name, t in tensors.items():
        if t.dim() < 2:
            raise ValueError(f"{name}: wanted 4 dimensions (B, H, S, D), or 2 or more, got shape {tuple(t.shape)}")
    if key.shape[-1] != query.shape[-1]:
        raise ValueError(f"key: wanted head dim {query.shape[-1]} as query has, got {key.shape[-1]}")
    if value.shape[-2] != key.shape[-2]:
        raise ValueError(f"value: wanted {key.shape[-2]} positions as key has, got {value.shape[-2]}")
    rank = max(t.dim() for t in tensors.values())
    if rank < 4:  # (N, S, D): one head
        tensors = {name: t[(None,) * (3 - t.dim())].unsqueeze(1) for name, t in tensors.items()}
    else:
        # A tensor with all dimensions must stay the same object: the caller tests that to see if anything changed.
        tensors = {name: t if t.dim() == rank else t[(None,) * (rank - t.dim())] for name, t in tensors.items()}
    batch = _broadcast_batch(tensors)
    heads = _heads(tensors, enable_gqa)
    flat = []
    for t, n in zip(tensors.values(), heads):
        if t.shape[:-2] != (*batch, n):
            t = t.expand(*batch, n, *t.shape[-2:])
        flat.append(t if t.dim() == 4 else t.reshape(-1, *t.shape[-3:]))
    query, key, value = flat
    width, dim = value.shape[-1], query.shape[-1]
    if width < dim:
        value = F.pad(value, (0, dim - width))
    elif width > dim:
        query, key = (F.pad(t, (0, width - dim)) for t in (query, key))
    leading = (*batch, heads[0]) if rank > 3 else batch if rank == 3 else ()
    return Shaped(query, key, value, tuple(leading), width, tuple(batch))


def _broadcast_batch(tensors: dict[str, torch.Tensor]) -> tuple[int, ...]:
    batch = list(tensors["query"].shape[:-3])
    for name in ("key", "value"):
        for i, n in enumerate(tensors[name].shape[:-3]):
            if batch[i] == 1:
                batch[i] = n
            elif n not in (1, batch[i]):
                raise ValueError(
                    f"{name}: wanted batch {tuple(batch)}, or one that broadcasts to it, as query and key have, got "
                    f"{tuple(tensors[name].shape[:-3])}"
                )
    return tuple(batch)


def _heads(tensors: dict[str, torch.Tensor], enable_gqa: bool) -> tuple[int, int, int]:
    """The numbers of heads of query, key and value for the kernels. Key and value have the same number, which divides
    query's."""
    h, hk, hv = (t.shape[-3] for t in tensors.values())
    if enable_gqa:
        if h == 0 or hk == 0 or h % hk:
            raise ValueError(f"key: wanted a number of heads that divides query's {h}, got {hk}")
        if hv != hk:
            raise ValueError(f"value: wanted {hk} heads as key has, got {hv}")
        return h, hk, hk
    most = max(h, hk, hv)
    if min(h, hk, hv) == 0:
        raise ValueError(f"query: wanted at least one head in query, key and value, got {h}, {hk} and {hv}")
    if hk not in (1, most) or h not in (1, most):
        raise ValueError(f"key: has {hk} heads but query has {h}; pass enable_gqa=True to share key heads")
    if hv not in (1, most):
        raise ValueError(f"value: wanted {hk} heads as key has, got {hv}")
    shared = 1 if hk == hv == 1 else most
    return most, shared, shared
