"""Every shipped configuration of the additive attention kernels, compiled for sm_80, 90, 100 and 120; needs no GPU."""

import functools

import pytest
import torch
import triton_aot

WIDTHS = {"1000": (1000, 2000), "512": (512, 512), "narrow": (48, 20)}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
KERNELS = {
    "_additive_hidden_gradient_kernel",
    "_additive_mix_kernel",
    "_additive_score_gradient_kernel",
    "_additive_weights_kernel",
}


def _launch(widths, dtype, everything):
    from transformer_fast.kernels.additive_attention import additive_attention_backward, additive_attention_forward

    batch, queries, keys, (width, value_width) = 32, 30, 50, widths

    def empty(*shape, dtype=dtype):
        return torch.empty(shape, dtype=dtype, device="meta")

    wide = functools.partial(empty, dtype=torch.float32)
    query, key, value = empty(batch, queries, width), empty(batch, keys, width), empty(batch, keys, value_width)
    out, weights, v = empty(batch, queries, value_width), wide(batch, queries, keys), wide(width)
    bias = v if everything else None
    mask = empty(batch, queries, keys, dtype=torch.uint8) if everything else None
    lengths = empty(batch, dtype=torch.int64) if everything else None
    additive_attention_forward(query, key, value, v, bias, mask, lengths, out, weights)
    additive_attention_backward(
        query, key, value, v, bias, lengths, out, weights if everything else None, weights, wide(*query.shape), key,
        value, wide(batch, width),
    )  # fmt: skip


def _chosen(arch: int, scope: str, name: str, dtype: str, full: bool) -> bool:
    """In a test run every feature in float32 and bfloat16 at one width; in the record at every width."""
    if scope == "test":
        return full and name == "512" and (dtype == "bfloat16" or (dtype == "float32" and arch != 100))
    return scope == "every" or (full and (dtype != "float16" or name == "512"))


def cases(arch: int, scope: str):
    return {
        f"{name}, {dtype_name}{', every feature' * full}": functools.partial(_launch, widths, dtype, full)
        for name, widths in WIDTHS.items()
        for dtype_name, dtype in DTYPES.items()
        for full in (False, True)
        if _chosen(arch, scope, name, dtype_name, full)
    }


def check(report: dict) -> None:
    triton_aot.assert_runs_well(report)


@pytest.mark.parametrize("arch", triton_aot.ARCHS)
def test_compiles_for(arch):
    triton_aot.assert_compiles(__file__, arch, check, KERNELS)
