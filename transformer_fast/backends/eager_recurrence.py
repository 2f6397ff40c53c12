"""Recurrent layers in plain PyTorch, a step at a time."""

import torch
import torch.nn.functional as F

__all__ = ["recurrence", "recurrence_backward"]


def recurrence(spec) -> tuple[torch.Tensor, ...]:
    """Of a RecurrenceSpec: out, the last hidden state and, of an LSTM, memory (else None), the gates (positions, 4 * H)
    as the kernels keep them, and the memories (positions, H) or None. Differentiable in all tensors."""
    gates, weight, bias, hidden, memory, sequences, steps, reverse, _ = spec
    offsets, lengths = sequences[0][:, None], sequences[1][:, None]
    step = torch.arange(steps, device=gates.device)
    alive = step < lengths
    place = offsets + torch.where(alive, lengths - 1 - step if reverse else step, 0)
    inputs = gates[place.clamp(max=max(gates.shape[0] - 1, 0))]
    kept: list[list[torch.Tensor]] = [[], [], []]
    for s in range(steps):
        products = F.linear(hidden, weight, None if bias is None else bias.to(weight.dtype))
        if memory is None:
            r, z, n = inputs[:, s].chunk(3, 1)
            pr, pz, pn = products.chunk(3, 1)
            r, z = torch.sigmoid(r + pr), torch.sigmoid(z + pz)
            n = torch.tanh(n + r * pn)
            new, parts = n + z * (hidden - n), (r, z, n, pn)
        else:
            i, f, g, o = (inputs[:, s] + products).chunk(4, 1)
            parts = torch.sigmoid(i), torch.sigmoid(f), torch.tanh(g), torch.sigmoid(o)
            new_memory = parts[1] * memory + parts[0] * parts[2]
            new = parts[3] * torch.tanh(new_memory)
            memory = torch.where(alive[:, s, None], new_memory, memory)
            kept[2].append(memory)
        hidden = torch.where(alive[:, s, None], new, hidden)
        kept[0].append(hidden)
        kept[1].append(torch.cat(parts, 1))

    def placed(states: list[torch.Tensor], width: int) -> torch.Tensor:
        rows = gates.new_zeros(gates.shape[0], width)
        return rows.index_put((place[alive],), torch.stack(states, 1)[alive]) if states else rows

    width = weight.shape[1]
    memories = None if memory is None else placed(kept[2], width)
    return placed(kept[0], width), hidden, memory, placed(kept[1], 4 * width), memories  # type: ignore[return-value]


def recurrence_backward(spec, grads, buffers) -> None:
    """grads: of out and of the last hidden state and memory, None where there is none. Writes those of gates, weight,
    bias, hidden and memory."""
    with torch.enable_grad():
        leaves = [None if t is None else t.detach().requires_grad_() for t in spec[:5]]
        results = recurrence(spec._replace(**dict(zip(spec._fields, leaves))))[:3]
    arriving = [(r, g) for r, g in zip(results, grads) if r is not None and g is not None]
    wanted = [t for t in leaves if t is not None]
    found = iter(torch.autograd.grad(
        [r for r, _ in arriving], wanted, [g for _, g in arriving], allow_unused=True, materialize_grads=True
    ))  # fmt: skip
    for leaf, buffer in zip(leaves, buffers):
        if leaf is not None:
            buffer.copy_(next(found))
