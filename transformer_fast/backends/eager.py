"""Plain PyTorch: the definition of every op, the reference of its tests and the last fallback.

It computes in the dtype of its inputs, float64 included. The backward methods use autograd.
"""

import math

import torch
import torch.nn.functional as F

from . import Backend, Call
from .eager_recurrence import recurrence, recurrence_backward, recurrent_step
from .philox import keep_mask, keep_mask_2d, keep_scale


# ---- attention -----------------------------------------------------------------------------------
def relative_buckets(distance: torch.Tensor, buckets: int, max_distance: int, bidirectional: bool) -> torch.Tensor:
    """T5's bucket of each distance = key position - query position (Raffel et al., 2020, section 2.1)."""
    base = torch.zeros_like(distance)
    if bidirectional:
        buckets //= 2
        base = (distance > 0).long() * buckets
        distance = distance.abs()
    else:
        distance = (-distance).clamp(min=0)
    exact = buckets // 2
    ratio = torch.log(distance.clamp(min=1).float() / exact) / math.log(max_distance / exact)
    large = (exact + (ratio * (buckets - exact)).long()).clamp(max=buckets - 1)
    return base + torch.where(distance < exact, distance, large)


def _attention_one(q, k, v, spec, b):
    """Sequence b: q (H, Sq, D), k, v (H, Sk, D) cut to their lengths. Returns out and lse."""
    h, sq, _ = q.shape
    sk = k.shape[1]
    i = torch.arange(sq, device=q.device)[:, None]
    j = torch.arange(sk, device=q.device)[None, :]
    position = i + (sk - sq if spec.bottom_right else 0)
    scores = torch.matmul(q, k.transpose(-1, -2)) * spec.scale
    if spec.softcap:
        scores = spec.softcap * torch.tanh(scores / spec.softcap)
    if spec.bias is not None:
        scores = scores + _slice(spec.bias, b, sq, sk)
    if spec.relative_bias is not None:
        table = spec.relative_bias
        bucket = relative_buckets(j - position, table.shape[0], spec.relative_max_distance, spec.relative_bidirectional)
        scores = scores + table[bucket].permute(2, 0, 1)
    scores = scores.to(torch.promote_types(q.dtype, scores.dtype))
    alive = torch.ones(sq, sk, dtype=torch.bool, device=q.device)
    if spec.window_left >= 0:
        alive = alive & (j >= position - spec.window_left)
    if spec.window_right >= 0:
        alive = alive & (j <= position + spec.window_right)
    alive = alive.expand(h, sq, sk)
    if spec.mask is not None:
        alive = alive & _slice(spec.mask, b, sq, sk)
    scores = scores.masked_fill(~alive, -math.inf)
    # A row without keys to attend to: make its scores finite for softmax, then zero its probabilities.
    dead = (scores == -math.inf).all(-1, keepdim=True)
    scores = scores.masked_fill(dead, 0.0)
    lse = torch.logsumexp(scores, -1).masked_fill(dead.squeeze(-1), -math.inf)
    p = torch.softmax(scores, -1).masked_fill(dead, 0.0).to(q.dtype)
    if spec.dropout_p:
        bh = torch.arange(h, device=q.device)[:, None, None] + b * h
        kept = keep_mask(spec.rng, spec.dropout_p, bh, i[None], j[None])
        p = p * kept * keep_scale(spec.dropout_p)
    return torch.matmul(p.to(q.dtype), v), lse


def _slice(t: torch.Tensor, b: int, sq: int, sk: int) -> torch.Tensor:
    t = t[b if t.shape[0] > 1 else 0]
    return t[:, : sq if t.shape[1] > 1 else 1, : sk if t.shape[2] > 1 else 1]


