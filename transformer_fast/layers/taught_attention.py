"""The three attention layers of Keras, which courses teach, with Keras's call signatures, on the fused ops."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import UninitializedParameter

from .. import ops
from .projection import linear

__all__ = ["AdditiveAttention", "DotProductAttention", "MultiHeadAttention"]

_WIDEST_HEAD = 256  # limit of scaled_dot_product_attention


class DotProductAttention(nn.Module):
    """softmax(scale * Q K^T) V, without projections: Luong's attention, which Keras calls Attention.

    The call is that of Keras: layer([query, value]) or layer([query, value, key]), with query (B, Tq, D), value
    (B, Tv, Dv) and key (B, Tv, D), which defaults to value. Unlike in the Transformer the scores are not divided by
    sqrt(D). Differences from Keras: a query without keys to attend to gives zeros, where Keras averages all values, and
    the weights that are returned in training are those before dropout.

    Args:
        use_scale: multiply the scores by a learned scalar, initially 1.
        score_mode: "dot", or "concat": w * sum_d tanh(scale * (q_d + k_d)) with a learned scalar w, initially 1.
        dropout: dropout probability of the attention weights in training.

    Raises:
        TypeError, ValueError: if an argument is invalid; the message names it, its value and what is expected.

    Source:
        Luong, Pham and Manning, "Effective Approaches to Attention-based Neural Machine Translation", 2015, section
        3.1.

    Examples:
        >>> import torch, transformer_fast
        >>> query, value = torch.tensor([[[1.0, 0.0]]]), torch.tensor([[[0.0, 3.0], [0.0, 6.0]]])
        >>> key = torch.tensor([[[0.6931472, 5.0], [0.0, 7.0]]])  # scores ln 2 and 0, weights 2/3 and 1/3
        >>> transformer_fast.layers.DotProductAttention()([query, value, key])
        tensor([[[0., 4.]]])
    """

    scale: nn.Parameter | None
    concat_score_weight: nn.Parameter | None

    def __init__(self, use_scale: bool = False, score_mode: str = "dot", dropout: float = 0.0):
        super().__init__()
        if score_mode not in ("dot", "concat"):
            raise ValueError(f"score_mode: wanted 'dot' or 'concat', got {score_mode!r}")
        self.score_mode, self.dropout = score_mode, _probability(dropout)
        self.scale = nn.Parameter(torch.ones(())) if use_scale else None
        self.concat_score_weight = nn.Parameter(torch.ones(())) if score_mode == "concat" else None

    def extra_repr(self) -> str:
        return f"use_scale={self.scale is not None}, score_mode={self.score_mode!r}, dropout={self.dropout}"

    def forward(
        self,
        inputs: Sequence[torch.Tensor],
        mask: Sequence[torch.Tensor | None] | None = None,
        training: bool | None = None,
        return_attention_scores: bool = False,
        use_causal_mask: bool = False,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Compute attention.

        Args:
            inputs: [query (B, Tq, D), value (B, Tv, Dv)] or [query, value, key (B, Tv, D)], floating point.
            mask: [query_mask (B, Tq), value_mask (B, Tv)] or None; True or nonzero for positions that take part. Either
                may be None.
            training: whether dropout applies; default: the mode set by train() and eval().
            return_attention_scores: also return the attention weights.
            use_causal_mask: query i attends to values 0 .. i only.

        Returns:
            (B, Tq, Dv), zeros where query_mask is False. With return_attention_scores a tuple of it and the weights
            (B, Tq, Tv).
        """
        query, value, key = _listed(inputs)
        query_mask, value_mask = _masks(mask, query, value)
        p = self.dropout if (self.training if training is None else training) else 0.0
        out, weights = self._attend(query, key, value, value_mask, p, return_attention_scores, use_causal_mask)
        if query_mask is not None:
            out = out.masked_fill(~query_mask[..., None], 0.0)
        return (out, weights) if return_attention_scores else out

    def _attend(self, query, key, value, value_mask, p: float, want: bool, causal: bool):
        if self.concat_score_weight is not None:
            if self.scale is not None:
                query, key = query * self.scale, key * self.scale
            weight = self.concat_score_weight.expand(query.shape[-1])
            return _additive(query, key, value, weight, value_mask, p, want, causal)
        if self.scale is not None:
            query = query * self.scale
        mask = None if value_mask is None else value_mask[:, None]
        if max(query.shape[-1], value.shape[-1]) > _WIDEST_HEAD:
            return _wide(query, key, value, mask, p, causal)
        q, k, v = (t.unsqueeze(1) for t in (query, key, value))
        out, weights = _fused(q, k, v, None if mask is None else mask.unsqueeze(1), p, want, causal, 1.0)
        return out.squeeze(1), weights if weights is None else weights.squeeze(1)


