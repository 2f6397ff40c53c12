"""The backward pass of attention on wgmma (sm_90a) against float64: on a GPU of compute capability 9.0 if there is one,
else under the emulator. Outputs and log-sum-exp come from plain PyTorch in float64, rounded; no forward kernel runs."""

import contextlib
import math

import cuda_emulator
import pytest
import torch
from numerics import GRADIENT, assert_as_accurate

from transformer_fast.backends import cuda_attention, eager
from transformer_fast.backends.specs import AttentionSpec

BF16, F16 = torch.bfloat16, torch.float16


@pytest.fixture
def machine(device):
    """The GPU or the emulator. Call it to set when asynchronous work completes, and the order of warps."""
    if device == "cuda":
        if torch.cuda.get_device_capability() != (9, 0):
            pytest.skip("wgmma runs only on GPUs of compute capability 9.0")
        return contextlib.nullcontext
    return cuda_emulator.active


def _spec(query, key, value, **kw):
    fields = dict.fromkeys(AttentionSpec._fields)
    fields |= {
        "query": query, "key": key, "value": value, "max_seqlen_q": query.shape[-2], "max_seqlen_k": key.shape[-2],
        "relative_max_distance": 0, "relative_bidirectional": False, "scale": 1 / math.sqrt(query.shape[-1]),
        "bottom_right": 0, "window_left": -1, "window_right": -1, "softcap": 0.0, "dropout_p": 0.0,
    }  # fmt: skip
    return AttentionSpec(**fields | kw)


def _padded(device, dtype, d=64, b=1, h=1, hk=None, sq=150, sk=200, **kw):
    def heads(n, s):
        return torch.randn(b, s, n, d, device=device).to(dtype).transpose(1, 2)

    hk = hk or h
    return _spec(heads(h, sq), heads(hk, sk), heads(hk, sk), **kw)


def _unpadded(device, dtype, lengths_q, lengths_k, d=64, h=1, hk=None, **kw):
    def heads(n, lengths):
        return torch.randn(sum(lengths), n, d, device=device).to(dtype)

    def offsets(lengths):
        return torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32)

    hk = hk or h
    kw |= {"cu_seqlens_q": offsets(lengths_q), "cu_seqlens_k": offsets(lengths_k)}
    kw |= {"max_seqlen_q": max(lengths_q), "max_seqlen_k": max(lengths_k)}
    return _spec(heads(h, lengths_q), heads(hk, lengths_k), heads(hk, lengths_k), **kw)


def _eager(spec, grads, dtype):
    """out, lse and the gradients in plain PyTorch."""
    leaves = [t.to(dtype).detach().requires_grad_() for t in spec[:3]]
    out, lse = eager.attention(spec._replace(query=leaves[0], key=leaves[1], value=leaves[2]))
    wanted = [(o, g.to(o.dtype)) for o, g in zip((out, lse), grads) if g is not None]
    found = torch.autograd.grad([o for o, _ in wanted], leaves, [g for _, g in wanted])
    return out.detach(), lse.detach(), found


def _backward(spec, out, lse, grads, deterministic=False):
    results = [torch.full_like(t, math.nan) for t in spec[:3]]
    torch.use_deterministic_algorithms(deterministic)  # only here: plain PyTorch's products would raise
    try:
        cuda_attention.attention_backward(spec, grads[0], grads[1], out, lse, *results, None, None)
    finally:
        torch.use_deterministic_algorithms(False)
    return results


def _check(spec, grad_lse=True, deterministic=False):
    """Compare with float64. Returns a function that computes the gradients once more."""
    lse_shape = spec.query.shape[:-1] if spec.cu_seqlens_q is None else spec.query.shape[1::-1]
    grad_out = torch.randn_like(spec.query)
    grads = (grad_out, torch.randn(lse_shape, device=grad_out.device) if grad_lse else None)
    out, lse, truth = _eager(spec, grads, torch.float64)
    if grad_lse:  # rows without keys get no gradient
        grads = (grad_out, grads[1].masked_fill(lse == -math.inf, 0.0))
        truth = _eager(spec, grads, torch.float64)[2]
    plain = _eager(spec, grads, spec.query.dtype)[2]
    out, lse = out.to(spec.query.dtype), lse.float()
    before = _products(spec)
    ours = _backward(spec, out, lse, grads, deterministic)
    assert _products(spec) != before or spec.query.is_cuda, "another kernel took the call"
    for name, *three in zip(("grad_query", "grad_key", "grad_value"), ours, truth, plain):
        assert_as_accurate(*three, GRADIENT, name)
    return lambda: _backward(spec, out, lse, grads, deterministic)


def _products(spec):
    return 0 if spec.query.is_cuda else cuda_emulator.library().counters()["wgmma"]


CAUSAL = {"window_right": 0}
FROM_THE_END = {"window_right": 0, "bottom_right": 1}
PADDED = {
    "full": {"sq": 256, "sk": 256},
    "full_128": {"d": 128, "sq": 160, "sk": 256},
    "ragged": {"sq": 150, "sk": 200, "h": 2, "b": 2},
    "ragged_128": {"d": 128, "sq": 170, "sk": 130, "b": 2},
    "causal": dict(sq=300, sk=300, **CAUSAL),
    "causal_128": dict(d=128, sq=200, sk=200, **CAUSAL),
    "causal_from_the_end": dict(sq=140, sk=300, **FROM_THE_END),
    "queries_without_keys": dict(d=128, sq=260, sk=150, **FROM_THE_END),
    "keys_without_queries": dict(sq=100, sk=300, **CAUSAL),
    "window": {"sq": 300, "sk": 300, "window_left": 70, "window_right": 20},
    "window_128": {"d": 128, "sq": 280, "sk": 280, "window_left": 40, "window_right": 0},
    "grouped": dict(h=4, hk=2, sq=140, sk=140, **CAUSAL),
    "grouped_128": {"d": 128, "h": 3, "hk": 1, "sq": 100, "sk": 140},
    "scale": {"sq": 130, "sk": 130, "scale": 0.3},
}  # fmt: skip