def attention(spec) -> tuple[torch.Tensor, torch.Tensor]:
    """out and lse of an AttentionSpec, differentiable. It loops over sequences, for clarity."""
    q, k, v = spec.query, spec.key, spec.value
    groups = q.shape[1] // k.shape[1]
    unpadded = spec.cu_seqlens_q is not None
    outs, lses = [], []
    if unpadded:
        cu_q, cu_k = spec.cu_seqlens_q.tolist(), spec.cu_seqlens_k.tolist()
        batch = len(cu_q) - 1
    else:
        batch = q.shape[0]
        lengths = [k.shape[2]] * batch if spec.key_lengths is None else spec.key_lengths.tolist()
    for b in range(batch):
        if unpadded:
            qb = q[cu_q[b] : cu_q[b + 1]].transpose(0, 1)
            kb, vb = (t[cu_k[b] : cu_k[b + 1]].transpose(0, 1) for t in (k, v))
        else:
            qb, kb, vb = q[b], k[b, :, : lengths[b]], v[b, :, : lengths[b]]
        if groups > 1:
            kb, vb = kb.repeat_interleave(groups, 0), vb.repeat_interleave(groups, 0)
        out, lse = _attention_one(qb, kb, vb, spec, b)
        outs.append(out)
        lses.append(lse)
    if unpadded:
        empty = q.new_empty((0, *q.shape[1:]))
        return (
            torch.cat([o.transpose(0, 1) for o in outs] or [empty]),
            torch.cat(lses or [q.new_empty((q.shape[1], 0))], 1),
        )
    return torch.stack(outs), torch.stack(lses)


def additive_attention(spec) -> tuple[torch.Tensor, torch.Tensor]:
    """Context and weights of an AdditiveAttentionSpec, differentiable. score_weight: (D,), or (B, 1, D) with one per
    sequence."""
    query, key, value, score_weight, bias, mask, key_lengths = spec
    if bias is not None:
        query = query + bias.to(query.dtype)
    hidden = torch.tanh(query[:, :, None] + key[:, None])
    scores = torch.matmul(hidden, score_weight.to(hidden.dtype)[..., None]).squeeze(-1)
    alive = torch.ones_like(scores, dtype=torch.bool)
    if mask is not None:
        alive = alive & mask
    if key_lengths is not None:
        alive = alive & (torch.arange(key.shape[1], device=key.device) < key_lengths[:, None, None])
    dead = ~alive.any(-1, keepdim=True)
    scores = scores.masked_fill(~alive, -math.inf).masked_fill(dead, 0.0)
    weights = torch.softmax(scores, -1).masked_fill(dead, 0.0)
    return torch.matmul(weights, value), weights


def additive_attention_backward(spec, grad_out, grad_weights, buffers) -> None:
    """Write the gradients of query, key and value, and the gradient of score_weight per sequence, (B, D)."""
    with torch.enable_grad():
        query, key, value = (_leaf(t) for t in spec[:3])
        each = spec.score_weight.detach().to(query.dtype).repeat(query.shape[0], 1).requires_grad_()
        out, weights = additive_attention(spec._replace(query=query, key=key, value=value, score_weight=each[:, None]))
    grad_weights = None if grad_weights is None else grad_weights.to(weights.dtype)
    _grads((out, weights), (grad_out, grad_weights), (query, key, value, each), buffers)


# ---- norms, activations --------------------------------------------------------------------------
def norm(x, residual, weight, bias, rng, eps, rms, dropout_p):
    """(y, v, mean, rstd) with v = residual + dropout(x), all (rows, width), differentiable."""
    v = x
    if dropout_p:
        v = v * keep_mask_2d(rng, dropout_p, *x.shape) * keep_scale(dropout_p)
        v = v.to(x.dtype)
    if residual is not None:
        v = v + residual
    wide = v if v.dtype == torch.float64 else v.float()
    mean = torch.zeros_like(wide[:, :1]) if rms else wide.mean(-1, keepdim=True)
    rstd = torch.rsqrt((wide - mean).square().mean(-1, keepdim=True) + eps)
    y = (wide - mean) * rstd
    if weight is not None:
        y = y * weight
    if bias is not None:
        y = y + bias
    return y.to(x.dtype), v, mean.squeeze(-1), rstd.squeeze(-1)


_ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
}


def bias_activation(x, bias, gate, activation):
    y = _ACTIVATIONS[activation](x if bias is None else x + bias.to(x.dtype))
    return y if gate is None else y * gate


# ---- positions -----------------------------------------------------------------------------------
def rotary_embedding(x, cos, sin, positions, interleaved, inverse):
    """x (B, S, H, D), cos and sin (P, R / 2), positions (B, S) or None; differentiable."""
    half = cos.shape[1]
    place = slice(x.shape[1]) if positions is None else positions
    cos, sin = (t[place].unsqueeze(-2).to(x.dtype) for t in (cos, -sin if inverse else sin))
    rotated, rest = x[..., : 2 * half], x[..., 2 * half :]
    pairs = rotated.unflatten(-1, (half, 2) if interleaved else (2, half))
    x1, x2 = pairs.unbind(-1 if interleaved else -2)
    y = torch.stack((x1 * cos - x2 * sin, x2 * cos + x1 * sin), -1 if interleaved else -2).flatten(-2)
    return torch.cat((y, rest), -1)