class AdditiveAttention(LazyModuleMixin, DotProductAttention):
    """softmax_j(scale . tanh(query_i + key_j)) V: Bahdanau's attention without projections, as Keras's layer.

    The call is that of DotProductAttention. `scale` is (D,); D is set by the first call, or by build.

    Args:
        use_scale: learn `scale`, initialised by Glorot and Bengio's uniform distribution; otherwise it is all ones.
        dropout: dropout probability of the attention weights in training.

    Raises:
        TypeError, ValueError: if an argument is invalid; the message names it, its value and what is expected.

    Source:
        Bahdanau, Cho and Bengio, "Neural Machine Translation by Jointly Learning to Align and Translate", 2015, section
        3.1.

    Examples:
        >>> import torch, transformer_fast
        >>> layer = transformer_fast.layers.AdditiveAttention()
        >>> layer([torch.randn(2, 5, 16), torch.randn(2, 7, 16)]).shape
        torch.Size([2, 5, 16])
    """

    cls_to_become = None  # type: ignore[assignment]

    def __init__(self, use_scale: bool = True, dropout: float = 0.0):
        super().__init__(dropout=dropout)
        if use_scale:
            self.scale = UninitializedParameter()  # type: ignore[assignment]

    def extra_repr(self) -> str:
        return f"use_scale={self.scale is not None}, dropout={self.dropout}"

    def build(self, input_shape: Sequence[Sequence[int]]) -> None:
        """Create `scale` before the first call, as an optimizer needs. input_shape: the shapes of [query, value]."""
        if self.has_uninitialized_params():
            scale: Any = self.scale
            width = input_shape[0][-1]
            scale.materialize((width,))
            with torch.no_grad():
                scale.uniform_(-math.sqrt(3 / width), math.sqrt(3 / width))

    def initialize_parameters(self, inputs, *args, **kwargs) -> None:  # type: ignore[override]
        self.build([t.shape for t in _listed(inputs)])

    def _attend(self, query, key, value, value_mask, p: float, want: bool, causal: bool):
        scale: Any = self.scale
        if scale is None:
            scale = query.new_ones(query.shape[-1])
        elif scale.shape[0] != query.shape[-1]:
            raise ValueError(f"inputs: wanted width {scale.shape[0]} of query, got shape {tuple(query.shape)}")
        return _additive(query, key, value, scale, value_mask, p, want, causal)


class _Dense(nn.LazyLinear):
    """A Linear whose input width is set by the first call, initialised as Keras's Dense."""

    cls_to_become = nn.Linear  # type: ignore[assignment]

    def reset_parameters(self) -> None:
        if not self.has_uninitialized_params() and self.in_features:
            nn.init.xavier_uniform_(self.weight)
            if self.bias is not None:
                nn.init.zeros_(self.bias)


