"""Every shipped configuration of the cross entropy kernels, compiled for sm_80, 90, 100 and 120; needs no GPU."""

import functools

import pytest
import torch
import triton_aot

CLASSES = {"two": 2, "narrow": 300, "bert": 30522, "t5": 32128, "gpt2": 50257}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
FEATURES = {"plain": (False, 0.0, 0.0), "smoothed, weighted, z-loss": (True, 0.1, 1e-4)}
KERNELS = {"_cross_entropy_backward_kernel", "_cross_entropy_forward_kernel"}


def _launch(classes, dtype, weighted, label_smoothing, z_loss):
    from transformer_fast.kernels.cross_entropy import cross_entropy_backward, cross_entropy_forward

    rows = 4096
    logits = torch.empty(rows, classes, dtype=dtype, device="meta")
    target = torch.empty(rows, dtype=torch.int64, device="meta")
    row, weight = (torch.empty(n, dtype=torch.float32, device="meta") for n in (rows, classes))
    options = (weight if weighted else None, -100, label_smoothing, z_loss)
    cross_entropy_forward(logits, target, *options, row, row, row)
    cross_entropy_backward(row, logits, target, *options, row, row, logits)


def _chosen(arch: int, scope: str, dtype: str, name: str, classes: str) -> bool:
    """In a test run bfloat16 with every feature, on sm_90 at every size; in the record on every GPU, and other
    dtypes."""
    if scope == "test":
        return dtype == "bfloat16" and name != "plain" and (arch == 90 or classes == "t5")
    return scope == "every" or (name != "plain" and (dtype == "bfloat16" or classes in ("two", "t5")))


def cases(arch: int, scope: str):
    return {
        f"{name}, {dtype_name}, {class_name}": functools.partial(_launch, classes, dtype, *features)
        for class_name, classes in CLASSES.items()
        for dtype_name, dtype in DTYPES.items()
        for name, features in FEATURES.items()
        if _chosen(arch, scope, dtype_name, name, class_name)
    }


def check(report: dict) -> None:
    triton_aot.assert_runs_well(report, registers=128)


@pytest.mark.parametrize("arch", triton_aot.ARCHS)
def test_compiles_for(arch):
    for name, reports in triton_aot.assert_compiles(__file__, arch, check, KERNELS).items():
        for report in reports:
            if "t5" in name:  # rows with a multiple of 16 classes are read and written in full vectors
                assert report["loads_128"], report
                assert report["stores_128"] or "forward" in report["kernel"], report
