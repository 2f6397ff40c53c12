"""torch.nn.MultiheadAttention on the fused ops."""

import torch
from torch import nn

from .. import ops

__all__ = ["MultiheadAttention"]


class MultiheadAttention(nn.MultiheadAttention):
    """concat_h(softmax(Q_h K_h^T / sqrt(D)) V_h) W_o + b_o: a drop-in for torch.nn.MultiheadAttention.

    Constructor, parameters, state dict and call are torch's. Memory is linear in the sequence length, unless the
    attention weights are requested; they are computed from the saved log-sum-exp.

    Two things differ from torch: a query without keys to attend to gives the output bias and not NaN, and the weights
    that are returned in training are those before dropout.

    Raises:
        TypeError, ValueError: if an argument is invalid; the message names it, its value and what is expected.

    Source:
        Vaswani et al., "Attention Is All You Need", 2017, section 3.2.2.

    Examples:
        >>> import torch, transformer_fast
        >>> theirs = torch.nn.MultiheadAttention(32, 4, batch_first=True)
        >>> ours = transformer_fast.MultiheadAttention(32, 4, batch_first=True)
        >>> loaded = ours.load_state_dict(theirs.state_dict())
        >>> ours(*[torch.randn(2, 5, 32)] * 3, need_weights=False)[0].shape
        torch.Size([2, 5, 32])
    """

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        key_padding_mask: torch.Tensor | None = None,
        need_weights: bool = True,
        attn_mask: torch.Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Compute attention as torch.nn.MultiheadAttention.

        Args:
            query: (Sq, B, E), (B, Sq, E) with batch_first, or (Sq, E); floating point.
            key: (Sk, B, kdim), (B, Sk, kdim) with batch_first, or (Sk, kdim).
            value: (Sk, B, vdim), (B, Sk, vdim) with batch_first, or (Sk, vdim).
            key_padding_mask: (B, Sk), or (Sk,) without a batch; bool (True leaves a key out) or float (added to the
                scores).
            need_weights: also return the attention weights.
            attn_mask: (Sq, Sk) or (B * H, Sq, Sk); bool (True leaves a pair out) or float (added to the scores).
            average_attn_weights: average the returned weights over the heads.
            is_causal: use a causal mask; attn_mask is then ignored.

        Returns:
            The output, of query's shape, and the weights: (B, Sq, Sk), (B, H, Sq, Sk) if not averaged, without the B
            for inputs without a batch, or None.
        """
        if query.dim() not in (2, 3) or key.dim() != query.dim() or value.dim() != query.dim():
            raise ValueError(
                "query, key, value: wanted all 3 dimensions, or all 2 without a batch, got shapes "
                f"{tuple(query.shape)}, {tuple(key.shape)}, {tuple(value.shape)}"
            )
        for name, t, width in (("query", query, self.embed_dim), ("key", key, self.kdim), ("value", value, self.vdim)):
            if t.shape[-1] != width:
                raise ValueError(f"{name}: wanted width {width}, got shape {tuple(t.shape)}")
        self_attention = query is key and key is value
        batched = query.dim() == 3
        if not batched:
            query, key, value = (t[None] for t in (query, key, value))
            key_padding_mask = None if key_padding_mask is None else key_padding_mask[None]
        elif not self.batch_first:
            query, key, value = (t.transpose(0, 1) for t in (query, key, value))
        p = self.dropout if self.training else 0.0
        plain = self.bias_k is None and not self.add_zero_attn
        if is_causal:
            attn_mask = None
        if self_attention and plain and attn_mask is None and key_padding_mask is None and not need_weights:
            qkv = ops.linear(query, self.in_proj_weight, self.in_proj_bias)
            qkv = qkv.unflatten(-1, (3, self.num_heads, self.head_dim))
            out, weights = ops.qkv_attention(qkv, None, None, p, is_causal), None
        else:
            q, k, v = self._project(query, key, value, self_attention)
            mask = self._mask(attn_mask, key_padding_mask, q.shape[0], q.shape[2], key.shape[1], k.shape[2])
            if is_causal and k.shape[2] != key.shape[1]:
                # Every query attends to the appended keys (bias_k, add_zero_attn).
                seen = torch.ones(q.shape[2], key.shape[1], dtype=torch.bool, device=q.device).tril()
                mask = _joined(mask, nn.functional.pad(seen, (0, k.shape[2] - key.shape[1]), value=True)[None, None])
                is_causal = False
            out, lse = ops.scaled_dot_product_attention(q, k, v, mask, p, is_causal, return_lse=True)
            out, weights = out.transpose(1, 2), None
            if need_weights:
                weights = ops.attention_probabilities(q, k, lse, attn_mask=mask, is_causal=is_causal)
                weights = weights.mean(1) if average_attn_weights else weights
        out = ops.linear(out.flatten(-2), self.out_proj.weight, self.out_proj.bias)
        if not batched:
            return out[0], None if weights is None else weights[0]
        return (out if self.batch_first else out.transpose(0, 1)), weights

    def _project(self, query, key, value, self_attention: bool):
        """q, k and v, (B, H, S, D) each, with torch's optional extra keys (bias_k, add_zero_attn) appended."""
        heads = (self.num_heads, self.head_dim)
        if self._qkv_same_embed_dim and self_attention:
            qkv = ops.linear(query, self.in_proj_weight, self.in_proj_bias)
            q, k, v = qkv.unflatten(-1, (3, *heads)).permute(2, 0, 3, 1, 4)
        else:
            if self._qkv_same_embed_dim:
                weights = self.in_proj_weight.chunk(3)
            else:
                weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
            biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
            q, k, v = (
                ops.linear(x, w, b).unflatten(-1, heads).transpose(1, 2)
                for x, w, b in zip((query, key, value), weights, biases)
            )
        if self.bias_k is not None and self.bias_v is not None:
            extra = (t.view(1, 1, *heads).transpose(1, 2).expand(k.shape[0], -1, -1, -1).to(k.dtype)
                     for t in (self.bias_k, self.bias_v))  # fmt: skip
            k, v = (torch.cat(pair, 2) for pair in zip((k, v), extra))
        if self.add_zero_attn:
            k, v = (nn.functional.pad(t, (0, 0, 0, 1)) for t in (k, v))
        return q, k, v

    def _mask(self, attn_mask, key_padding_mask, batch: int, sq: int, sk: int, keys: int) -> torch.Tensor | None:
        """Combine torch's masks (bool: True leaves out) into one 4-D bool mask (True takes part) or float bias."""
        found = None
        if attn_mask is not None:
            shapes = [(sq, sk), (batch * self.num_heads, sq, sk)]
            if tuple(attn_mask.shape) not in shapes:
                raise ValueError(
                    f"attn_mask: wanted shape {shapes[0]} or (B * H, Sq, Sk) = {shapes[1]}, "
                    f"got {tuple(attn_mask.shape)}"
                )
            four = attn_mask.unflatten(0, (batch, self.num_heads)) if attn_mask.dim() == 3 else attn_mask[None, None]
            found = _taking_part("attn_mask", four)
        if key_padding_mask is not None:
            if key_padding_mask.shape != (batch, sk):
                raise ValueError(
                    f"key_padding_mask: wanted shape (B, Sk) = {(batch, sk)}, got {tuple(key_padding_mask.shape)}"
                )
            found = _joined(found, _taking_part("key_padding_mask", key_padding_mask[:, None, None]))
        if found is not None and keys > sk:
            found = nn.functional.pad(found, (0, keys - sk), value=True if found.dtype == torch.bool else 0.0)
        return found


def _taking_part(name: str, mask: torch.Tensor) -> torch.Tensor:
    if mask.dtype == torch.bool:
        return ~mask
    if not mask.is_floating_point():
        raise TypeError(f"{name}: wanted bool or a float dtype, got {mask.dtype}")
    return mask


def _joined(a: torch.Tensor | None, b: torch.Tensor) -> torch.Tensor:
    if a is None:
        return b
    if a.dtype == torch.bool and b.dtype == torch.bool:
        return a & b
    return _additive(a, b) + _additive(b, a)


def _additive(mask: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros(mask.shape, dtype=other.dtype, device=mask.device).masked_fill_(~mask, -torch.inf)