class MultiHeadAttention(nn.Module):
    """concat_h(softmax(Q_h K_h^T / sqrt(key_dim)) V_h) W_o + b_o, with the call of Keras's MultiHeadAttention.

    The call is layer(query, value, key=value, ...): value comes before key, as in Keras. (`MultiheadAttention`, with a
    small h, is torch's.) The input widths are set by the first call, or by build. Difference from Keras: a query
    without keys to attend to gives the output bias, where Keras averages all values.

    Args:
        num_heads: H, the number of heads.
        key_dim: size of each query and key head, at most 256.
        value_dim: size of each value head, at most 256; default key_dim.
        dropout: dropout probability of the attention weights in training.
        use_bias: use biases in the four projections.
        output_shape: width of the output; default query's.
        sliding_window: a query attends only to keys less than this many positions away; None for all.

    Raises:
        TypeError, ValueError: if an argument is invalid; the message names it, its value and what is expected.

    Source:
        Vaswani et al., "Attention Is All You Need", 2017, section 3.2.2.

    Examples:
        >>> import torch, transformer_fast
        >>> layer = transformer_fast.layers.MultiHeadAttention(num_heads=2, key_dim=8)
        >>> query, value = torch.randn(2, 5, 32), torch.randn(2, 7, 20)
        >>> out, weights = layer(query, value, return_attention_scores=True)
        >>> out.shape, weights.shape
        (torch.Size([2, 5, 32]), torch.Size([2, 2, 5, 7]))
    """

    def __init__(
        self,
        num_heads: int,
        key_dim: int,
        value_dim: int | None = None,
        dropout: float = 0.0,
        use_bias: bool = True,
        output_shape: int | None = None,
        sliding_window: int | None = None,
    ):
        super().__init__()
        value_dim = key_dim if value_dim is None else value_dim
        for name, number, most in (
            ("num_heads", num_heads, None), ("key_dim", key_dim, _WIDEST_HEAD), ("value_dim", value_dim, _WIDEST_HEAD),
            ("output_shape", output_shape or 1, None), ("sliding_window", sliding_window or 1, None),
        ):  # fmt: skip
            if isinstance(number, bool) or not isinstance(number, int) or number < 1 or (most and number > most):
                wanted = f"1..{most}" if most else "at least 1"
                raise ValueError(f"{name}: wanted an integer, {wanted}, got {number!r}")
        self.num_heads, self.key_dim, self.value_dim = num_heads, key_dim, value_dim
        self.dropout, self.output_shape, self.sliding_window = _probability(dropout), output_shape, sliding_window
        self.query_dense = _Dense(num_heads * key_dim, use_bias)
        self.key_dense = _Dense(num_heads * key_dim, use_bias)
        self.value_dense = _Dense(num_heads * value_dim, use_bias)
        self.output_dense = _Dense(output_shape or 0, use_bias)

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, key_dim={self.key_dim}, value_dim={self.value_dim}, dropout={self.dropout}"

    def build(self, query_shape: Sequence[int], value_shape: Sequence[int], key_shape: Sequence[int] | None = None):
        """Create the weights before the first call, as an optimizer needs. Only the last size of each shape is used."""
        output: Any = self.output_dense
        if isinstance(output, _Dense) and not self.output_shape:
            output.out_features = query_shape[-1]
        widths = (query_shape[-1], (key_shape or value_shape)[-1], value_shape[-1], self.num_heads * self.value_dim)
        denses: tuple[Any, ...] = (self.query_dense, self.key_dense, self.value_dense, output)
        with torch.no_grad():
            for dense, width in zip(denses, widths):
                if isinstance(dense, _Dense):
                    dense(torch.empty(0, width, dtype=dense.weight.dtype, device=dense.weight.device))

    def set_weights(self, weights: Sequence[Any]) -> None:
        """Load the weights of Keras's layer.

        Args:
            weights: the arrays from its get_weights(): kernel and bias of query, key and value, kernels (E, H, D),
                biases (H, D); then kernel (H, D, E) and bias (E,) of the output. No biases if use_bias is False.

        Raises:
            ValueError: for another number of arrays or other shapes.
        """
        denses = (self.query_dense, self.key_dense, self.value_dense, self.output_dense)
        each = 1 if self.query_dense.bias is None else 2
        if len(weights) != 4 * each:
            raise ValueError(f"weights: wanted {4 * each} arrays, got {len(weights)}")
        arrays = [torch.as_tensor(w, dtype=torch.float32) for w in weights]
        heads = self.num_heads
        dims = (self.key_dim, self.key_dim, self.value_dim, self.value_dim)
        for i, (kernel, dim) in enumerate(zip(arrays[::each], dims)):
            known = tuple(kernel.shape[:2] if i == 3 else kernel.shape[1:])
            if kernel.dim() != 3 or known != (heads, dim):
                wanted = f"({heads}, {dim}, E)" if i == 3 else f"(E, {heads}, {dim})"
                raise ValueError(f"weights: wanted a kernel of shape {wanted} at {i * each}, got {tuple(kernel.shape)}")
        if self.output_shape in (None, arrays[3 * each].shape[2]) and isinstance(self.output_dense, _Dense):
            self.output_dense.out_features = arrays[3 * each].shape[2]
        self.build(*((arrays[i * each].shape[0],) for i in (0, 2, 1)))
        with torch.no_grad():
            for i, dense in enumerate(denses):
                matrix = (arrays[i * each].flatten(0, 1) if i == 3 else arrays[i * each].flatten(1)).t()
                bias = arrays[i * each + 1].flatten() if each == 2 else None
                for parameter, array in ((dense.weight, matrix), (dense.bias, bias)):
                    if array is not None and parameter.shape != array.shape:
                        raise ValueError(f"weights: wanted {tuple(parameter.shape)}, got {tuple(array.shape)}")
                    if array is not None:
                        parameter.copy_(array)

    def forward(
        self,
        query: torch.Tensor,
        value: torch.Tensor,
        key: torch.Tensor | None = None,
        query_mask: torch.Tensor | None = None,
        value_mask: torch.Tensor | None = None,
        key_mask: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        return_attention_scores: bool = False,
        training: bool | None = None,
        use_causal_mask: bool = False,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Compute attention. A pair takes part if all masks allow it (True or nonzero).

        Args:
            query: (B, T, Eq), floating point.
            value: (B, S, Ev).
            key: (B, S, Ek); default value.
            query_mask: (B, T).
            value_mask: (B, S).
            key_mask: (B, S).
            attention_mask: broadcasts to (B, T, S), or (B, H, T, S).
            return_attention_scores: also return the attention weights.
            training: whether dropout applies; default: the mode set by train() and eval().
            use_causal_mask: query i attends to keys 0 .. i only.

        Returns:
            (B, T, output_shape). With return_attention_scores a tuple of it and the weights before dropout,
            (B, H, T, S).
        """
        query, value, key = _listed([query, value] if key is None else [query, value, key], same_width=False)
        mask = None
        for name, given, wanted in (
            ("query_mask", query_mask, query.shape[:2]), ("value_mask", value_mask, key.shape[:2]),
            ("key_mask", key_mask, key.shape[:2]),
        ):  # fmt: skip
            if given is not None:
                part = _bool(name, given, tuple(wanted))
                part = part[:, None, :, None] if name == "query_mask" else part[:, None, None]
                mask = part if mask is None else mask & part
        if attention_mask is not None:
            four = attention_mask if attention_mask.dim() == 4 else attention_mask.unsqueeze(-3)
            part = _bool("attention_mask", four, None)
            mask = part if mask is None else mask & part
        self.build(query.shape, value.shape, key.shape)
        q, k, v = (
            linear(dense, x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for dense, x in ((self.query_dense, query), (self.key_dense, key), (self.value_dense, value))
        )
        p = self.dropout if (self.training if training is None else training) else 0.0
        window = None if self.sliding_window is None else (self.sliding_window - 1,) * 2
        scale = self.key_dim**-0.5
        out, weights = _fused(q, k, v, mask, p, return_attention_scores, use_causal_mask, scale, window)
        out = linear(self.output_dense, out.transpose(1, 2).flatten(2))
        return (out, weights) if return_attention_scores else out


def _probability(dropout: float) -> float:
    if isinstance(dropout, bool) or not isinstance(dropout, (int, float)) or not 0 <= dropout <= 1:
        raise ValueError(f"dropout: wanted a number in [0, 1], got {dropout!r}")
    return float(dropout)


def _listed(inputs: Any, same_width: bool = True) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(query, value, key) from Keras's list of inputs, after checks of dtypes and shapes."""
    if not isinstance(inputs, (list, tuple)) or len(inputs) not in (2, 3):
        came = f"{len(inputs)} of them" if isinstance(inputs, (list, tuple)) else type(inputs).__name__
        raise TypeError(f"inputs: wanted a list [query, value] or [query, value, key], got {came}")
    query, value, key = (*inputs, inputs[1]) if len(inputs) == 2 else inputs
    for name, t in (("query", query), ("value", value), ("key", key)):
        if not isinstance(t, torch.Tensor) or not t.is_floating_point():
            raise TypeError(f"{name}: wanted a float tensor, got {getattr(t, 'dtype', type(t).__name__)}")
        if t.dim() != 3 or t.shape[0] != query.shape[0]:
            raise ValueError(f"{name}: wanted 3 dimensions, the first {query.shape[0]}, got shape {tuple(t.shape)}")
    if key.shape[1] != value.shape[1]:
        raise ValueError(f"key: wanted {value.shape[1]} positions as value has, got {key.shape[1]}")
    if same_width and key.shape[2] != query.shape[2]:
        raise ValueError(f"key: wanted width {query.shape[2]} as query has, got {key.shape[2]}")
    return query, value, key


def _bool(name: str, mask: torch.Tensor, shape: tuple[int, ...] | None) -> torch.Tensor:
    if not isinstance(mask, torch.Tensor) or mask.is_floating_point():
        raise TypeError(f"{name}: wanted a bool or integer tensor, got {getattr(mask, 'dtype', type(mask).__name__)}")
    if shape is not None and tuple(mask.shape) != shape:
        raise ValueError(f"{name}: wanted shape {shape}, got {tuple(mask.shape)}")
    return mask if mask.dtype == torch.bool else mask != 0


def _masks(mask: Any, query: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    if mask is None:
        return None, None
    if not isinstance(mask, (list, tuple)) or len(mask) not in (2, 3):
        came = f"{len(mask)} of them" if isinstance(mask, (list, tuple)) else type(mask).__name__
        raise TypeError(f"mask: wanted a list [query_mask, value_mask], got {came}")
    first, second = (
        None if m is None else _bool(name, m, tuple(t.shape[:2]))
        for name, m, t in (("query_mask", mask[0], query), ("value_mask", mask[1], value))
    )
    return first, second


def _causal(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    return torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).tril()


def _fused(q, k, v, mask, p: float, want: bool, causal: bool, scale: float, window=None):
    """The output (B, H, Tq, Dv), and the weights (B, H, Tq, Tv) if `want`, else None."""
    given: dict[str, Any] = {"attn_mask": mask, "is_causal": causal, "scale": scale, "window": window}
    if not want:
        return ops.scaled_dot_product_attention(q, k, v, dropout_p=p, **given), None
    out, lse = ops.scaled_dot_product_attention(q, k, v, dropout_p=p, return_lse=True, **given)
    return out, ops.attention_probabilities(q, k, lse, **given)


def _wide(query, key, value, mask, p: float, causal: bool):
    """Attention for vectors wider than the fused op supports, with the score matrix in memory."""
    scores = torch.matmul(query, key.transpose(1, 2))
    if causal:
        mask = _causal(query, key) if mask is None else mask & _causal(query, key)
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    weights = torch.softmax(scores, -1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(scores.dtype)
    if mask is not None:
        weights = weights.masked_fill(~mask, 0.0)
    return torch.matmul(ops.dropout(weights, p), value), weights


def _additive(query, key, value, weight, value_mask, p: float, want: bool, causal: bool):
    mask = None if value_mask is None else value_mask[:, None]
    if causal:
        mask = _causal(query, key) if mask is None else mask & _causal(query, key)
    weight = weight.to(query.dtype).contiguous()
    if not want and not p:
        return ops.additive_attention(query, key, value, weight, attn_mask=mask), None
    out, weights = ops.additive_attention(query, key, value, weight, attn_mask=mask, return_weights=True)
    return (torch.matmul(ops.dropout(weights, p), value) if p else out), weights
