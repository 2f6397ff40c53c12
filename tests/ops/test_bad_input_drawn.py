"""Each argument of each op is replaced by wrong values. The call must raise an error that names an argument, or
work."""

import inspect

import numpy as np
import pytest
import torch

import transformer_fast as tf


def r(*shape):
    return torch.randn(*shape)


IDS, LENGTHS = torch.tensor([[1, 2, 0], [0, 3, 1]]), torch.tensor([3, 5])
ATTENTION = {
    "query": r(2, 4, 5, 8), "key": r(2, 4, 6, 8), "value": r(2, 4, 6, 8),
    "attn_mask": torch.ones(5, 6, dtype=torch.bool),
    "dropout_p": 0.1, "is_causal": True, "scale": 0.5, "enable_gqa": False, "bias": r(5, 6), "key_lengths": LENGTHS,
    "causal_alignment": "top_left", "window": (3, 0), "softcap": 5.0, "relative_bias": tf.RelativeBias(r(8, 4)),
    "return_lse": False, "generator": None,
}  # fmt: skip
# op: valid arguments
CALLS = {
    tf.scaled_dot_product_attention: ATTENTION,
    tf.varlen_attention: {
        "query": r(8, 4, 8), "key": r(8, 4, 8), "value": r(8, 4, 8), "cu_seqlens_q": torch.tensor([0, 3, 8]),
        "cu_seqlens_k": torch.tensor([0, 4, 8]), "max_seqlen_q": 5, "max_seqlen_k": 5, "dropout_p": 0.1,
        "is_causal": True, "scale": 0.5, "attn_mask": None, "bias": r(2, 1, 5, 5), "causal_alignment": "top_left",
        "window": (3, 0), "softcap": 5.0, "relative_bias": tf.RelativeBias(r(8, 4)), "generator": None,
    },
    tf.ops.qkv_attention: {
        "qkv": r(2, 5, 3, 4, 8), "dropout_p": 0.1, "is_causal": True, "scale": 0.5, "key_lengths": LENGTHS,
    },
    tf.kv_cache_attention: {
        "query": r(2, 4, 1, 8), "key": r(2, 2, 1, 8), "value": r(2, 2, 1, 8), "key_cache": r(2, 2, 9, 8),
        "value_cache": r(2, 2, 9, 8), "cache_lengths": LENGTHS, "scale": 0.5, "window": (3, None), "softcap": 1.0,
        "relative_bias": tf.RelativeBias(r(8, 4), 40, False),
    },
    tf.rotary_cache_append: {
        "query": r(2, 4, 1, 8), "key": r(2, 2, 1, 8), "value": r(2, 2, 1, 8), "key_cache": r(2, 2, 9, 8),
        "value_cache": r(2, 2, 9, 8), "cache_lengths": LENGTHS, "cos": r(9, 4), "sin": r(9, 4),
        "positions": torch.tensor([5]), "query_weight": r(8), "key_weight": r(8), "eps": 1e-6, "interleaved": False,
    },
    tf.attention_probabilities: {
        "query": r(2, 4, 5, 8), "key": r(2, 2, 6, 8), "lse": r(2, 4, 5), "scale": 0.5, "heads": [1], "bias": r(5, 6),
        "attn_mask": torch.ones(5, 6, dtype=torch.bool), "key_lengths": LENGTHS, "is_causal": True,
        "causal_alignment": "top_left", "window": (3, 0), "softcap": 5.0, "relative_bias": tf.RelativeBias(r(8, 4)),
    },
    tf.multi_head_attention: {
        "query": r(2, 5, 8), "key": r(2, 6, 8), "value": r(2, 6, 8), "num_heads": 2, "in_proj_weight": r(24, 8),
        "in_proj_bias": r(24), "out_proj_weight": r(8, 8), "out_proj_bias": r(8),
        "attn_mask": torch.ones(5, 6, dtype=torch.bool), "key_lengths": LENGTHS, "dropout_p": 0.1, "is_causal": True,
        "scale": 0.5,
    },
    tf.additive_attention: {
        "query": r(2, 5, 8), "key": r(2, 6, 8), "value": r(2, 6, 8), "score_weight": r(8), "bias": r(8),
        "attn_mask": torch.ones(2, 5, 6, dtype=torch.bool), "key_lengths": LENGTHS,
    },
    tf.lstm: {
        "input": r(2, 5, 8), "weight_ih": r(16, 8), "weight_hh": r(16, 4), "bias_ih": r(16), "bias_hh": r(16),
        "initial": (r(2, 4), r(2, 4)), "lengths": LENGTHS, "reverse": True,
    },
    tf.gru: {
        "input": r(5, 8), "weight_ih": r(12, 8), "weight_hh": r(12, 4), "bias_ih": r(12), "bias_hh": r(12),
        "initial": r(2, 4), "cu_seqlens": torch.tensor([0, 2, 5]), "max_seqlen": 3, "reverse": False,
    },
    tf.layer_norm: {"input": r(4, 8), "normalized_shape": (8,), "weight": r(8), "bias": r(8), "eps": 1e-5},
    tf.rms_norm: {"input": r(4, 8), "normalized_shape": (8,), "weight": r(8), "eps": 1e-5},
    tf.add_layer_norm: {
        "input": r(4, 8), "residual": r(4, 8), "weight": r(8), "bias": r(8), "eps": 1e-5, "dropout_p": 0.1,
        "generator": None,
    },
    tf.add_rms_norm: {"input": r(4, 8), "residual": r(4, 8), "weight": r(8), "eps": 1e-5, "dropout_p": 0.1},
    tf.bias_activation: {"input": r(4, 8), "bias": r(8), "activation": "gelu", "gate": r(4, 8)},
    tf.rotary_embedding: {
        "input": r(2, 5, 3, 8), "cos": r(9, 4), "sin": r(9, 4), "positions": torch.arange(5), "interleaved": False,
    },
    tf.dropout: {"input": r(4, 8), "p": 0.1, "generator": None},
    tf.linear: {"input": r(4, 8), "weight": r(6, 8), "bias": r(6), "activation": "gelu"},
    tf.projections: {"input": r(4, 8), "weights": [r(6, 8), r(3, 8)], "biases": [r(6), None]},
    tf.to_panels: {"weight": r(6, 8), "dtype": torch.float32},
    tf.cross_entropy: {
        "input": r(6, 9), "target": torch.arange(6), "weight": r(9).abs(), "ignore_index": 2, "reduction": "sum",
        "label_smoothing": 0.1, "z_loss": 0.1, "inplace_gradient": False,
    },
    tf.linear_cross_entropy: {
        "hidden": r(6, 8), "weight": r(9, 8), "target": torch.arange(6), "bias": r(9), "chunk_rows": 4,
        "ignore_index": 2, "reduction": "sum", "label_smoothing": 0.1, "z_loss": 0.1,
    },
    tf.embedding_layer_norm: {
        "input_ids": IDS, "word_weight": r(5, 8), "position_ids": IDS, "position_weight": r(5, 8),
        "token_type_ids": IDS, "token_type_weight": r(5, 8), "norm_weight": r(8), "norm_bias": r(8), "eps": 1e-5,
        "dropout_p": 0.1, "padding_idx": 1,
    },
}  # fmt: skip


