"""Every shipped configuration of the attention kernels, compiled for sm_80, 90, 100 and 120; needs no GPU."""

import functools
import itertools

import pytest
import torch
import triton_aot

CAPABILITY = {80: (8, 0), 90: (9, 0), 100: (10, 0), 120: (12, 0)}
MULTIPROCESSORS = {80: 108, 90: 132, 100: 148, 120: 170}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
HEAD_DIMS = (64, 128, 256, 80, 160)
FEATURES = {
    "plain": {},
    "causal": {"window_right": 0},
    "short": {"queries": 64, "keys": 64},
    "few_keys": {"queries": 128, "keys": 128},
    "window": {"window_left": 256, "window_right": 256},
    "varlen": {"varlen": True},
    "gqa": {"groups": 4, "window_right": 0},
    "bias": {"bias": "bhmn"},
    "bias_broadcast": {"bias": "hmn"},
    "mask": {"mask": True, "lengths": True},
    "relative": {"relative": True},
    "softcap": {"softcap": 30.0, "window_right": 0},
    "dropout": {"dropout_p": 0.1},
    "dropout_causal_varlen": {"dropout_p": 0.1, "window_right": 0, "varlen": True},
    "decode": {"queries": 1, "lengths": True, "groups": 4},
    "decode_relative": {"queries": 1, "relative": True},
    "decode_append": {"queries": 1, "lengths": True, "groups": 4, "window_right": 0},
    # Combinations that models use: T5 unpadded and decoding, BERT and GPT in training, Mistral, Gemma 2, a float mask.
    "gqa_varlen": {"groups": 4, "window_right": 0, "varlen": True},
    "lengths_dropout": {"lengths": True, "dropout_p": 0.1},
    "mask_dropout": {"mask": True, "dropout_p": 0.1},
    "mask_lengths_dropout": {"mask": True, "lengths": True, "dropout_p": 0.1},
    "relative_dropout_varlen": {"relative": True, "dropout_p": 0.1, "varlen": True},
    "relative_causal_dropout": {"relative": True, "dropout_p": 0.1, "window_right": 0},
    "window_gqa": {"window_left": 4096, "window_right": 0, "groups": 4},
    "softcap_window_gqa": {"softcap": 50.0, "window_left": 4096, "window_right": 0, "groups": 2},
    "float_mask": {"bias": "bmn", "needs_bias_gradient": False, "dropout_p": 0.1},
    "decode_append_relative": {"queries": 1, "lengths": True, "relative": True, "window_right": 0},
    "decode_mask": {"queries": 1, "mask": True},
}
# For the record: in each kind of kernels/attention_configurations.py the calls that need most registers and shared
# memory, and the calls that models make most. One head dim per width of the table, and one that fills its tile only
# partly. In float32 all kinds share a row, so the heaviest are enough.
RECORD = {
    "bfloat16": {
        256: ("few_keys", "gqa_varlen", "bias", "bias_broadcast", "softcap_window_gqa", "relative_causal_dropout",
              "decode", "decode_append_relative"),
        160: ("gqa_varlen", "relative_causal_dropout"),
        128: ("causal", "gqa_varlen", "bias", "bias_broadcast", "mask_lengths_dropout", "softcap_window_gqa",
              "relative_causal_dropout", "decode", "decode_append_relative"),
        80: ("gqa_varlen", "bias_broadcast", "relative_causal_dropout"),
        64: ("short", "causal", "gqa_varlen", "bias", "bias_broadcast", "mask_lengths_dropout", "relative",
             "relative_dropout_varlen", "relative_causal_dropout", "decode", "decode_append",
             "decode_append_relative"),
    },
    "float32": {
        256: ("gqa_varlen", "bias_broadcast", "softcap_window_gqa", "relative_causal_dropout", "decode"),
        128: ("bias_broadcast", "relative_causal_dropout", "decode"),
        64: ("bias", "bias_broadcast", "relative", "relative_causal_dropout", "decode", "decode_append_relative"),
    },
    "float16": {64: ("bias_broadcast", "decode_append")},
}  # fmt: skip


