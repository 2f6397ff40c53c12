"""Small calls on the CPU go straight to the kernel once a call with the same signature has passed the checks."""

import pytest
import torch

from transformer_fast import backends, scaled_dot_product_attention, varlen_attention
from transformer_fast.backends import native
from transformer_fast.ops import _attention_direct, attention

pytestmark = [pytest.mark.quick, pytest.mark.skipif(bool(native.load()), reason="needs the native library")]


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch):
    monkeypatch.setattr(_attention_direct, "_known", {})


def padded(query, key, value, mask, lse):
    return scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=mask is None, return_lse=lse)


CASES = {
    "one tensor": lambda q, k, v, mask: padded(q, q, q, None, False),
    "causal": lambda q, k, v, mask: padded(q, k, v, None, True),
    "a mask": lambda q, k, v, mask: padded(q, k, v, mask, False),
    "shared key heads": lambda q, k, v, mask: scaled_dot_product_attention(q, k[:, :2], v[:, :2], enable_gqa=True),
    "other strides": lambda q, k, v, mask: padded(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), None, False),
    "unpadded": lambda q, k, v, mask: varlen_attention(
        *(t.flatten(0, 1).transpose(0, 1) for t in (q[0, None], k[0, None], v[0, None])),
        torch.tensor([0, 2, 6], dtype=torch.int32),
    ),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_second_call_takes_the_short_way(case, dtype, monkeypatch):
    torch.manual_seed(0)
    tensors = [t.to(dtype) for t in torch.randn(3, 2, 4, 6, 16).unbind()]
    mask = torch.rand(2, 1, 6, 6) > 0.3
    first = CASES[case](*tensors, mask)

    def attend(*args):
        raise AssertionError("the checks ran again")

    monkeypatch.setattr(attention, "_attend", attend)
    second = CASES[case](*tensors, mask)
    for a, b in zip(*((t if isinstance(t, tuple) else (t,)) for t in (first, second))):
        assert torch.equal(a, b)
        assert a.stride() == b.stride()


def test_what_was_not_checked_is_not_known():
    q = torch.randn(2, 4, 6, 16)
    scaled_dot_product_attention(q, q, q)
    with pytest.raises(ValueError, match="key"):
        scaled_dot_product_attention(q, q[:, :3], q[:, :3])
    with pytest.raises(ValueError, match="attn_mask"):
        scaled_dot_product_attention(q, q, q, attn_mask=torch.ones(2, 1, 6, 5, dtype=torch.bool))
    known = dict(_attention_direct._known)
    with backends.backend("eager"):
        scaled_dot_product_attention(q, q, q)
    assert _attention_direct._known == known, "another backend was asked for"