def _wrong(value):
    """Wrong values that a user might pass instead of `value`."""
    yield from (
        None,
        "seven",
        [[1.0]],
        [],
        3,
        -7,
        2.5,
        float("nan"),
        {},
        object(),
        torch.float16,
        2**70,
        (1, 2, 3),
        b"",
        np.float32(0.5),
        np.int64(3),
        np.bool_(True),
        np.zeros(3),
        np.array(0.5),
        1j,
        {1},
        -(2**63),
        1e-320,
        float("-inf"),
        torch.tensor(3),
        r(4, 8).to_sparse(),
        r(8).to_sparse(),
        r(4, 8).to_sparse_csr(),
        r(4, 8).to_mkldnn(),
        torch.nested.nested_tensor([r(2, 8), r(3, 8)]),
        torch.empty(8).to(torch.float8_e4m3fn),
        torch.quantize_per_tensor(r(4, 8), 0.1, 0, torch.qint8),
        torch.ones(3, device="meta"),
    )
    if isinstance(value, torch.Tensor):
        yield from (
            value[0],
            value[None],
            value[:0],
            value[..., :1],
            value[..., None],
            value.to("meta"),
            value.tolist(),
        )
        yield from (torch.cat([value, value]), value.to(torch.complex64), value.numpy(), value.bool(), value.int())
        yield from (value.to_sparse(), torch.nested.nested_tensor([value]), value.to(torch.float8_e4m3fn))
        yield from (value.double(), value.half(), torch.ones((), dtype=value.dtype), torch.cat([value, value], -1))
        if value.dim() > 1:
            yield from (value.transpose(0, 1), value[:, :1], value[:, :-1], torch.cat([value] * 3, 1)[:, :3])
    if isinstance(value, (list, tuple)):
        yield from (value[0], [*value, None], [*value, "x"], torch.ones(2), [object()] * 2, [[1], [2]])
    if isinstance(value, tf.RelativeBias):
        yield from (value._replace(table=t) for t in (None, [1.0], value.table[0], value.table[:, :1], value.table[:1]))
        yield from (value._replace(max_distance=d) for d in (None, 2.5, "x", -1, 2**70))
        yield from (value._replace(table=value.table.to("meta")), value._replace(bidirectional="x"), value.table)


