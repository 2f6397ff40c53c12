"""The rotary embedding kernel, compiled for sm_80, 90, 100 and 120; needs no GPU."""

import functools

import pytest
import torch
import triton_aot

SHAPES = {"llama": (128, 64), "neox": (64, 16), "odd": (80, 20)}  # width of a head, pairs that are rotated
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def _launch(width, half, dtype, interleaved):
    from transformer_fast.kernels.rotary import rotary

    x = torch.empty(4, 1024, 12, width, dtype=dtype, device="meta")
    table = torch.empty(1024, half, device="meta")
    positions = torch.empty(4, 1024, dtype=torch.int64, device="meta")
    rotary(x, table, table, positions, interleaved, False, x)


def _launch_append(width, half, dtype, interleaved, batch, length, key_heads=8, plain=False):
    """plain: without positions and norms."""
    from transformer_fast.kernels.rotary import rotary_append

    def data(*shape, dtype=dtype):
        return torch.empty(*shape, dtype=dtype, device="meta")

    query, new = data(batch, length, 4 * key_heads, width), data(batch, length, key_heads, width)
    cache, table = data(batch, key_heads, 1024, width), data(1024, half, dtype=torch.float32)
    weight, positions = (None, None) if plain else (data(width), data(batch, length, dtype=torch.int64))
    rotary_append(
        query, new, new, cache, cache, data(batch, dtype=torch.int32), table, table, positions, weight, weight, 1e-6,
        interleaved, query,
    )  # fmt: skip


def cases(arch: int, scope: str):
    found = {}
    for shape_name, (width, half) in SHAPES.items():
        for dtype_name, dtype in DTYPES.items():
            for interleaved in (False, True):
                if scope != "test" or (dtype_name == "bfloat16" and shape_name == "llama"):
                    name = f"{shape_name}, {dtype_name}{', interleaved' * interleaved}"
                    found[name] = functools.partial(_launch, width, half, dtype, interleaved)
                    for tokens in ((1, 1), (8, 512)):
                        append = functools.partial(_launch_append, width, half, dtype, interleaved, *tokens)
                        found[f"{name}, append {tokens}"] = append
    for width, half in ((128, 64), (16, 8), (14, 5), (1, 0)):
        for dtype_name in ("float32", "bfloat16") if scope != "test" else ("bfloat16",):
            for interleaved in (False, True) if half else (False,):
                name = (
                    f"{width} wide, {half} pairs, {dtype_name}{', interleaved' * interleaved}, append without positions"
                )
                found[name] = functools.partial(
                    _launch_append, width, half, DTYPES[dtype_name], interleaved, 2, 4, 2, True
                )
    return found


def check(report: dict) -> None:
    triton_aot.assert_runs_well(report, registers=192 if report["warps"] == 1 else 128)


@pytest.mark.parametrize("arch", triton_aot.ARCHS)
def test_compiles_for(arch):
    triton_aot.assert_compiles(__file__, arch, check, {"_rotary_kernel"})
