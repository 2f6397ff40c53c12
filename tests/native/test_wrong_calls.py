"""Native ops called directly: tensors that do not fit each other raise an error, and are neither read nor written
outside their memory."""

import cuda_emulator
import pytest
import torch

from transformer_fast.backends import native

if native.load():
    pytest.skip(native.load(), allow_module_level=True)

_OPS = torch.ops.transformer_fast
f, h, i8, i64, i32 = torch.float32, torch.bfloat16, torch.int8, torch.int64, torch.int32


def _r(*shape, dtype=f):
    return torch.randn(*shape).to(dtype)


def _new(*shape, dtype=f):
    return torch.zeros(*shape, dtype=dtype)


_RNG, _IDS = torch.tensor([3, 5]), torch.tensor([1, 0, 3])
_ANGLES = {"cos": _r(7, 2), "sin": _r(7, 2), "positions": torch.tensor([[0, 1, 6], [2, 3, 4]])}
_ATTENTION = {
    "query": _r(2, 4, 5, 8), "key": _r(2, 2, 6, 8), "value": _r(2, 2, 6, 8), "bias": _r(2, 4, 5, 6),
    "mask": torch.ones(2, 4, 5, 6, dtype=torch.bool), "key_lengths": torch.tensor([6, 3]), "cu_seqlens_q": None,
    "cu_seqlens_k": None, "max_seqlen_q": 5, "max_seqlen_k": 6, "relative_bias": _r(4, 161), "rng": _RNG, "scale": 0.5,
    "bottom_right": 0, "window_left": -1, "window_right": -1, "softcap": 0.0, "dropout_p": 0.1,
}  # fmt: skip
_UNPADDED = {
    **_ATTENTION, "query": _r(5, 4, 8), "key": _r(6, 2, 8), "value": _r(6, 2, 8), "key_lengths": None,
    "cu_seqlens_q": torch.tensor([0, 2, 5]), "cu_seqlens_k": torch.tensor([0, 3, 6]), "max_seqlen_q": 3,
    "max_seqlen_k": 3, "bias": _r(2, 4, 3, 3), "mask": torch.ones(2, 4, 3, 3, dtype=torch.bool),
}  # fmt: skip
_BACKWARD = {"dbias": _new(2, 4, 5, 6), "drelative_bias": _new(2, 4, 161)}
_ENTROPY = {
    "logits": _r(3, 6), "target": torch.tensor([0, 5, -1]), "weight": _r(6), "ignore_index": -1, "label_smoothing": 0.1,
    "z_loss": 0.1, "largest": _r(3), "total": _r(3),
}  # fmt: skip
_EMBEDDING = {
    "ids": _IDS, "word": _r(4, 9), "position_ids": _IDS.clone(), "position": _r(5, 9), "type_ids": _IDS.clone(),
    "token_type": _r(6, 9), "norm_weight": _r(9), "rng": _RNG, "dropout_p": 0.1, "mean": _r(3), "rstd": _r(3),
}  # fmt: skip
_ADDITIVE = {
    "query": _r(2, 3, 8), "key": _r(2, 4, 8), "value": _r(2, 4, 5), "score_weight": _r(8), "bias": _r(8),
    "mask": torch.ones(2, 3, 4, dtype=torch.bool), "key_lengths": torch.tensor([4, 2]), "weights": _r(2, 3, 4),
}  # fmt: skip
_LSTM = {
    "hidden": _r(2, 9), "memory": _r(2, 9), "sequences": torch.tensor([[0, 3], [3, 2], [0, 1]]), "steps": 3,
    "reverse": False, "out": _r(5, 9), "saved": _r(5, 36), "memories": _r(5, 9),
}  # fmt: skip
_Q = torch.randint(-127, 128, (40, 70), dtype=i8)
_PANELS, _INNER, _OUTER = (
    torch.zeros(-(-out // 32), -(-inner // 4) * 128 + -(-inner // 64) * 256, dtype=i8)
    for out, inner in ((40, 70), (130, 40), (40, 130))
)
_STEP = {
    "ids": torch.tensor([1, 2]), "token": _r(5, 6), "hidden": _r(1, 2, 8), "memory": None, "feed": _r(2, 4),
    "keys": _r(3, 4, 7), "values": _r(3, 4, 8), "mask": torch.ones(3, 4, dtype=torch.bool),
    "sources": torch.tensor([0, 2], dtype=i32), "score_weight": _r(7),
    "weights": [*_r(3, 8, 10).clone(), *_r(3, 8, 8).clone(), _r(7, 8), _r(4, 16), _r(11, 4)],
    "biases": [_r(24), _r(24), None, _r(4), _r(11)], "maxout": False, "readout_size": 4, "next_hidden": _new(1, 2, 8),
    "next_memory": None, "next_feed": _new(2, 4), "logits": _new(2, 11), "screen": None, "bounds": None,
    "barred": None, "tokens": None, "vocabulary": 11,
}  # fmt: skip
# Valid arguments of each op.
CALLS = {
    "cpu_norm_forward": {
        "x": _r(3, 9), "residual": _r(3, 9), "weight": _r(9), "bias": _r(9), "rng": _RNG, "eps": 1e-5, "rms": False,
        "dropout_p": 0.1, "y": _new(3, 9), "sum": _new(3, 9), "mean": _new(3), "rstd": _new(3),
    },
    "cpu_norm_backward": {
        "grad_y": _r(3, 9), "grad_sum": _r(3, 9), "v": _r(3, 9), "weight": _r(9), "mean": _r(3), "rstd": _r(3),
        "rng": _RNG, "dropout_p": 0.1, "grad_v": _new(3, 9), "grad_x": _new(3, 9), "grad_weight": _new(9),
        "grad_bias": _new(9),
    },
    "cpu_bias_activation_forward": {
        "x": _r(3, 9), "bias": _r(9), "gate": _r(3, 9), "activation": 0, "y": _new(3, 9),
    },
    "cpu_bias_activation_backward": {
        "grad": _r(3, 9), "x": _r(3, 9), "bias": _r(9), "gate": _r(3, 9), "activation": 1, "grad_x": _new(3, 9),
        "grad_bias": _new(9), "grad_gate": _new(3, 9),
    },
    "cpu_rotary": {
        "x": _r(2, 3, 4, 5), **_ANGLES, "interleaved": False, "inverse": False, "y": _new(2, 3, 4, 5),
    },
    "cpu_rotary_append": {
        "query": _r(2, 3, 4, 5), "key": _r(2, 3, 2, 5), "value": _r(2, 3, 2, 5), "key_cache": _new(2, 2, 9, 5),
        "value_cache": _new(2, 2, 9, 5), "lengths": torch.tensor([2, 6]), **_ANGLES, "query_weight": _r(5),
        "key_weight": _r(5), "eps": 1e-6, "interleaved": True, "y": _new(2, 3, 4, 5),
    },
    "cpu_dropout_forward": {"x": _r(3, 9), "rng": _RNG, "p": 0.1, "y": _new(3, 9)},
    "cpu_attention_forward": {**_ATTENTION, "out": _new(2, 4, 5, 8), "lse": _new(2, 4, 5)},
    "cpu_attention_backward": {
        **_ATTENTION, "grad_out": _r(2, 4, 5, 8), "grad_lse": _r(2, 4, 5), "out": _r(2, 4, 5, 8), "lse": _r(2, 4, 5),
        "dq": _new(2, 4, 5, 8), "dk": _new(2, 2, 6, 8), "dv": _new(2, 2, 6, 8), **_BACKWARD,
    },
    "cpu_attention_forward unpadded": {**_UNPADDED, "out": _new(5, 4, 8), "lse": _new(4, 5)},
    "cpu_column_sum": {"x": _r(3, 9), "out": _new(9)},
    "cpu_to_panels": {"weight": _r(40, 9), "panels": _new(2, 9, 32)},
    "cpu_to_panels int8": {"weight": _r(40, 9), "panels": _new(2, 13, 32, dtype=i8)},
    "cpu_linear_panel": {
        "x": _r(3, 9), "panels": _r(2, 9, 32), "bias": _r(40), "activation": 0, "y": _new(3, 40),
    },
    "cpu_linear_rows": {
        "x": _r(3, 9), "weights": [_r(40, 9), _r(2, 9)], "biases": [_r(40), None], "activation": -1,
        "y": [_new(3, 40), _new(3, 2)],
    },
    "cpu_linear_long": {"x": _r(3, 9), "weight": _r(40, 9), "bias": _r(40), "activation": 2, "y": _new(3, 40)},
    "cpu_linear_bf16": {
        "x": _r(3, 9, dtype=h), "weight": _r(40, 9, dtype=h), "bias": _r(40, dtype=h), "activation": 2,
        "y": _new(3, 40, dtype=h),
    },
    "cpu_weight_gradient": {"g": _r(3, 40), "x": _r(3, 9), "y": _new(40, 9), "sums": _new(40)},
    "cpu_content_hash": {"tensors": [_r(3, 9), _r(5)], "hashes": _new(2, dtype=i64)},
    "cpu_cross_entropy_forward": {**_ENTROPY, "losses": _new(3)},
    "cpu_cross_entropy_backward": {**_ENTROPY, "grad_losses": _r(3), "grad": _new(3, 6)},
    "cpu_embedding_layer_norm_forward": {**_EMBEDDING, "norm_bias": _r(9), "eps": 1e-5, "y": _new(3, 9)},
    "cpu_embedding_layer_norm_backward": {
        **_EMBEDDING, "grad_y": _r(3, 9), "grad_v": _new(3, 9), "grad_weight": _new(9), "grad_bias": _new(9),
    },
    "cpu_embedding_gradient": {"grad_v": _r(3, 9), "ids": _IDS, "padding_idx": 1, "grad_table": _new(4, 9)},
    "cpu_additive_attention_forward": {**_ADDITIVE, "out": _new(2, 3, 5)},
    "cpu_additive_attention_backward": {
        **_ADDITIVE, "grad_out": _r(2, 3, 5), "grad_weights": _r(2, 3, 4), "grad_query": _new(2, 3, 8),
        "grad_key": _new(2, 4, 8), "grad_value": _new(2, 4, 5), "grad_score_weight": _new(2, 8),
    },
    "cpu_recurrence_forward": {
        **_LSTM, "gates": _r(5, 36), "panels": _r(4, 9, 32), "bias": _r(36), "last_hidden": _new(2, 9),
        "last_memory": _new(2, 9),
    },
    "cpu_recurrence_backward": {
        **_LSTM, "grad_out": _r(5, 9), "grad_last_hidden": _r(2, 9), "grad_last_memory": _r(2, 9),
        "panels": _r(1, 36, 32), "grad_gates": _new(5, 36), "grad_products": None, "grad_hidden": _new(2, 9),
        "grad_memory": _new(2, 9),
    },
    "cpu_recurrent_step": _STEP,
    "cpu_quantize_weight": {
        "weight": _r(40, 70), "group": 64, "q": _new(40, 70, dtype=i8), "scale": _new(40, 2),
    },
    "cpu_int8_to_panels": {"weight": _Q, "scale": _r(40, 2), "group": 64, "panels": _PANELS.clone()},
    "cpu_int8_from_panels": {
        "panels": _PANELS, "group": 64, "weight": _new(40, 70, dtype=i8), "scale": _new(40, 2),
    },
    "cpu_linear_int8": {
        "x": _r(3, 70), "panels": [_PANELS, _PANELS], "biases": [_r(40), None], "outs": [40, 38], "group": 64,
        "activation": -1, "y": _new(3, 78),
    },
    "cpu_int8_block": {
        "context": _r(3, 70), "residual": _r(3, 40), "panels": [_PANELS, _INNER, _INNER, _OUTER],
        "biases": [_r(40), None, _r(130), _r(40)], "feed_forward": 130, "groups": [64, 64, 64],
        "norms": [_r(40), _r(40), _r(40), None], "eps": [1e-5, 1e-5], "rms": False, "activation": 0, "y": _new(3, 40),
    },
}  # fmt: skip
# Arguments whose rows the others do not determine: a table or a cache may have as many as the caller likes.
_FREE_ROWS = {
    ("cpu_column_sum", "x"), ("cpu_to_panels", "weight"), ("cpu_to_panels int8", "weight"),
    ("cpu_recurrent_step", "token"), ("cpu_embedding_gradient", "grad_table"),
    *((f"cpu_embedding_layer_norm_{way}", table) for way in ("forward", "backward")
      for table in ("word", "position", "token_type")),
}  # fmt: skip
# Arguments whose columns int8 panels pad to a multiple of four: a few more or fewer fit.
_PADDED = {
    ("cpu_int8_to_panels", "weight"), ("cpu_int8_from_panels", "weight"), ("cpu_linear_int8", "x"),
    ("cpu_int8_block", "context"),
}  # fmt: skip


def _call(name, **changes):
    op = getattr(_OPS, name.split()[0]).default
    values = {**CALLS[name.replace("cuda_", "cpu_")], **changes}
    op(*(values[a.name] for a in op._schema.arguments))


def _wrong(op, name, t):
    """Tensors that do not fit the others: (how they differ, tensor)."""
    if (op, name) == ("cpu_content_hash", "tensors"):
        return
    for axis in range(t.dim()):
        if axis or (op, name) not in _FREE_ROWS:
            step = 4 if axis == 1 and (op, name) in _PADDED else 1
            shorter = t.narrow(axis, 0, t.shape[axis] - step).contiguous()
            if not ("attention" in op and t.dim() == 4 and name in ("bias", "mask") and shorter.shape[axis] == 1):
                yield f"axis {axis} is shorter", shorter
            yield f"axis {axis} is longer", torch.cat([t, t.narrow(axis, 0, step)], axis)
            yield "empty", t.narrow(axis, 0, 0)
    if t.dim() > 2:  # vectors and matrices may be passed with more axes
        yield "one axis more", t[None]
        yield "axes exchanged", t.transpose(0, -1)
    yield "one axis less", t.new_zeros(t.shape[1:])
    yield "float64", t.double()
    yield "int16", t.to(torch.int16)
    yield "on the meta device", t.to("meta")


def _check_each_tensor(name):
    _call(name)
    taken = []
    kind = name.replace("cuda_", "cpu_")
    for argument, value in CALLS[kind].items():
        values = value if isinstance(value, list) else [value]
        for i, t in enumerate(values):
            if not isinstance(t, torch.Tensor):
                continue
            for how, wrong in _wrong(kind, argument, t):
                changed = [*values[:i], wrong, *values[i + 1 :]] if isinstance(value, list) else wrong
                try:
                    _call(name, **{argument: changed})
                except (RuntimeError, NotImplementedError):
                    continue
                taken.append(f"{argument}: {how}, {tuple(wrong.shape)} {wrong.dtype}")
    assert not taken, "\n".join(taken)


@pytest.mark.quick
@pytest.mark.parametrize("name", CALLS)
def test_tensors_that_do_not_fit(name):
    _check_each_tensor(name)


@pytest.mark.parametrize("op", ["norm_forward", "norm_backward", "bias_activation_forward", "bias_activation_backward",
                                "rotary", "rotary_append"])  # fmt: skip
def test_tensors_that_do_not_fit_on_a_gpu(op):
    with cuda_emulator.active():
        _check_each_tensor(f"cuda_{op}")


_NO_DROPOUT = {n: v for n, v in _ATTENTION.items() if n != "dropout_p"} | {"dropout_p": 0.0, "rng": None}
_DECODE = {**_NO_DROPOUT, **dict.fromkeys(("bias", "mask", "relative_bias", "new_key", "new_value", "key_lengths"))}


@pytest.mark.parametrize(
    "shape",
    [pytest.param(s, id=n) for n, s in {"batch": (0, 4, 1), "heads": (1, 0, 1), "queries": (1, 4, 0)}.items()],
)
def test_nothing_to_decode_on_a_gpu(shape):
    batch, heads, queries = shape
    query, cache = _r(batch, heads, queries, 16, dtype=h), _r(batch, 2, 6, 16, dtype=h)
    op = _OPS.cuda_attention_decode.default
    changes = {"query": query, "key": cache, "value": cache, "out": query.clone(), "lse": _new(*shape)}
    with cuda_emulator.active(), pytest.raises(RuntimeError, match="query: wanted at least one element"):
        op(*({**_DECODE, **changes}[a.name] for a in op._schema.arguments))


def test_no_columns_on_a_gpu():
    rows = {n: _r(3, 0) for n in ("grad_y", "grad_sum", "v", "grad_v", "grad_x")}
    columns = {n: _r(0) for n in ("weight", "grad_weight", "grad_bias")}
    with cuda_emulator.active(), pytest.raises(RuntimeError, match="v: wanted at least one element"):
        _call("cuda_norm_backward", **rows, **columns)


def _i(*values, dtype=i64):
    return torch.tensor(values, dtype=dtype)


# op: changes to its arguments, each of which must raise an error.
WRONG = {
    "cpu_norm_forward": [
        {"y": _new(9, 3).t()}, {"x": _r(9, 3).t()}, {"mean": _new(6)[::2]}, {"weight": _r(18)[::2]},
        {"dropout_p": 1.5}, {"dropout_p": float("nan")}, {"y": _new(3, 9, dtype=h)}, {"weight": _r(9, dtype=h)},
        {"x": _r(2, 3, 9)[0].t()},
    ],
    "cpu_norm_backward": [{"grad_v": _new(9, 3).t()}, {"grad_weight": _new(1).expand(9)}, {"grad_y": _r(9, 3).t()}],
    "cpu_bias_activation_forward": [{"activation": 4}, {"activation": -1}, {"y": _new(9, 3).t()}],
    "cpu_bias_activation_backward": [{"activation": 7}, {"gate": None}, {"grad_gate": None}],
    "cpu_rotary": [
        {"positions": _i(0, 1, 7, 2, 3, 4).view(2, 3)}, {"positions": _i(0, 1, -1, 2, 3, 4).view(2, 3)},
        {"positions": None, "cos": _r(2, 2), "sin": _r(2, 2)}, {"cos": _r(7, 3), "sin": _r(7, 3)},
        {"y": _new(1, 3, 4, 5).expand(2, 3, 4, 5)}, {"cos": _r(2, 7).t()}, {"x": _r(2, 3, 5, 4).transpose(2, 3)},
    ],
    "cpu_rotary_append": [
        {"lengths": _i(2, 7)}, {"lengths": _i(-1, 2)}, {"positions": None}, {"query_weight": _r(5, dtype=h)},
        {"positions": _i(0, 1, 7, 2, 3, 4).view(2, 3)}, {"key_cache": _new(2, 2, 5, 9).transpose(2, 3)},
        {"value_cache": _new(1, 2, 9, 5).expand(2, 2, 9, 5)},
    ],
    "cpu_dropout_forward": [{"p": 1.01}, {"y": _new(9, 3).t()}],
    "cpu_attention_forward": [
        {"relative_bias": _r(4, 101)}, {"relative_bias": _r(4, 160)}, {"out": _new(2, 4, 8, 5).transpose(2, 3)},
        {"out": _new(1, 4, 5, 8).expand(2, 4, 5, 8)}, {"lse": _new(2, 1, 5).expand(2, 4, 5)},
        {"dropout_p": 2.0}, {"cu_seqlens_q": _i(0, 5)}, {"query": _r(2, 3, 5, 8)},
        {n: _r(2, 4, s, 300) for n, s in {"query": 5, "key": 6, "value": 6, "out": 5}.items()},
        {"lse": _new(5, 4, 2).transpose(0, 2)},
    ],
    "cpu_attention_backward": [
        {"dbias": _new(2, 4, 6, 5).transpose(2, 3)}, {"bias": None}, {"relative_bias": None},
        {"drelative_bias": _new(2, 161, 4).transpose(1, 2)}, {"dk": _new(2, 4, 6, 8)},
        {"dk": _new(2, 1, 6, 8).expand(2, 2, 6, 8)},
    ],
    "cpu_attention_forward unpadded": [
        {"cu_seqlens_q": _i(0, 2, 6)}, {"cu_seqlens_k": _i(0, 7, 6)}, {"cu_seqlens_q": _i(-1, 2, 5)},
        {"max_seqlen_q": 2}, {"max_seqlen_k": 2}, {"cu_seqlens_k": None}, {"cu_seqlens_q": _i(0, 4, 5)},
    ],
    "cpu_quantize_weight": [
        {"group": 48}, {"group": 0}, {"group": 512}, {"q": _new(70, 40, dtype=i8).t()},
        {"weight": _r(40, 0), "q": _new(40, 0, dtype=i8), "scale": _new(40, 0)},
    ],
    "cpu_int8_to_panels": [{"group": 32}, {"scale": _r(2, 40).t()}],
    "cpu_int8_from_panels": [{"group": 128}],
    "cpu_linear_int8": [
        {"outs": [40]}, {"outs": [40, 33]}, {"outs": [0, 78]}, {"group": 32}, {"activation": 4},
        {"panels": [_PANELS, None]}, {"biases": [_r(40)]}, {"x": _r(70, 3).t()},
        {"y": _new(1, 78).expand(3, 78)}, {"y": _new(78, 3).t()},
    ],
    "cpu_int8_block": [
        {"panels": [_PANELS, _INNER, None]}, {"panels": [None, _INNER, None, _OUTER]}, {"feed_forward": 0},
        {"eps": [1e-5]}, {"groups": [64, 64]}, {"groups": [64, 32, 64]}, {"activation": -1}, {"norms": [_r(40)] * 3},
        {"y": _new(40, 3).t()}, {"y": _new(3, 40, dtype=h)},
    ],
    "cpu_column_sum": [{"x": _r(9, 3).t()}],
    "cpu_to_panels": [
        {"weight": _r(65, 9)}, {"weight": _r(32, 9)}, {"weight": _r(80, 18)[::2, ::2]},
        {"panels": _new(2, 9, 64)[..., ::2]},
    ],
    "cpu_to_panels int8": [{"panels": _new(2, 9, 32, dtype=i8)}],
    "cpu_linear_panel": [
        {"activation": 4}, {"panels": _r(2, 9, 32).to(i8)}, {"y": _new(40, 3).t()},
        {"x": _r(3, 0), "panels": _r(2, 0, 32)},
    ],
    "cpu_linear_rows": [
        {"weights": [_r(40, 9)]}, {"y": [_new(40, 3).t(), _new(3, 2)]}, {"weights": [_r(9, 40).t(), _r(2, 9)]},
        {"x": _r(3, 0), "weights": [_r(40, 0), _r(2, 0)]}, {"x": _r(3, 9, dtype=h)},
    ],
    "cpu_linear_long": [
        {"weight": _r(80, 18)[::2, ::2]}, {"x": _r(9, 3).t()}, {"x": _r(3, 0), "weight": _r(40, 0)}, {"activation": 5},
    ],
    "cpu_linear_bf16": [
        {"weight": _r(80, 18, dtype=h)[::2, ::2]}, {"x": _r(9, 3, dtype=h).t()}, {"activation": 5}, {"bias": _r(40)},
        {"x": _r(3, 0, dtype=h), "weight": _r(40, 0, dtype=h)}, {"y": _new(40, 3, dtype=h).t()}, {"x": _r(3, 9)},
    ],
    "cpu_weight_gradient": [
        {"g": _r(0, 40), "x": _r(0, 9)}, {"x": _r(3, 0), "y": _new(40, 0)}, {"y": _new(9, 40).t()},
    ],
    "cpu_content_hash": [
        {"tensors": [_r(1).expand(1 << 20), _r(5)]}, {"tensors": [_r(10)[::2], _r(5)]},
        {"hashes": _new(4, dtype=i64)[::2]},
    ],
    "cpu_cross_entropy_forward": [
        {"target": _i(0, 6, 1)}, {"target": _i(0, -2, 1)}, {"logits": _r(3, 0), "weight": None},
        {"logits": _r(6, 3).t()}, {"target": _i(0, 9, 1, 9, 2, 9)[::2]},
    ],
    "cpu_cross_entropy_backward": [{"target": _i(0, 6, 1)}, {"grad": _new(6, 3).t()}, {"grad": _new(3, 6, dtype=h)},
                                   {"grad": _new(1, 6).expand(3, 6)}],
    "cpu_embedding_layer_norm_forward": [
        {"ids": _i(0, 1, 4)}, {"type_ids": _i(0, 6, 4)}, {"position_ids": _i(0, -1, 4)}, {"position": None},
        {"type_ids": None}, {"word": _r(9, 4).t()},
    ],
    "cpu_embedding_layer_norm_backward": [{"ids": _i(0, 1, 4)}, {"grad_y": _new(9, 3).t()}],
    "cpu_embedding_gradient": [
        {"ids": _i(0, 1, 4)}, {"ids": _i(0, -1, 1)}, {"padding_idx": 4}, {"grad_table": _new(9, 4).t()},
        {"grad_table": _new(0, 9)},
    ],
    "cpu_additive_attention_forward": [{"key": _r(2, 8, 4).transpose(1, 2)}, {"out": _new(2, 5, 3).transpose(1, 2)}],
    "cpu_recurrence_forward": [
        {"sequences": _i(0, 3, 3, 3, 0, 1).view(3, 2)}, {"sequences": _i(-1, 3, 3, 2, 0, 1).view(3, 2)},
        {"sequences": _i(0, 3, 3, 2, 1, 0).view(3, 2)}, {"sequences": _i(0, 3, 3, 2, 0, 0).view(3, 2)},
        {"sequences": _i(0, 3, 3, 2, 0, 2).view(3, 2)}, {"sequences": _i(0, 3, -3, 2, 1, 0).view(3, 2)},
        {"steps": 2}, {"steps": -1}, {"gates": _r(36, 5).t()}, {"memory": None}, {"last_memory": None},
        {"memories": None}, {"saved": None},
    ],
    "cpu_recurrence_backward": [{"memories": None}, {"grad_memory": None}, {"memory": None}],
    "cpu_recurrent_step": [
        {"ids": _i(0, 5)}, {"sources": _i(0, 3, dtype=i32)}, {"values": None, "keys": None, "mask": None},
        {"keys": None}, {"memory": _r(1, 2, 8), "next_memory": _new(1, 2, 8)},
        {"weights": _STEP["weights"][1:]}, {"weights": [_r(1, 8, 8), *_STEP["weights"][1:]]}, {"logits": None},
        {"score_weight": None}, {"maxout": True}, {"readout_size": 5}, {"vocabulary": 12},
        {"memory": _r(1, 2, 8)}, {"sources": None, "values": _r(1, 4, 8), "keys": _r(1, 4, 7), "mask": None},
    ],
}  # fmt: skip


@pytest.mark.quick
@pytest.mark.parametrize(
    "name, changes",
    [pytest.param(n, c, id=f"{n}-{i}-{'-'.join(c)}") for n, cases in WRONG.items() for i, c in enumerate(cases)],
)
def test_values_that_do_not_fit(name, changes):
    _call(name)
    with pytest.raises(RuntimeError, match="wanted|must|have|is not one of"):
        _call(name, **changes)


def test_instruction_sets():
    """Only sets of this processor can be chosen: others would end the process at the first call."""
    before, usable = native.current_isa(), []
    for isa in (*native.ISAS, "no such set"):
        try:
            _OPS.cpu_set_isa(isa)
        except RuntimeError as error:
            assert isa in str(error)
        else:
            usable.append(isa)
    _OPS.cpu_set_isa(before)
    assert "no such set" not in usable and set(usable) >= set(native.supported_isas())


def test_nothing_to_do():
    """Sizes of zero are no error where the result is defined, and the results are right."""
    out = torch.full((9,), float("nan"))
    _call("cpu_column_sum", x=_r(0, 9), out=out)
    assert not out.any()
    _call("cpu_attention_forward", **{n: t[:0] for n, t in CALLS["cpu_attention_forward"].items() if n in (
        "query", "key", "value", "bias", "mask", "key_lengths", "out", "lse")})  # fmt: skip
    _call(
        "cpu_bias_activation_backward",
        **{n: _r(0, 9) for n in ("grad", "x", "gate", "grad_x", "grad_gate")}, grad_bias=out.fill_(float("nan")),
    )  # fmt: skip
    assert not out.any()
    _call("cpu_linear_long", x=_r(0, 9), y=_new(0, 40))
    _call("cpu_linear_long", weight=_r(0, 9), bias=_r(0), y=_new(3, 0))
    _call("cpu_embedding_gradient", grad_v=_r(0, 9), ids=_i(), padding_idx=-1, grad_table=_new(0, 9))
    hidden, last = _r(2, 9), torch.full((2, 9), float("nan"))
    _call(
        "cpu_recurrence_forward", hidden=hidden, last_hidden=last, steps=0,
        sequences=_i(0, 0, 0, 0, 0, 1).view(3, 2),
    )  # fmt: skip
    assert torch.equal(last, hidden)


def test_lengths_below_zero_count_as_zero():
    out, weights = torch.full((2, 3, 5), float("nan")), torch.full((2, 3, 4), float("nan"))
    _call("cpu_additive_attention_forward", key_lengths=_i(-5, 2), out=out, weights=weights)
    assert not out[0].any() and not weights[0].any() and out[1].isfinite().all()