# ---- embeddings, losses --------------------------------------------------------------------------
def embedding_layer_norm(spec):
    """(y, mean, rstd) of an EmbeddingSpec, differentiable."""
    v = F.embedding(spec.ids, spec.word, None if spec.padding_idx < 0 else spec.padding_idx)
    if spec.token_type is not None:
        v = v + F.embedding(spec.type_ids, spec.token_type)
    if spec.position is not None:
        v = v + F.embedding(spec.position_ids, spec.position)
    y, _, mean, rstd = norm(v, None, spec.norm_weight, spec.norm_bias, None, spec.eps, False, 0.0)
    if spec.dropout_p:
        y = (y * keep_mask_2d(spec.rng, spec.dropout_p, *y.shape) * keep_scale(spec.dropout_p)).to(y.dtype)
    return y, mean, rstd


def cross_entropy(spec):
    """The loss of each row of a CrossEntropySpec, differentiable."""
    wide = spec.logits if spec.logits.dtype == torch.float64 else spec.logits.float()
    ignored = spec.target == spec.ignore_index
    target = spec.target.masked_fill(ignored, 0)
    nll = -torch.log_softmax(wide, -1)
    losses = nll.gather(1, target[:, None]).squeeze(1)
    if spec.weight is not None:
        losses = losses * spec.weight[target]
    if spec.label_smoothing:
        uniform = (nll if spec.weight is None else nll * spec.weight).mean(-1)
        losses = (1 - spec.label_smoothing) * losses + spec.label_smoothing * uniform
    if spec.z_loss:
        losses = losses + spec.z_loss * torch.logsumexp(wide, -1).square()
    return losses.masked_fill(ignored, 0.0)


def _leaf(t, need=True):
    return None if t is None else t.detach().requires_grad_(need)


def _grads(outputs, grad_outputs, inputs, buffers) -> None:
    """Write d(outputs)/d(inputs) into buffers (None: not wanted)."""
    pairs = [(i, b) for i, b in zip(inputs, buffers) if i is not None and b is not None]
    wanted = [(o, g) for o, g in zip(outputs, grad_outputs) if g is not None]
    found = torch.autograd.grad(
        [o for o, _ in wanted], [i for i, _ in pairs], [g for _, g in wanted], allow_unused=True
    )
    for (_, buffer), grad in zip(pairs, found):
        buffer.zero_() if grad is None else buffer.copy_(grad)


