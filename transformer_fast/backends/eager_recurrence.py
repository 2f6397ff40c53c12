"""Recurrent layers and decoders in plain PyTorch, one step at a time."""

import math

import torch
import torch.nn.functional as F

__all__ = ["recurrence", "recurrence_backward", "recurrent_step"]


def _cell(gates, products, hidden, memory):
    """One step of an LSTM (with memory) or GRU (memory None).

    gates and products, (B, G * H) each, are the contributions of the input and of the hidden state to the gates.
    Returns the next hidden state, the next memory (None for a GRU) and the gates that the kernels save for the backward
    pass.
    """
    if memory is None:
        r, z, n = gates.chunk(3, 1)
        pr, pz, pn = products.chunk(3, 1)
        r, z = torch.sigmoid(r + pr), torch.sigmoid(z + pz)
        n = torch.tanh(n + r * pn)
        return n + z * (hidden - n), None, (r, z, n, pn)
    i, f, g, o = (gates + products).chunk(4, 1)
    parts = torch.sigmoid(i), torch.sigmoid(f), torch.tanh(g), torch.sigmoid(o)
    memory = parts[1] * memory + parts[0] * parts[2]
    return parts[3] * torch.tanh(memory), memory, parts


def recurrence(spec) -> tuple[torch.Tensor, ...]:
    """Run a RecurrenceSpec. Differentiable in all tensors.

    Returns out (positions, H), the last hidden state (B, H), the last memory (B, H), the gates (positions, 4 * H) that
    the kernels save, and the memories (positions, H). The last memory and the memories are None for a GRU.
    """
    gates, weight, bias, hidden, memory, sequences, steps, reverse, _ = spec
    offsets, lengths = sequences[0][:, None], sequences[1][:, None]
    step = torch.arange(steps, device=gates.device)
    alive = step < lengths
    place = offsets + torch.where(alive, lengths - 1 - step if reverse else step, 0)
    inputs = gates[place.clamp(max=max(gates.shape[0] - 1, 0))]
    kept: list[list[torch.Tensor]] = [[], [], []]
    for s in range(steps):
        products = F.linear(hidden, weight, None if bias is None else bias.to(weight.dtype))
        new, new_memory, parts = _cell(inputs[:, s], products, hidden, memory)
        if memory is not None:
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
    """Write the gradients of gates, weight, bias, hidden and memory into buffers. grads: the gradients to out, the last
    hidden state and the last memory; None for those that have none."""
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


def recurrent_step(spec) -> tuple[torch.Tensor | None, ...]:
    """Run a RecurrentStepSpec. Returns logits, hidden state, memory and feed. Differentiable in all tensors."""
    word, layers, memory = F.embedding(spec.ids, spec.token), spec.hidden.shape[0], spec.memory
    x, context = word, None
    if spec.maxout:
        context = _context(spec, spec.hidden[-1])
        x = torch.cat((word, context), 1)
    elif spec.feed is not None:
        x = torch.cat((word, spec.feed), 1)
    states, memories = [], []
    for layer in range(layers):
        weight_ih, weight_hh, bias_ih, bias_hh = spec.cells[4 * layer : 4 * layer + 4]
        hidden = spec.hidden[layer]
        before = None if memory is None else memory[layer]
        gates, products = F.linear(x, weight_ih, bias_ih), F.linear(hidden, weight_hh, bias_hh)
        x, after, _ = _cell(gates, products, hidden, before)
        states.append(x)
        memories.append(after)
    if spec.maxout:
        read = F.linear(torch.cat((x, word, context), 1), spec.readout, spec.readout_bias)  # type: ignore[arg-type]
        x = read.unflatten(1, (-1, 2)).amax(2)
    elif spec.values is not None:
        x = torch.tanh(F.linear(torch.cat((_context(spec, x), x), 1), spec.readout, spec.readout_bias))
    logits = F.linear(x, spec.head, spec.head_bias)
    return (
        logits, torch.stack(states), None if memory is None else torch.stack(memories),
        None if spec.feed is None else x,
    )  # fmt: skip


def _context(spec, state: torch.Tensor) -> torch.Tensor:
    def of_rows(t):
        return t[: len(state)] if spec.sources is None else t[spec.sources]

    values = of_rows(spec.values)
    if spec.keys is None:
        return values[:, 0]
    keys = of_rows(spec.keys)
    query = state if spec.query is None else F.linear(state, spec.query)
    if spec.score_weight is None:
        scores = torch.matmul(keys, query[:, :, None]).squeeze(2)
    else:
        scores = torch.matmul(torch.tanh(query[:, None] + keys), spec.score_weight)
    alive = torch.ones_like(scores, dtype=torch.bool) if spec.mask is None else of_rows(spec.mask)
    dead = ~alive.any(1, keepdim=True)
    weights = torch.softmax(scores.masked_fill(~alive, -math.inf).masked_fill(dead, 0.0), 1).masked_fill(dead, 0.0)
    return torch.matmul(weights[:, None], values).squeeze(1)
