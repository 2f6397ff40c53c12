"""Every shipped configuration of the norm kernels, compiled for sm_80, 90, 100 and 120; needs no GPU."""

import functools

import pytest
import torch
import triton_aot

# Classes of widths: several rows per program, one row per program, the widest row in registers, and wider rows.
WIDTHS = {"narrow": 64, "bert": 768, "exact": 1024, "wide": 4096, "backward_limit": 8192, "forward_limit": 16384}
WIDTHS |= {"looped": 20480}
EXTREMES = {("float32", "bert"), ("bfloat16", "bert"), ("bfloat16", "backward_limit"), ("float32", "looped")}
KERNELS = {
    "_column_sum_kernel",
    "_layer_norm_backward_kernel",
    "_layer_norm_backward_means_kernel",
    "_layer_norm_forward_kernel",
    "_layer_norm_forward_wide_kernel",
}
MULTIPROCESSORS = {80: 108, 90: 132, 100: 148, 120: 170}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def _launch(arch, width, dtype, *, add, dropout, rms, fp32_weight=False):
    from transformer_fast.kernels.norm import layer_norm_backward, layer_norm_forward

    rows = 4096

    def tensor(*shape, dtype=dtype):
        return torch.empty(shape, dtype=dtype, device="meta")

    x = tensor(rows, width)
    weight = tensor(width, dtype=torch.float32 if fp32_weight else dtype)
    bias = None if rms else weight
    rng = tensor(2, dtype=torch.int64) if dropout else None
    rstd = tensor(rows, dtype=torch.float32)
    mean = None if rms else rstd
    total = x if add else None
    layer_norm_forward(x, total, weight, bias, rng, 1e-5, rms, 6554, 1.1, x, total, mean, rstd)
    gradient = tensor(width, dtype=torch.float32)
    layer_norm_backward(
        x, total, x, weight, rng, 6554, 1.1, mean, rstd, x, x if dropout else None, gradient,
        None if rms else gradient, MULTIPROCESSORS[arch],
    )  # fmt: skip


FEATURES = {
    "layer_norm": {"add": False, "dropout": False, "rms": False},
    "add_layer_norm + dropout": {"add": True, "dropout": True, "rms": False},
    "add_rms_norm": {"add": True, "dropout": False, "rms": True},
    "layer_norm, float32 weight": {"add": False, "dropout": False, "rms": False, "fp32_weight": True},
}
HEAVIEST = "add_layer_norm + dropout"


def _chosen(arch: int, scope: str, width: str, dtype: str, name: str) -> bool:
    """In a test run: the heaviest features, on sm_90 at every width and elsewhere at the extreme widths, and some light
    features. In the record: the heaviest at every width, float16 at the widest, every feature at BERT's width."""
    if scope == "test":
        if name == HEAVIEST:
            return dtype != "float16" and (arch == 90 or (dtype, width) in EXTREMES)
        return (arch, dtype, name) == (90, "bfloat16", "layer_norm") and width in ("narrow", "exact")
    if scope == "record":
        if dtype == "float16":
            return name == HEAVIEST and width in ("backward_limit", "looped")
        return name == HEAVIEST or (width == "bert" and dtype == "bfloat16")
    return True


def cases(arch: int, scope: str):
    return {
        f"{name}, {dtype_name}, {width_name}": functools.partial(_launch, arch, width, dtype, **features)
        for width_name, width in WIDTHS.items()
        for dtype_name, dtype in DTYPES.items()
        for name, features in FEATURES.items()
        if _chosen(arch, scope, width_name, dtype_name, name)
    }


def check(report: dict) -> None:
    triton_aot.assert_runs_well(report)
    if report["kernel"] in ("_column_sum_kernel", "_layer_norm_backward_means_kernel"):
        return
    # Rows are aligned, so accesses are 16-byte vectors, except for a weight with fewer elements than threads.
    assert report["loads_128"] and report["stores_128"] and not report["stores_narrow"], report


@pytest.mark.parametrize("arch", triton_aot.ARCHS)
def test_compiles_for(arch):
    triton_aot.assert_compiles(__file__, arch, check, KERNELS)
