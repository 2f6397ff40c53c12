"""Every shipped configuration of the embedding kernels, compiled for sm_80, 90, 100 and 120; needs no GPU."""

import functools

import pytest
import torch
import triton_aot

WIDTHS = {"narrow": 64, "bert": 768, "large": 1024, "widest": 4096}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
KERNELS = {
    "_column_sum_kernel",
    "_embedding_backward_kernel",
    "_embedding_forward_kernel",
    "_embedding_gradient_kernel",
}


def _launch(width, dtype, dropout):
    from transformer_fast.kernels import embedding

    rows = 4096

    def tensor(*shape, dtype=dtype):
        return torch.empty(shape, dtype=dtype, device="meta")

    ids, x, v = tensor(rows, dtype=torch.int64), tensor(rows, width), tensor(rows, width, dtype=torch.float32)
    word, position, segment = (tensor(n, width) for n in (30522, 512, 2))
    tables = (ids, word, ids, segment, ids, position)
    row, weight = tensor(rows, dtype=torch.float32), tensor(width, dtype=torch.float32)
    rng = tensor(2, dtype=torch.int64) if dropout else None
    embedding.embedding_layer_norm_forward(*tables, weight, weight, rng, 1e-12, 6554, 1.1, x, row, row)
    embedding.embedding_layer_norm_backward(x, *tables, weight, row, row, rng, 6554, 1.1, v, weight, weight, 132)
    for table in (word, segment):
        embedding.embedding_gradient(v, ids, -1, table)


def _chosen(arch: int, scope: str, dtype: str, width: str, dropout: bool) -> bool:
    """In a test run bfloat16 with dropout, on sm_90 at every width; in the record every width, float16 at one."""
    if scope == "test":
        widths = {"bfloat16": WIDTHS if arch == 90 else ("bert", "widest"), "float32": ("widest",), "float16": ()}
        return dropout and width in widths[dtype]
    return scope == "every" or (dropout and (dtype != "float16" or width == "bert"))


def cases(arch: int, scope: str):
    return {
        f"{dtype_name}, {width_name}{', dropout' * dropout}": functools.partial(_launch, width, dtype, dropout)
        for width_name, width in WIDTHS.items()
        for dtype_name, dtype in DTYPES.items()
        for dropout in (False, True)
        if _chosen(arch, scope, dtype_name, width_name, dropout)
    }


def check(report: dict) -> None:
    triton_aot.assert_runs_well(report)


@pytest.mark.parametrize("arch", triton_aot.ARCHS)
def test_compiles_for(arch):
    for reports in triton_aot.assert_compiles(__file__, arch, check, KERNELS).values():
        for report in reports:
            if report["kernel"] in ("_embedding_forward_kernel", "_embedding_backward_kernel"):
                assert report["loads_128"] and report["stores_128"], report
