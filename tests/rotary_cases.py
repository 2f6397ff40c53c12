"""Compares the rotary embedding of every backend with plain PyTorch in float64, on inputs with any strides."""

import torch
from hypothesis import strategies as st
from numerics import GRADIENT, OUTPUT, assert_as_accurate

import transformer_fast as tf

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LAYOUTS = ["contiguous", "heads first", "slice of a projection", "every second column", "expanded"]


def strided(shape, dtype, layout: str, device="cpu") -> torch.Tensor:
    """A random (B, S, H, D) tensor with the memory layout `layout`."""
    batch, length, heads, width = shape
    if layout == "heads first":
        return torch.randn(batch, heads, length, width, device=device).to(dtype).transpose(1, 2)
    if layout == "slice of a projection":
        return torch.randn(batch, length, 3 * heads, width, device=device).to(dtype)[:, :, heads : 2 * heads]
    if layout == "every second column":
        return torch.randn(batch, length, heads, 2 * width, device=device).to(dtype)[..., ::2]
    if layout == "expanded":
        return torch.randn(batch, length, 1, width, device=device).to(dtype).expand(shape)
    return torch.randn(shape, device=device).to(dtype)


def tables(positions: int, half: int, device="cpu") -> tuple[torch.Tensor, torch.Tensor]:
    angles = torch.arange(positions, device=device)[:, None] * 10.0 ** -torch.linspace(0, 3, half, device=device)
    return angles.cos(), angles.sin()


def run(backend: str, x, cos, sin, positions, grad, interleaved: bool, inverse: bool, dtype=None):
    leaf = x.detach().to(dtype or x.dtype).requires_grad_()
    with tf.backend(backend):
        y = tf.rotary_embedding(leaf, cos, sin, positions, interleaved=interleaved, inverse=inverse)
        (found,) = torch.autograd.grad(y, leaf, grad.to(y.dtype))
    return y.detach(), found


def check(backend, shape, dtype, *, half=None, interleaved=False, inverse=False, layout="contiguous", placed=True,
          device="cpu"):  # fmt: skip
    batch, length, _, width = shape
    half = width // 2 if half is None else half
    x, grad = strided(shape, dtype, layout, device), strided(shape, dtype, layout, device)
    cos, sin = tables(length + 7, half, device)
    # Every second element of a longer tensor, so that its strides matter.
    positions = torch.randint(0, length + 7, (batch, 2 * length), device=device)[:, ::2] if placed else None
    options = (cos, sin, positions, grad, interleaved, inverse)
    ours, eager = (run(b, x, *options) for b in (backend, "eager"))
    truth = run("eager", x, *options, torch.float64)
    for name, a, t, e in zip(("y", "gradient"), ours, truth, eager):
        assert_as_accurate(a, t, e, OUTPUT if name == "y" else GRADIENT, name)


@st.composite
def calls(draw):
    width = draw(st.integers(1, 70) | st.sampled_from([64, 128, 256]))
    return (
        (draw(st.integers(1, 3)), draw(st.integers(1, 9)), draw(st.integers(1, 5)), width),
        draw(st.sampled_from(DTYPES)),
        {
            "half": draw(st.sampled_from([width // 2, width // 4, 0, min(1, width // 2)])),
            "interleaved": draw(st.booleans()),
            "inverse": draw(st.booleans()),
            "layout": draw(st.sampled_from(LAYOUTS)),
            "placed": draw(st.booleans()),
        },
    )
