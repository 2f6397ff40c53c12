"""The activation and dropout kernels, compiled for sm_80, 90, 100 and 120; needs no GPU."""

import functools

import pytest
import torch
import triton_aot

from transformer_fast.ops.activation import ACTIVATIONS

WIDTHS = {"bert": 3072, "odd_blocks": 400, "narrow": 64}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def _launch(width, dtype, activation, gated, bias):
    from transformer_fast.kernels.activation import bias_activation_backward, bias_activation_forward

    x = torch.empty(4096, width, dtype=dtype, device="meta")
    gate = x if gated else None
    vector = torch.empty(width, dtype=dtype, device="meta") if bias else None
    grad_bias = torch.empty(width, dtype=torch.float32, device="meta") if bias else None
    bias_activation_forward(x, vector, gate, activation, x)
    bias_activation_backward(x, x, vector, gate, activation, x, grad_bias, gate, 132)


def _launch_dropout(dtype):
    from transformer_fast.kernels.dropout import dropout_forward

    x = torch.empty(4096, 768, dtype=dtype, device="meta")
    dropout_forward(x, torch.empty(2, dtype=torch.int64, device="meta"), 6554, 1.1, x)


def _chosen(arch: int, scope: str, activation: str, dtype: str, width: str, gated: bool, bias: bool) -> bool:
    """In a test run: on sm_90 every activation in bfloat16, gated; elsewhere the two most expensive ones. In the
    record: every activation in that way, the most expensive one at every width, BERT's everywhere, float16 at one
    width."""
    bert = (activation, width, gated, bias) == ("gelu", "bert", False, True)
    if scope == "test":
        full = gated and bias and (dtype, width) == ("bfloat16", "bert")
        return (full and (arch == 90 or activation.startswith("gelu"))) or (bert and dtype == "float32")
    full = gated and bias and (activation == "gelu" if dtype != "bfloat16" or width != "bert" else True)
    return scope == "every" or bert or (full and (dtype != "float16" or width == "bert"))


def cases(arch: int, scope: str):
    chosen = {f"dropout, {n}": functools.partial(_launch_dropout, d) for n, d in DTYPES.items()}
    for activation in ACTIVATIONS:
        for dtype_name, dtype in DTYPES.items():
            for width_name, width in WIDTHS.items():
                for gated in (False, True):
                    for bias in (False, True):
                        if _chosen(arch, scope, activation, dtype_name, width_name, gated, bias):
                            name = f"{activation}, {dtype_name}, {width_name}{', gated' * gated}{', bias' * bias}"
                            chosen[name] = functools.partial(_launch, width, dtype, activation, gated, bias)
    return chosen


def check(report: dict) -> None:
    triton_aot.assert_runs_well(report, registers=255 if report["kernel"] == "_column_sum_kernel" else 128)
    if report["kernel"] != "_column_sum_kernel":
        assert report["loads_128"] and report["stores_128"] and not report["stores_narrow"], report


@pytest.mark.parametrize("arch", triton_aot.ARCHS)
def test_compiles_for(arch):
    kernels = {"_bias_activation_forward_kernel", "_bias_activation_backward_kernel", "_column_sum_kernel"}
    triton_aot.assert_compiles(__file__, arch, check, kernels | {"_dropout_kernel"})