def _spec(
    dtype, head_dim, queries=2048, keys=2048, groups=1, varlen=False, bias="", mask=False, lengths=False,
    relative=False, **more,
):  # fmt: skip
    """An AttentionSpec of meta tensors: batch 4, 16 heads, with the memory layout (B, S, H, D) of projections."""
    from transformer_fast.backends.specs import AttentionSpec

    b, h = 4, 16
    sizes = {"b": b, "h": h, "m": queries, "n": keys}

    def tensor(*shape, dtype=dtype):
        return torch.empty(shape, dtype=dtype, device="meta")

    rows = [(queries, h), (keys, h // groups), (keys, h // groups)]
    if varlen:
        data = [tensor(b * s, n, head_dim) for s, n in rows]
    else:
        data = [tensor(b, s, n, head_dim).transpose(1, 2) for s, n in rows]
    cu = tensor(b + 1, dtype=torch.int32) if varlen else None
    fields = {
        "bias": tensor(*(size if axis in bias else 1 for axis, size in sizes.items())) if bias else None,
        "mask": tensor(b, 1, queries, keys, dtype=torch.bool) if mask else None,
        "key_lengths": tensor(b, dtype=torch.int64) if lengths else None,
        "relative_bias": tensor(32, h, dtype=torch.float32) if relative else None,
        "rng": tensor(2, dtype=torch.int64) if "dropout_p" in more else None,
    }
    numbers = {"window_left": -1, "window_right": -1, "softcap": 0.0, "dropout_p": 0.0, "bottom_right": 0} | more
    return AttentionSpec(
        *data, cu_seqlens_q=cu, cu_seqlens_k=cu, max_seqlen_q=queries, max_seqlen_k=keys, relative_max_distance=128,
        relative_bidirectional=True, scale=head_dim**-0.5, **fields, **numbers,
    )  # fmt: skip


def _launch(arch, dtype, head_dim, feature):
    """The launches of a call and its backward pass."""
    from transformer_fast.backends import triton_attention as backend

    features = dict(FEATURES[feature])
    bias_gradient = features.pop("needs_bias_gradient", True)

    backend._capability = lambda device: CAPABILITY[arch]
    backend._multiprocessors = lambda device: MULTIPROCESSORS[arch]
    spec = _spec(dtype, head_dim, **features)
    q, k, v = spec[:3]
    lse = torch.empty(q.shape[:3] if q.dim() == 4 else q.shape[1::-1], device="meta")
    if feature.startswith("decode_append"):
        assert backend.attention_append(spec, k[:, :, :1], v[:, :, :1], q, lse)
        return
    backend.attention_forward(spec, q, lse)
    if not feature.startswith("decode"):
        dbias, dtable = (None if t is None else t.float() for t in (spec.bias, spec.relative_bias))
        dbias = dbias if bias_gradient else None
        backend.attention_backward(spec, q, None, q, lse, q, k, v, dbias, dtable)


# For a test run: the most important ones on sm_90, and elsewhere each architecture's heaviest and some of the features.
CORE = {
    80: {("float32", 64, "plain"), ("bfloat16", 64, "bias_broadcast")},
    90: {("bfloat16", 64, "causal"), ("bfloat16", 128, "causal"), ("bfloat16", 64, "relative"),
         ("bfloat16", 256, "plain"), ("bfloat16", 64, "decode_append")},
    100: {("bfloat16", 128, "causal"), ("bfloat16", 64, "dropout")},
    120: {("bfloat16", 128, "causal"), ("bfloat16", 64, "mask"), ("bfloat16", 64, "decode")},
}  # fmt: skip


def _chosen(arch: int, scope: str):
    if scope == "test":
        return CORE[arch]
    if scope == "record":
        return [(dtype, d, feature) for dtype, dims in RECORD.items() for d in dims for feature in dims[d]]
    return itertools.product(DTYPES, HEAD_DIMS, FEATURES)


def cases(arch: int, scope: str):
    return {
        f"{feature}, {dtype}, D {head_dim}": functools.partial(_launch, arch, DTYPES[dtype], head_dim, feature)
        for dtype, head_dim, feature in _chosen(arch, scope)
    }


PRODUCTS = ("_forward_kernel", "_key_kernel", "_query_kernel", "_bias_kernel")


def check(report: dict) -> None:
    triton_aot.assert_runs_well(report)
    if report["dtype"] != "float32" and report["kernel"].endswith(PRODUCTS):
        # Otherwise the compiler has replaced the kernel by a trap, as it does for sums that exceed the tensor memory.
        assert report["wgmma"] or report["mma"], report
    if report["arch"] == 90 and report["kernel"].endswith(PRODUCTS):
        # 16-bit products use Hopper's wgmma. float32 products are exact and use neither instruction.
        assert not report["mma"] and bool(report["wgmma"]) == (report["dtype"] != "float32"), report


@pytest.mark.parametrize("arch", triton_aot.ARCHS)
def test_compiles_for(arch):
    found = triton_aot.assert_compiles(__file__, arch, check)
    wanted = {case[2] for case in CORE[arch]}
    assert {name.split(",")[0] for name in found} == wanted