@pytest.mark.parametrize("case", list(PADDED))
def test_padded(case, device, machine):
    with machine():
        _check(_padded(device, (BF16, F16)[len(case) % 2], **PADDED[case]), grad_lse=len(case) % 3 > 0)


@pytest.mark.parametrize("offset", [1.0, 8.0])
@pytest.mark.parametrize("case", ["grouped", "full_128", "causal_128"])
def test_keys_and_values_with_offsets(case, offset, device, machine):
    """The output's rounding causes an error in delta. In the query's gradient it is multiplied by the mean of the keys,
    which an offset per channel makes large."""
    spec = _padded(device, (BF16, F16)[offset == 1], **PADDED[case] | {"sq": 170, "sk": 300})
    for t in (spec.key, spec.value):
        t += (offset * torch.randn(t.shape[1], 1, t.shape[3], device=device)).to(t.dtype)
    with machine():
        _check(spec, grad_lse=offset == 1)


@pytest.mark.quick
@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize("d", [64, 128])
def test_one_tile_more_than_the_ring_holds(d, dtype, device, machine):
    with machine():
        _check(_padded(device, dtype, d=d, sq=300 if d == 64 else 200, sk=128))


@pytest.mark.parametrize(("late", "seed"), [(True, 1), (True, 2), (False, 3)])
def test_any_order_of_warps_and_of_asynchronous_work(late, seed, device, machine):
    if device == "cuda":
        pytest.skip("only the emulator can change the order")
    with machine(late=late, seed=seed):
        _check(_padded(device, BF16, sq=400, sk=140, h=2, hk=1))
        _check(_padded(device, F16, d=128, sq=330, sk=130))
        _check(_unpadded(device, BF16, (200, 90), (140, 60), **FROM_THE_END))


@pytest.mark.parametrize("d", [64, 128])
def test_key_lengths(d, device, machine):
    lengths = torch.tensor([0, 61, 200], device=device, dtype=torch.int32)
    spec = _padded(device, BF16, d=d, b=3, key_lengths=lengths, **(CAUSAL if d == 64 else FROM_THE_END))
    for b, n in enumerate(lengths.tolist()):  # positions after the length must not be read
        spec.key[b, :, n:] = math.nan
        spec.value[b, :, n:] = math.inf
    with machine():
        _check(spec)


UNPADDED = {
    "self": {"lengths_q": (150, 1, 0, 290), "lengths_k": (150, 1, 0, 290)},
    "causal_128": dict(d=128, lengths_q=(100, 33, 170), lengths_k=(100, 33, 170), **CAUSAL),
    "cross_grouped": {"h": 2, "hk": 1, "lengths_q": (90, 140, 20), "lengths_k": (40, 0, 300)},
    "cross_128": {"d": 128, "lengths_q": (170, 3, 80), "lengths_k": (64, 200, 31)},
}  # fmt: skip


@pytest.mark.parametrize("case", list(UNPADDED))
def test_unpadded(case, device, machine):
    with machine():
        _check(_unpadded(device, (BF16, F16)[len(case) % 2], **UNPADDED[case]))


@pytest.mark.parametrize("d", [64, 128])
def test_unpadded_sequences_do_not_touch_each_other(d, device, machine):
    spec = _unpadded(device, BF16, (150, 50), (140, 70), d=d)
    grads = (torch.randn_like(spec.query), None)
    out, lse, _ = _eager(spec, grads, torch.float64)
    out, lse = out.to(BF16), lse.float()
    with machine():
        before = _backward(spec, out, lse, grads)
        for t, first in ((spec.query, 150), (spec.key, 140), (spec.value, 140), (grads[0], 150)):
            t[first:] = math.nan
        after = _backward(spec, out, lse, grads)
    for x, y, first in zip(before, after, (150, 140, 140)):
        assert torch.equal(x[:first], y[:first])


@pytest.mark.parametrize("case", [{"sq": 260, "sk": 300}, dict(d=128, sq=200, sk=300, h=2, hk=1, **CAUSAL)])
def test_deterministic(case, device, machine):
    with machine():
        again = _check(_padded(device, BF16, **case), deterministic=True)
        first = again()
    runs = [again() for _ in range(20)] if device == "cuda" else []
    if device == "cpu":
        with machine(late=False, seed=5):
            runs.append(again())
    for run in runs:
        assert all(torch.equal(x, y) for x, y in zip(first, run))


def test_deterministic_windows(device, machine):
    """With a window the first key block that adds to a tile of queries need not be block 0."""
    with machine():
        _check(_padded(device, F16, sq=400, sk=400, window_left=100, window_right=30), deterministic=True)


def test_what_it_leaves_to_others(device, machine):
    calls = {
        "head dims other than 64 and 128": _padded(device, BF16, d=96),
        "biases, masks, soft cap": _padded(device, BF16, softcap=3.0),
        "scales that are not positive": _padded(device, BF16, scale=-1.0),
        "fewer than 32 keys": _padded(device, BF16, sk=31),
        "multiples of 16 bytes": _padded(device, BF16, d=65),
    }
    with machine():
        for spec in calls.values():
            before = _products(spec)
            grads = (torch.randn_like(spec.query), None)
            out, lse, _ = _eager(spec, grads, torch.float32)
            with contextlib.suppress(RuntimeError):  # another kernel runs it, or the error names the reasons
                _backward(spec, out.to(BF16), lse, grads)
            assert _products(spec) == before