@pytest.mark.quick
@pytest.mark.parametrize("op", CALLS, ids=lambda op: op.__name__)
@pytest.mark.filterwarnings("ignore:.*(sparse|Sparse|nested|quantize)")
def test_wrong_arguments(op):
    right = CALLS[op]
    names = [*inspect.signature(op).parameters, "max_seqlen", "input"]
    assert set(right) <= set(names)
    op(**right)
    failures = []
    for name, value in right.items():
        for wrong in _wrong(value):
            of_shape = hasattr(wrong, "ndim") and not getattr(wrong, "is_nested", False)
            said = f"{name}={type(wrong).__name__} {tuple(wrong.shape) if of_shape else wrong!r}"
            try:
                op(**{**right, name: wrong})
            except (TypeError, ValueError) as error:
                if not any(n in str(error) for n in (name, name.rstrip("es"), *names)):
                    failures.append(f"{said}: {type(error).__name__}: {error}")
            except Exception as error:  # other exceptions are not from an input check
                failures.append(f"{said}: {type(error).__name__}: {str(error)[:100]}")
    assert not failures, "\n".join(failures)


def _on_meta(value):
    if isinstance(value, torch.Tensor):
        return value.to("meta")
    if isinstance(value, tf.RelativeBias):
        return value._replace(table=value.table.to("meta"))
    return type(value)(map(_on_meta, value)) if isinstance(value, (list, tuple)) else value


def _tensors(value):
    return [value] if isinstance(value, torch.Tensor) else [t for v in value if v is not None for t in _tensors(v)]


@pytest.mark.parametrize("op", [op for op in CALLS if op is not tf.to_panels], ids=lambda op: op.__name__)
def test_everything_on_meta(op):
    """All tensors on the meta device, lengths included: only shapes and dtypes."""
    wanted = _tensors(op(**CALLS[op]))
    found = _tensors(op(**{name: _on_meta(value) for name, value in CALLS[op].items()}))
    assert [(t.shape, t.dtype) for t in found] == [(t.shape, t.dtype) for t in wanted]
    assert all(t.is_meta for t in found)