class EagerBackend(Backend):
    name = "eager"

    def why_not(self, call: Call) -> tuple[str, ...]:
        return ()

    def attention_forward(self, spec, out, lse) -> None:
        o, l = attention(spec)
        out.copy_(o)
        lse.copy_(l)

    def attention_backward(self, spec, grad_out, grad_lse, out, lse, dq, dk, dv, dbias, dtable) -> None:
        with torch.enable_grad():
            q, k, v = (_leaf(t) for t in spec[:3])
            bias, table = _leaf(spec.bias, dbias is not None), _leaf(spec.relative_bias, dtable is not None)
            o, l = attention(spec._replace(query=q, key=k, value=v, bias=bias, relative_bias=table))
            if grad_lse is not None:
                grad_lse = grad_lse.masked_fill(lse == -math.inf, 0.0).to(l.dtype)
        _grads((o, l), (grad_out, grad_lse), (q, k, v, bias, table), (dq, dk, dv, dbias, dtable))

    def additive_attention_forward(self, spec, out, weights) -> None:
        for buffer, result in zip((out, weights), additive_attention(spec)):
            buffer.copy_(result)

    def additive_attention_backward(self, spec, grad_out, grad_weights, weights, *buffers) -> None:
        additive_attention_backward(spec, grad_out, grad_weights, buffers)

    def recurrence_forward(self, spec, *buffers) -> None:
        for buffer, result in zip(buffers, recurrence(spec)):
            if buffer is not None:
                buffer.copy_(result)

    def recurrence_backward(self, spec, grads, out, saved, memories, *buffers) -> None:
        recurrence_backward(spec, grads, buffers)

    def recurrent_step(self, spec, *buffers) -> None:
        for buffer, result in zip(buffers, recurrent_step(spec)):
            if buffer is not None:
                buffer.copy_(result)

    def norm_forward(self, spec, y, sum_out, mean, rstd) -> None:
        results = norm(*spec)
        for buffer, result in zip((y, sum_out, mean, rstd), results):
            if buffer is not None:
                buffer.copy_(result)

    def norm_backward(self, spec, grad_y, grad_sum, mean, rstd, grad_v, grad_x, grad_weight, grad_bias) -> None:
        with torch.enable_grad():
            v, weight = _leaf(spec.x), _leaf(spec.weight, grad_weight is not None)
            bias = None if grad_bias is None else torch.zeros_like(grad_bias, requires_grad=True)
            y = norm(v, None, weight, bias, None, spec.eps, spec.rms, 0.0)[0]
        _grads((y,), (grad_y,), (v, weight, bias), (grad_v, grad_weight, grad_bias))
        if grad_sum is not None:
            grad_v.add_(grad_sum)
        if grad_x is not None:
            kept = keep_mask_2d(spec.rng, spec.dropout_p, *grad_v.shape)
            grad_x.copy_(grad_v * kept * keep_scale(spec.dropout_p))

    def bias_activation_forward(self, x, bias, gate, activation, y) -> None:
        y.copy_(bias_activation(x, bias, gate, activation))

    def bias_activation_backward(self, grad, x, bias, gate, activation, grad_x, grad_bias, grad_gate) -> None:
        with torch.enable_grad():
            x, bias, gate = _leaf(x), _leaf(bias), _leaf(gate)
            y = bias_activation(x, bias, gate, activation)
        _grads((y,), (grad,), (x, bias, gate), (grad_x, grad_bias, grad_gate))

    def dropout_forward(self, x, rng, p, y) -> None:
        y.copy_(x * keep_mask_2d(rng, p, *x.shape) * keep_scale(p))

    def rotary_embedding(self, x, cos, sin, positions, interleaved, inverse, y) -> None:
        y.copy_(rotary_embedding(x, cos, sin, positions, interleaved, inverse))

    def embedding_layer_norm_forward(self, spec, y, mean, rstd) -> None:
        for buffer, result in zip((y, mean, rstd), embedding_layer_norm(spec)):
            buffer.copy_(result)

    def embedding_layer_norm_backward(self, spec, grad, mean, rstd, *buffers) -> None:
        with torch.enable_grad():
            tables = [_leaf(t) for t in (spec.word, spec.position, spec.token_type, spec.norm_weight)]
            bias = torch.zeros(grad.shape[1], dtype=rstd.dtype, device=grad.device, requires_grad=True)
            word, position, token_type, weight = tables
            y = embedding_layer_norm(
                spec._replace(word=word, position=position, token_type=token_type, norm_weight=weight, norm_bias=bias)
            )[0]
        _grads((y,), (grad,), (*tables, bias), buffers)

    def cross_entropy_forward(self, spec, losses, largest, total) -> None:
        losses.copy_(cross_entropy(spec))
        wide = spec.logits.to(losses.dtype)
        largest.copy_(wide.amax(-1))
        total.copy_((wide - largest[:, None]).exp().sum(-1))

    def cross_entropy_backward(self, spec, grad_losses, largest, total, grad) -> None:
        # Written out: linear_cross_entropy calls it inside its forward pass, where autograd does not record.
        ignored = spec.target == spec.ignore_index
        target = spec.target.masked_fill(ignored, 0)[:, None]
        smoothing, classes = spec.label_smoothing, spec.logits.shape[1]
        p = torch.softmax(spec.logits.to(grad_losses.dtype), -1)
        weight = torch.ones(classes, dtype=p.dtype, device=p.device) if spec.weight is None else spec.weight
        hit = (1 - smoothing) * weight[target]
        scale = hit + smoothing * weight.mean() + 2 * spec.z_loss * (largest + total.log())[:, None]
        d = (p * scale - smoothing / classes * weight).scatter_add(1, target, -hit) * grad_losses[:, None]
        grad.copy_(d.masked_fill(ignored[:, None], 0.0))


BACKEND = EagerBackend()
