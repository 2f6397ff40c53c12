"""The launches of the Triton backend: grids for any number of sequences, heads and columns."""

import pytest
import torch
import triton_launches

import transformer_fast as tf
from transformer_fast import backends

pytestmark = pytest.mark.quick


def _shared(*shape, dtype=torch.float16):
    """A tensor of any size in the memory of one row."""
    return torch.zeros(shape[-1], dtype=dtype).expand(shape)


@pytest.mark.parametrize("batch, heads, length", [(4096, 16, 64), (70_000, 1, 17), (3, 40_000, 20)])
def test_attention_of_any_number_of_heads(batch, heads, length):
    """The second and third axes of a grid are limited to 65535. The recorder refuses what a driver refuses."""
    q = _shared(batch, heads, length, 2).requires_grad_()
    with triton_launches.recorded() as launches, tf.backend("triton"):
        out = tf.scaled_dot_product_attention(q, q.detach(), q.detach(), is_causal=True)
        torch.autograd.grad(out, q, torch.zeros(()).half().expand(out.shape))
    assert {launch.kernel for launch in launches} >= {"_attention_forward_kernel", "_attention_delta_kernel"}
    delta = next(launch for launch in launches if launch.kernel == "_attention_delta_kernel")
    assert delta.grid == (batch * heads * -(-length // delta.options["BLOCK_M"]),)


def test_decoding_of_many_sequences_in_parts(monkeypatch):
    from transformer_fast.backends import triton_attention

    monkeypatch.setattr(triton_attention, "splits_of", lambda *_: 2)
    query, cache = _shared(70_000, 1, 1, 16), _shared(70_000, 1, 200, 16)
    with triton_launches.recorded() as launches, tf.backend("triton"):
        tf.scaled_dot_product_attention(query, cache, cache)
    assert [launch.grid for launch in launches] == [(70_000, 2), (70_000,)]


@pytest.mark.parametrize("op", [lambda x: tf.dropout(x, 0.1), lambda x: tf.bias_activation(x, None)])
def test_a_single_row_of_many_columns(op):
    """2^25 elements in one vector, forward and backward."""
    x = _shared(2**25, 1).transpose(0, 1)[0].requires_grad_()
    with triton_launches.recorded() as launches, tf.backend("triton"):
        y = op(x)
        torch.autograd.grad(y, x, torch.zeros(()).half().expand(y.shape))
    assert len(launches) == 2 and all(len(launch.grid) == 1 for launch in launches)


def test_wider_norms_than_a_grid_has_columns_are_refused():
    call = backends.Call("norm", "cuda", torch.float16, 2**26)
    assert any("width" in reason for reason in backends.get("triton").why_not(call))
