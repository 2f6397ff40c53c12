"""The Triton attention kernels against float64: on a GPU if there is one, else under Triton's interpreter."""

import contextlib
import math
import unittest.mock

import pytest
import torch
import triton_interpreter
from attention_cases import bias_of, draw_features, next_to_one_key
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import GRADIENT, OUTPUT, assert_as_accurate
from remembered_cases import check_repeats

import transformer_fast as tf
from transformer_fast.backends import remembered
from transformer_fast.backends.philox import keep_mask
from transformer_fast.ops import attention, qkv_attention

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy warns about log2(0) in rows without keys
HALF = (torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def _on_the_device(device):
    with contextlib.nullcontext() if device == "cuda" else triton_interpreter.active():
        yield


@pytest.fixture(autouse=True)
def blocks(monkeypatch, device):
    """Under the interpreter, small tiles, so that short sequences have several; on a GPU, the shipped ones. Call it to
    set other sizes."""
    from transformer_fast.kernels import attention_configurations as configurations

    def choose(block_m=16, block_n=32, columns=None):
        config = configurations.Config(block_m, block_n, 4, 1, columns=columns)
        monkeypatch.setattr(configurations, "select", lambda kernel, shape: config)

    if device == "cpu":
        choose()
    return choose


def _relative(kw, leaves):
    if "relative" in kw:
        table, *rest = kw.pop("relative")
        table = leaves("relative", table)
        kw["relative_bias"] = tf.RelativeBias(table, *rest)
    return kw


def _call(backend, function, tensors, kw, grads, dtype=None):
    """Outputs (out, lse) and gradients of every tensor by name, with dropout from a fixed seed."""
    found = {}

    def leaf(name, t):
        found[name] = t.detach().to(dtype or t.dtype).requires_grad_()
        return found[name]

    kw = dict(kw)
    data = [leaf(name, t) for name, t in tensors.items()]
    if kw.get("bias") is not None:
        kw["bias"] = leaf("bias", kw["bias"])
    kw = _relative(kw, leaf)
    torch.manual_seed(11)
    with tf.backend(backend):
        outputs = function(*data, return_lse=True, **kw)
        if grads is None:
            return dict(zip(("out", "lse"), (o.detach() for o in outputs)))
        wanted = [(o, g.to(o.dtype)) for o, g in zip(outputs, grads) if g is not None]
        gradients = torch.autograd.grad([o for o, _ in wanted], list(found.values()), [g for _, g in wanted])
    outputs = dict(zip(("out", "lse"), (o.detach() for o in outputs)))
    return outputs | {f"grad_{n}": g for n, g in zip(found, gradients)}


def _check(function, tensors, kw, grads):
    ours = _call("triton", function, tensors, kw, grads)
    truth = _call("eager", function, tensors, kw, grads, torch.float64)
    eager = _call("eager", function, tensors, kw, grads)
    for name in truth:
        factor = GRADIENT if name.startswith("grad") else OUTPUT
        assert_as_accurate(ours[name], truth[name], eager[name], factor, name)
    return ours


def _padded(device, dtype, b=2, h=2, hk=None, sq=24, sk=40, d=32, grads=True, **kw):
    """Check a call on random (B, H, S, D) tensors with memory layout (B, S, H, D) against float64."""
    hk = hk or h
    kw = {n: v(b, h, sq, sk) if callable(v) else v for n, v in kw.items()}

    def heads(n, s):
        return torch.randn(b, s, n, d, device=device).to(dtype).transpose(1, 2)

    tensors = {"query": heads(h, sq), "key": heads(hk, sk), "value": heads(hk, sk)}
    if hk != h:
        kw["enable_gqa"] = True
    gradients = (torch.randn(b, h, sq, d, device=device), torch.randn(b, h, sq, device=device)) if grads else None
    return _check(tf.scaled_dot_product_attention, tensors, kw, gradients)


CASES = {
    "plain": {},
    "causal": {"is_causal": True},
    "bottom_right": {"is_causal": True, "causal_alignment": "bottom_right"},
    "window": {"window": (7, 3)},
    "window_left_of_bottom_right": {"window": (5, None), "causal_alignment": "bottom_right"},
    "more_queries_than_keys": {"sq": 40, "sk": 20, "is_causal": True, "causal_alignment": "bottom_right"},
    "one_row_one_key": {"sq": 1, "sk": 1},
    "odd_head_dim": {"d": 37},
    "softcap": {"softcap": 2.5},
    "grouped_heads": {"h": 4, "is_causal": True},
    "negative_scale": {"scale": -0.3},
    "zero_scale": {"scale": 0.0},
}


@pytest.mark.quick
@pytest.mark.parametrize("case", list(CASES))
def test_padded(case, device):
    arguments = dict(CASES[case])
    if case == "grouped_heads":
        arguments["hk"] = 2
    _padded(device, HALF[len(case) % 2], **arguments)


@pytest.mark.parametrize("case", ["causal", "softcap"])
def test_float32(case, device):
    _padded(device, torch.float32, sq=40, d=64, **CASES[case])


def test_the_soft_cap_in_float32_is_as_accurate_for_negative_scores(device):
    """With a single key the log-sum-exp is the capped score, whose tanh has a relative error of a few ulp."""
    q, k = 4 * torch.randn(1, 2, 200, 16, device=device), torch.randn(1, 2, 1, 16, device=device)
    with tf.backend("triton"):
        both = [tf.scaled_dot_product_attention(x, k, k, softcap=3.0, return_lse=True)[1] for x in (q, -q)]
    assert torch.equal(both[0], -both[1])
    capped = 3 * torch.tanh((q * k).sum(-1) / 4 / 3)
    assert_as_accurate(both[0], 3 * torch.tanh((q.double() * k.double()).sum(-1) / 12), capped, name="lse")


@pytest.mark.parametrize("axes", ["bhmn", "hmn", "bn", "m", "bm", "n", ""])
def test_bias_gradient_over_the_axes_it_broadcasts_along(axes, device):
    _padded(device, torch.bfloat16, sq=20, bias=bias_of(axes, torch.bfloat16, device))


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize("tile", [(16, 32), (64, 16)])
def test_relative_bias_gradient_to_its_table(tile, bidirectional, device, blocks):
    blocks(*tile)
    table = torch.randn(8, 2, device=device)
    d = 32 if bidirectional else 80  # with wide heads dtable has a separate launch
    _padded(device, torch.float16, sq=50, sk=70, d=d, relative=(table, 12, bidirectional), is_causal=not bidirectional)


def test_lengths_masks_and_minus_infinity(device):
    lengths = torch.tensor([17, 0], device=device)
    mask = torch.rand(2, 1, 24, 40, device=device) > 0.5
    mask[0, 0, 3] = False
    bias = torch.randn(2, 1, 24, 40, device=device).bfloat16()
    bias[:, :, 5:9] = -math.inf
    ours = _padded(device, torch.bfloat16, key_lengths=lengths, attn_mask=mask, bias=bias)
    assert ours["lse"][1].eq(-math.inf).all() and ours["out"][0, :, [3, 6]].eq(0).all()
    assert ours["grad_key"][:, :, 17:].eq(0).all()


def test_what_lies_past_the_keys_is_never_read(device):
    q, k, v = (torch.randn(2, 2, s, 32, device=device).half() for s in (24, 40, 40))
    lengths = torch.tensor([17, 33], device=device)
    outputs = []
    for garbage in (0.0, math.nan):
        for b, n in enumerate(lengths.tolist()):
            k[b, :, n:], v[b, :, n:] = garbage, garbage
        leaves = [t.clone().requires_grad_() for t in (q, k, v)]
        with tf.backend("triton"):
            out = tf.scaled_dot_product_attention(*leaves, key_lengths=lengths)
            outputs.append((out, *torch.autograd.grad(out.float().square().sum(), leaves)))
    for clean, dirty in zip(*outputs):
        assert torch.equal(clean, dirty)


def test_one_huge_logit(device):
    q, k, v = (torch.randn(1, 1, 40, 32, device=device).half() for _ in range(3))
    q[0, 0, 5], k[0, 0, 33] = 30.0, 30.0
    grads = torch.randn(1, 1, 40, 32, device=device), None
    _check(tf.scaled_dot_product_attention, {"query": q, "key": k, "value": v}, {}, grads)


@pytest.mark.parametrize(
    "keys, size, kw",
    [(40, 5.0, {}), (150, 10.0, {"dropout_p": 0.2}), (150, 30.0, {"softcap": 500.0}), (150, 10.0, "bias")],
)
def test_large_logits_in_float32(keys, size, kw, device):
    """A log-sum-exp of several hundred is rounded so coarsely that rows of exp(score - lse) do not sum to one."""
    heads = [torch.randn(1, 1, s, 16, device=device) for s in (40, keys, keys)]
    tensors = dict(zip(("query", "key", "value"), heads))
    tensors["query"][:, :, :30] *= size  # one block of rows keeps small logits
    tensors["key"] *= size
    if kw == "bias":
        kw = {"bias": 1000 * torch.randn(1, 1, 40, 1, device=device)}
    grads = torch.randn(1, 1, 40, 16, device=device), torch.randn(1, 1, 40, device=device)
    _check(tf.scaled_dot_product_attention, tensors, kw, grads)


@pytest.mark.parametrize(
    "kw", [{}, {"softcap": 3.0}, {"window": (150, 20), "hk": 1}], ids=["plain", "softcap", "grouped"]
)
@pytest.mark.parametrize("offset", [1.0, 8.0])
def test_keys_and_values_with_offsets(offset, kw, device, blocks):
    """The output's rounding causes an error in delta. In the query's gradient it is multiplied by the mean of the keys,
    which an offset per channel makes large."""
    blocks(32, 64)
    b, h, sq, sk, d = 1, 2, 64, 300, 64
    hk = kw.get("hk", h)
    tensors = {"query": torch.randn(b, h, sq, d, device=device)}
    for name in ("key", "value"):
        tensors[name] = torch.randn(b, hk, sk, d, device=device) + offset * torch.randn(b, hk, 1, d, device=device)
    tensors = {name: t.to(HALF[offset == 1]) for name, t in tensors.items()}
    kw = {**kw, "enable_gqa": True} if kw.pop("hk", None) else kw
    grads = torch.randn(b, h, sq, d, device=device), torch.randn(b, h, sq, device=device)
    _check(tf.scaled_dot_product_attention, tensors, kw, grads)


def test_strides_past_32_bits(device):
    """Rows 2^30 elements apart: offsets within one tile need 64 bits."""
    if device == "cuda":
        pytest.skip("needs 6 GiB of GPU memory per tensor; the interpreter checks the address arithmetic")
    step = 2**30
    tensors = {}
    for name in ("query", "key", "value"):
        memory = torch.empty(2 * step + 16, dtype=torch.float16)  # untouched pages cost nothing
        tensors[name] = memory.as_strided((1, 1, 3, 16), (0, 0, step, 1))
        tensors[name].copy_(torch.randn(1, 1, 3, 16))
    close = {n: t.clone(memory_format=torch.contiguous_format) for n, t in tensors.items()}
    with tf.backend("triton"):
        for sdpa in (lambda t: tf.scaled_dot_product_attention(*t.values(), dropout_p=0.1),):
            torch.manual_seed(1)
            far = sdpa(tensors)
            torch.manual_seed(1)
            assert torch.equal(far, sdpa(close))


@pytest.mark.parametrize("block_n", [16, 64, 128, 256])
def test_dropout_mask_bit_for_bit(block_n, device, blocks):
    blocks(16, block_n)
    b, h, sq, sk, d, p = 1, 2, 20, 256, 32, 0.3
    q, k = torch.randn(b, h, sq, d, device=device), torch.randn(b, h, sk, d, device=device)
    outs = []
    for first in range(0, sk, d):  # few columns at a time: a tile of 256 keys must fit the shared memory
        v = torch.eye(sk, device=device)[:, first : first + d].expand(b, h, sk, d).contiguous().requires_grad_()
        torch.manual_seed(5)
        with tf.backend("triton"):
            out = tf.scaled_dot_product_attention(q, k, v, dropout_p=p, scale=0.01)
        outs.append(out)  # column j is P[:, first + j], or zero
    rows = torch.eye(sq, d, device=device).expand(b, h, sq, d)
    (grad_v,) = torch.autograd.grad(out, v, rows)  # column i is P[i, :], or zero
    torch.manual_seed(5)
    rng = torch.randint(-(2**63), 2**63 - 1, (2,), dtype=torch.int64, device=device)
    i, j = torch.arange(sq, device=device)[:, None], torch.arange(sk, device=device)[None]
    kept = keep_mask(rng, p, torch.arange(b * h, device=device)[:, None, None], i[None], j[None]).view(b, h, sq, sk)
    assert torch.equal(torch.cat(outs, -1) != 0, kept)
    assert torch.equal(grad_v[..., :sq].transpose(-1, -2) != 0, kept)


@pytest.mark.parametrize("causal", [False, True])
def test_dropout(causal, device):
    _padded(device, torch.float16, b=1, sq=24, sk=150, dropout_p=0.25, is_causal=causal)


def test_dropout_where_a_mask_leaves_next_to_one_key_of_many(device):
    _check(tf.scaled_dot_product_attention, *next_to_one_key(device))


def test_unpadded(device):
    """Sequences of different lengths, including an empty one and one without keys."""
    cu_q = torch.tensor([0, 20, 20, 53, 58], device=device)
    cu_k = torch.tensor([0, 33, 40, 40, 45], device=device)
    q, k, v = (torch.randn(n, h, 32, device=device).bfloat16() for n, h in ((58, 4), (45, 2), (45, 2)))
    grads = torch.randn(58, 4, 32, device=device), torch.randn(4, 58, device=device)
    kw = {
        "cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k, "is_causal": True, "causal_alignment": "bottom_right",
        "dropout_p": 0.2, "bias": torch.randn(4, 1, 33, 33, device=device).bfloat16(),
        "relative": (torch.randn(8, 4, device=device), 20, True),
    }  # fmt: skip
    _check(tf.varlen_attention, {"query": q, "key": k, "value": v}, kw, grads)


def test_gradient_of_a_fused_projection_is_written_in_place(device):
    qkv = torch.randn(40, 3, 2, 32, device=device).half()
    cu = torch.tensor([0, 17, 40], dtype=torch.int32, device=device)
    _check(
        lambda x, **kw: qkv_attention(x, cu, **kw), {"qkv": qkv}, {"is_causal": True},
        (torch.randn(40, 2, 32, device=device), None),
    )  # fmt: skip


DECODING = {
    "one_query": {"sq": 1},
    "grouped": {"sq": 1, "h": 8, "hk": 2, "key_lengths": torch.tensor([100, 35])},
    "few_queries": {"sq": 5, "is_causal": True, "causal_alignment": "bottom_right", "h": 4, "hk": 2, "softcap": 4.0},
    "window": {"sq": 2, "window": (40, 0), "causal_alignment": "bottom_right", "key_lengths": torch.tensor([100, 0])},
    "biases": {
        "sq": 2, "relative": (torch.randn(8, 2), 20, True), "bias": bias_of("bhmn", torch.float16),
        "attn_mask": lambda b, h, sq, sk: torch.rand(b, 1, 1, sk) > 0.3,
    },
}  # fmt: skip


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("case", list(DECODING))
def test_decoding(case, splits, device, monkeypatch):
    from transformer_fast.backends import triton_attention

    monkeypatch.setattr(triton_attention, "splits_of", lambda *_: splits)
    kw = {n: v.to(device) if isinstance(v, torch.Tensor) else v for n, v in DECODING[case].items()}
    if device == "cuda" and case == "biases":
        kw |= {"relative": (kw["relative"][0].cuda(), 20, True), "bias": bias_of("bhmn", torch.float16, device)}
        kw["attn_mask"] = lambda b, h, sq, sk: torch.rand(b, 1, 1, sk, device=device) > 0.3
    _padded(device, torch.float16, sk=100, d=40, grads=False, **kw)


def test_unpadded_decoding_in_splits(device, monkeypatch):
    from transformer_fast.backends import triton_attention

    monkeypatch.setattr(triton_attention, "splits_of", lambda *_: 2)
    cu_q, cu_k = torch.tensor([0, 2, 2, 3], device=device), torch.tensor([0, 70, 80, 113], device=device)
    q, k, v = (torch.randn(n, 2, 32, device=device).half() for n in (3, 113, 113))
    kw = {"cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k}
    _check(tf.varlen_attention, {"query": q, "key": k, "value": v}, kw, None)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(data=st.data())
def test_drawn_shapes_and_features(data):
    from transformer_fast.kernels import attention_configurations as configurations

    device = "cuda" if torch.cuda.is_available() else "cpu"
    drawn = draw_features(data.draw, device, queries=(1, 40), keys=(1, 50), side=(0, 30))
    whole = configurations.Config(16, 32, 4, 1)
    sliced = whole._replace(columns=data.draw(st.sampled_from([None, 16])))
    choose = lambda kernel, shape: whole if kernel == "decode" else sliced  # noqa: E731  decode writes whole rows
    small = unittest.mock.patch.object(configurations, "select", choose)
    with contextlib.nullcontext() if device == "cuda" else small:
        _padded(device, d=data.draw(st.sampled_from([3, 16, 40, 64])), **drawn)


@pytest.mark.parametrize("case", ["plain", "bottom_right", "window", "softcap", "grouped_heads"])
def test_head_dims_in_slices(case, device, blocks):
    blocks(columns=16)
    arguments = dict(CASES[case], d=24)
    if case == "grouped_heads":
        arguments["hk"] = 2
    _padded(device, HALF[len(case) % 2], **arguments)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("axes", ["bhmn", "hn", None])
def test_biases_and_dropout_with_head_dims_in_slices(axes, dtype, device, blocks):
    blocks(columns=16)
    kw = (
        {"relative": (torch.randn(8, 2, device=device), 12, True)}
        if axes is None
        else {"bias": bias_of(axes, dtype, device)}
    )
    _padded(device, dtype, d=24, key_lengths=torch.tensor([40, 13], device=device), dropout_p=0.2, **kw)


@pytest.mark.parametrize("capability", [(8, 0), (9, 0)])
@pytest.mark.parametrize("kind", ["bias", "broadcast", "relative"])
def test_wide_heads(kind, capability, device, monkeypatch):
    from transformer_fast.backends import triton_attention

    monkeypatch.undo()  # the table's tiles, not the small ones of this file
    if device == "cpu":
        monkeypatch.setattr(triton_attention, "_capability", lambda device: capability)
    elif capability != (8, 0):
        pytest.skip("a GPU has one capability")
    dtype = torch.float32 if capability == (9, 0) and kind == "relative" else torch.bfloat16
    kw = {
        "bias": {"bias": bias_of("bhmn", dtype, device)},
        "broadcast": {"bias": bias_of("mn", dtype, device)},
        "relative": {"relative": (torch.randn(8, 1, device=device), 12, True)},
    }[kind]
    _padded(device, dtype, b=1, h=1, sq=40, sk=70, d=130 if kind == "broadcast" else 256, **kw)


SHIPPED = {
    "plain": {"sq": 200},
    "causal": {"sq": 300, "is_causal": True},
    "grouped": {"h": 4, "hk": 2, "sq": 150, "is_causal": True, "causal_alignment": "bottom_right"},
    "rich": {"sq": 150, "dropout_p": 0.2, "softcap": 20.0, "window": (200, 100)},
    "relative": {"sq": 150, "dropout_p": 0.1},
    "bias": {"sq": 150},
    "broadcast": {"sq": 150},
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("d", [64, 128, 256])
@pytest.mark.parametrize("case", list(SHIPPED))
def test_shipped_tiles(case, d, dtype, device, monkeypatch):
    """Several tiles of queries and keys with the shipped sizes; under the interpreter, those of sm_90."""
    from transformer_fast.backends import triton_attention

    kw = dict(SHIPPED[case])
    if device == "cpu":
        if (d, dtype) != (64, torch.bfloat16) or case not in ("plain", "causal"):
            pytest.skip("only on a GPU: the interpreter would take minutes for all of them")
        monkeypatch.undo()
        monkeypatch.setattr(triton_attention, "_capability", lambda device: (9, 0))
    if case == "relative":
        kw["relative"] = torch.randn(8, 1, device=device), 100, True
    if case in ("bias", "broadcast"):
        kw["bias"] = bias_of("bhmn" if case == "bias" else "mn", dtype, device)
    _padded(device, dtype, **{"b": 1, "h": 1, "sk": 300, "d": d, **kw})


def test_gradients_are_the_same_bits_every_time(device):
    if device == "cpu":
        pytest.skip("numpy always adds in the same order")
    q, k, v = (torch.randn(2, 8, 1024, 64, device=device, dtype=torch.bfloat16).requires_grad_() for _ in range(3))
    bias = torch.randn(1, 8, 1024, 1024, device=device, requires_grad=True)
    runs = []
    for _ in range(2):
        with tf.backend("triton"):
            out = tf.scaled_dot_product_attention(q, k, v, bias=bias)
            runs.append(torch.autograd.grad(out.float().square().sum(), (q, k, v, bias)))
    assert all(torch.equal(a, b) for a, b in zip(*runs))


@pytest.mark.parametrize("precision", ["ieee", "tf32", "none"])
def test_float32_products_follow_torch_s_setting(precision, device):
    """With the old and the new setting: reading the old allow_tf32 raises once the new setting has been used."""
    import triton_launches

    if device == "cuda":
        pytest.skip("this does not depend on the device")
    q, matmul = torch.randn(1, 1, 40, 16), torch.backends.cuda.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, precision
    try:
        with triton_launches.recorded() as launches, tf.backend("triton"), torch.no_grad():
            tf.scaled_dot_product_attention(q, q, q)
    finally:
        matmul.fp32_precision = before
    assert [launch.options["PRECISION"] for launch in launches] == ["tf32" if precision == "tf32" else "ieee"]


@pytest.mark.quick
def test_splits_fill_the_gpu():
    from transformer_fast.backends.triton_attention import splits_of

    assert splits_of(132, 100, 132) == 1 and splits_of(106, 100, 132) == 1
    assert splits_of(1, 1, 132) == 1
    for tiles in (1, 8, 12, 64, 100):
        splits = splits_of(tiles, 64, 132)
        efficiency = [tiles * n / 132 / math.ceil(tiles * n / 132) for n in range(1, 65)]
        assert efficiency[splits - 1] >= 0.85 * max(efficiency) > max(efficiency[: splits - 1], default=0.0)


@pytest.mark.quick
def test_every_shape_has_a_configuration(monkeypatch):
    from transformer_fast.kernels import attention_configurations as configurations

    monkeypatch.undo()  # the small tiles of this file
    for kernel in configurations.KERNELS:
        for capability in ((8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)):
            for head_dim in (1, 64, 65, 128, 129, 256):
                for itemsize in (2, 4):
                    for kind in configurations.KINDS:
                        shape = configurations.shape(capability, head_dim, itemsize, kind, 10)
                        config = configurations.select(kernel, shape)
                        assert all(n & (n - 1) == 0 and n >= 16 for n in config[:2])
    assert configurations.architecture((8, 9)) == "sm_120" and configurations.architecture((9, 0)) == "sm_90"


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("name", ["attention", "qkv", "unpadded"])
def test_a_remembered_call_has_the_same_results(device, name, gradients, monkeypatch):
    """On a GPU. Under the interpreter no launch is repeated."""
    monkeypatch.setattr(attention, "readable", lambda lengths: False)  # as on a GPU
    remembered.forget()
    check_repeats(device, name, "triton", torch.bfloat16, gradients)
