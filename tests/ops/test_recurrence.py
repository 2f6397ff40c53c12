"""lstm and gru: the definition is compared with torch's layers, the kernels of every instruction set with the
definition."""

import contextlib

import pytest
import torch
from instruction_sets import running_on
from numerics import GRADIENT, assert_as_accurate
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence, pad_packed_sequence

import transformer_fast as tf
from transformer_fast.backends import native

CELLS = {"lstm": (tf.lstm, 4, torch.nn.LSTM), "gru": (tf.gru, 3, torch.nn.GRU)}
LENGTHS = (3, 0, 5, 1)


@pytest.fixture(params=native.ISAS)
def kernels(request):
    """The C++ kernels of each instruction set."""
    with running_on(request.param):
        yield "cpu"


def case(cell, batch=4, steps=5, inputs=7, width=11, dtype=torch.float32, seed=0):
    """Input, weights, biases and states, and cotangents of out and the last states."""
    g = torch.Generator().manual_seed(seed)
    gates, states = CELLS[cell][1] * width, 2 if cell == "lstm" else 1
    shapes = [(batch, steps, inputs), (gates, inputs), (gates, width), (gates,), (gates,), *[(batch, width)] * states]
    tensors = [torch.randn(s, generator=g) * (0.4 if len(s) == 2 else 1.0) for s in shapes]
    cotangents = [torch.randn(s, generator=g) for s in ((batch, steps, width), *[(batch, width)] * states)]
    return [t.to(dtype) for t in tensors], cotangents


def function_of(cell, **options):
    """A function (tensors) -> (out, last states, ...)."""

    def function(*tensors):
        initial = tensors[5:] if cell == "lstm" else tensors[5]
        out, last = CELLS[cell][0](*tensors[:5], initial, **options)
        return (out, *last) if cell == "lstm" else (out, last)

    return function


def run(backend, cell, inputs, *, dtype=None, **options):
    tensors, cotangents = inputs
    leaves = [t.detach().to(dtype or t.dtype).requires_grad_() for t in tensors]
    with tf.backend(backend):
        results = function_of(cell, **options)(*leaves)
        loss = sum((r * c.to(r.dtype)).sum() for r, c in zip(results, cotangents))
        return [r.detach() for r in results], torch.autograd.grad(loss, leaves)


def check(backend, cell, inputs, **options):
    ours, eager = run(backend, cell, inputs, **options), run("eager", cell, inputs, **options)
    truth = run("eager", cell, inputs, **options, dtype=torch.float64)
    for factor, *results in zip((2.0, GRADIENT), ours, truth, eager):
        for i, found in enumerate(zip(*results)):
            assert_as_accurate(*found, factor, name=f"{cell} {'output' if factor == 2 else 'gradient'} {i}")


def in_torch(cell, inputs, lengths=None):
    """The result of torch's own layer, which accepts no sequence of length 0."""
    tensors, cotangents = inputs
    layer = CELLS[cell][2](tensors[0].shape[2], tensors[2].shape[1], batch_first=True).to(tensors[0].dtype)
    x = tensors[0].detach().requires_grad_()
    states = [t.detach().requires_grad_() for t in tensors[5:]]
    for parameter, t in zip(layer.parameters(), tensors[1:5]):
        parameter.data.copy_(t)
    given = tuple(s[None] for s in states)
    sequences = x if lengths is None else pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
    out, last = layer(sequences, given if cell == "lstm" else given[0])
    if lengths is not None:
        out = pad_packed_sequence(out, batch_first=True, total_length=x.shape[1])[0]
    results = [out, *(s[0] for s in (last if cell == "lstm" else [last]))]
    loss = sum((r * c.to(r.dtype)).sum() for r, c in zip(results, cotangents))
    return results, torch.autograd.grad(loss, [x, *layer.parameters(), *states])


@pytest.mark.quick
@pytest.mark.parametrize("backend", ["eager", "cpu"])
@pytest.mark.parametrize("cell", CELLS)
def test_is_torchs_layer(cell, backend):
    for lengths in (None, torch.tensor([3, 2, 5, 1])):
        inputs = case(cell, dtype=torch.float64 if backend == "eager" else torch.float32)
        found, wanted = run(backend, cell, inputs, lengths=lengths), in_torch(cell, inputs, lengths)
        for a, b in zip([*found[0], *found[1]], [*wanted[0], *wanted[1]]):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_kernels(kernels, cell, dtype):
    """Partial panels, several panels, partial blocks of rows, and sequences that end at different steps."""
    g = torch.Generator().manual_seed(1)
    for batch, steps, inputs, width in ((37, 3, 9, 70), (5, 13, 8, 32), (40, 1, 6, 33)):
        lengths = torch.randint(0, steps + 1, (batch,), generator=g)
        inputs = case(cell, batch, steps, inputs, width, dtype)
        check(kernels, cell, inputs)
        check(kernels, cell, inputs, lengths=lengths, reverse=True)


@pytest.mark.quick
@pytest.mark.parametrize("backend", ["eager", "cpu"])
@pytest.mark.parametrize("cell", CELLS)
def test_lengths_and_reverse(cell, backend):
    """Each sequence is computed as if alone; reverse equals forward over the reversed sequence; unpadded equals
    padded."""
    (x, *rest), cotangents = case(cell)
    lengths = torch.tensor(LENGTHS)
    for reverse in (False, True):
        out, grads = run(backend, cell, ([x, *rest], cotangents), lengths=lengths, reverse=reverse)
        for row, n in enumerate(LENGTHS):
            alone = [x[row : row + 1, :n], *rest[:4], *(t[row : row + 1] for t in rest[4:])]
            parts = [cotangents[0][row : row + 1, :n], *(c[row : row + 1] for c in cotangents[1:])]
            if reverse:
                alone[0], parts[0] = alone[0].flip(1), parts[0].flip(1)
            one, one_grads = run(backend, cell, (alone, parts))
            states = one[0].flip(1) if reverse else one[0]
            torch.testing.assert_close(out[0][row, :n], states[0])
            assert out[0][row, n:].eq(0).all() and grads[0][row, n:].eq(0).all()
            torch.testing.assert_close(grads[0][row, :n], (one_grads[0].flip(1) if reverse else one_grads[0])[0])
            for a, b in zip([*out[1:], *grads[5:]], [*one[1:], *one_grads[5:]]):
                torch.testing.assert_close(a[row], b[0])
        real = torch.arange(5) < lengths[:, None]
        ends = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
        unpadded = [x[real], *rest], [cotangents[0][real], *cotangents[1:]]
        other, other_grads = run(backend, cell, unpadded, cu_seqlens=ends, reverse=reverse)
        torch.testing.assert_close(other[0], out[0][real])
        for a, b in zip([*other[1:], other_grads[0], *other_grads[1:]], [*out[1:], grads[0][real], *grads[1:]]):
            torch.testing.assert_close(a, b)


@pytest.mark.quick
@pytest.mark.parametrize("cell", CELLS)
def test_what_lies_past_the_lengths_is_not_read(cell):
    inputs, lengths = case(cell), torch.tensor(LENGTHS)
    wanted = run("cpu", cell, inputs, lengths=lengths)[0]
    inputs[0][0][2, 5:] = inputs[0][0][0, 3:] = float("nan")
    for a, b in zip(run("cpu", cell, inputs, lengths=lengths)[0], wanted):
        assert torch.equal(a, b)


@pytest.mark.parametrize("batch, steps", [(0, 3), (2, 0)])
@pytest.mark.parametrize("backend", ["eager", "cpu"])
@pytest.mark.parametrize("cell", CELLS)
def test_empty(cell, backend, batch, steps):
    inputs = case(cell, batch, steps)
    out, grads = run(backend, cell, inputs)
    assert out[0].shape == (batch, steps, 11)
    for last, initial, grad, cotangent in zip(out[1:], inputs[0][5:], grads[5:], inputs[1][1:]):
        assert torch.equal(last, initial) and torch.equal(grad, cotangent)
    assert all(g.eq(0).all() for g in grads[:5])


@pytest.mark.parametrize("cell", CELLS)
def test_strides_and_no_bias(cell):
    tensors, cotangents = case(cell)
    wanted = run("cpu", cell, (tensors, cotangents))
    turned = [t.transpose(-1, -2).contiguous().transpose(-1, -2) if t.dim() > 1 else t for t in tensors]
    for a, b in zip([*wanted[0], *wanted[1]], [r for part in run("cpu", cell, (turned, cotangents)) for r in part]):
        torch.testing.assert_close(a, b)
    function, (x, w, u, b, _, *_) = CELLS[cell][0], tensors
    zero = torch.zeros_like(b)
    torch.testing.assert_close(function(x, w, u)[0], function(x, w, u, zero, zero)[0])
    torch.testing.assert_close(function(x, w, u, b)[0], function(x, w, u, b, zero)[0])


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("cell", CELLS)
def test_gradient_of_one_output_alone(cell, which):
    tensors, cotangents = case(cell)
    found = []
    for backend in ("cpu", "eager"):
        leaves = [t.detach().requires_grad_() for t in tensors]
        with tf.backend(backend):
            loss = (function_of(cell)(*leaves)[which] * cotangents[which]).sum()
            found.append(torch.autograd.grad(loss, leaves))
    for a, b in zip(*found):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("cell", CELLS)
def test_same_bits_on_any_number_of_threads(cell):
    if native.load():
        pytest.skip(native.load())
    inputs, before, results = case(cell, 40, 6, 8, 200), torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            results.append(run("cpu", cell, inputs, lengths=torch.arange(40) % 7))
    finally:
        torch.set_num_threads(before)
    one, three = ([*out, grads[0], *grads[2:]] for out, grads in results)  # without what torch's products compute
    assert all(torch.equal(a, b) for a, b in zip(one, three))


# ---- torch's requirements for ops ------------------------------------------------------------------
@pytest.mark.quick
@pytest.mark.parametrize("cell", CELLS)
def test_opcheck(cell):
    (x, _, u, _, bias, *states), _ = case(cell)
    gates = torch.randn(20, u.shape[0])
    sequences = torch.tensor([[0, 3, 3, 15], [3, 0, 12, 5], [2, 3, 0, 1]])
    leaves = [t.requires_grad_() for t in (gates, u, bias, *states)]
    leaves += [None] if cell == "gru" else []
    op = torch.ops.transformer_fast.recurrence.default
    torch.library.opcheck(op, (*leaves, sequences, 12, False, False, True))


@pytest.mark.quick
@pytest.mark.parametrize("cell", CELLS)
def test_compiles_to_one_graph(cell):
    tensors, cotangents = case(cell)
    leaves = [t.requires_grad_() for t in tensors]
    function, results = function_of(cell, lengths=torch.tensor(LENGTHS)), []
    for run_it in (function, torch.compile(function, fullgraph=True, backend="aot_eager")):
        outputs = run_it(*leaves)
        loss = sum((o * c).sum() for o, c in zip(outputs, cotangents))
        results.append([*outputs, *torch.autograd.grad(loss, leaves)])
    for a, b in zip(*results):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("cell", CELLS)
def test_derivatives(cell):
    """Finite differences, gradients of gradients, and forward mode."""
    tensors, cotangents = case(cell, 2, 3, 4, 5, torch.float64)
    function = function_of(cell, lengths=torch.tensor([3, 1]), reverse=True)
    with tf.backend("eager"):
        torch.autograd.gradcheck(function, [t.requires_grad_() for t in tensors], fast_mode=True)
    found = []
    for dtype, backend in ((torch.float32, None), (torch.float64, "eager"), (torch.float32, "eager")):
        with tf.backend(backend) if backend else contextlib.nullcontext():
            leaves = [t.detach().to(dtype).requires_grad_() for t in tensors]
            loss = sum((o * c.to(dtype)).sum() for o, c in zip(function(*leaves), cotangents))
            first = torch.autograd.grad(loss, leaves, create_graph=True)
            second = torch.autograd.grad(sum(g.square().sum() for g in first), leaves)
            tangent = torch.func.jvp(function, tuple(t.detach() for t in leaves), tuple(map(torch.ones_like, leaves)))[
                1
            ]
        found.append([*second, *tangent])
    for three in zip(*found):
        assert_as_accurate(*three, GRADIENT)


@pytest.mark.parametrize("cell", CELLS)
def test_autocast(cell):
    tensors, _ = case(cell)
    function = function_of(cell)
    with torch.autocast("cpu", torch.bfloat16):
        found = function(*tensors)
    for a, b in zip(found, function(*(t.bfloat16() for t in tensors))):
        assert a.dtype == torch.bfloat16 and torch.equal(a, b)


def _bad(**changed):
    (x, w, u, b, v, *states), _ = case("lstm")
    given = {"input": x, "weight_ih": w, "weight_hh": u, "bias_ih": b, "bias_hh": v, "initial": tuple(states)}
    return {**given, **changed}


BAD = {
    "input": (_bad(input=torch.randn(5, 7)), ValueError, r"input.*3 dimensions.*\(5, 7\)"),
    "integers": (_bad(input=torch.ones(4, 5, 7, dtype=torch.long)), TypeError, "input.*floating.*int64"),
    "unpadded": (
        _bad(input=pack_sequence([torch.randn(5, 7), torch.randn(3, 7)])), TypeError,
        "input.*PackedSequence.*cu_seqlens.*lengths",
    ),
    "weight_ih": (_bad(weight_ih=torch.randn(44, 6)), ValueError, r"weight_ih.*\(44, 7\).*\(44, 6\)"),
    "weight_hh": (_bad(weight_hh=torch.randn(33, 11)), ValueError, r"weight_hh.*\(44, 11\).*\(33, 11\)"),
    "bias_hh": (_bad(bias_hh=torch.randn(43)), ValueError, r"bias_hh.*\(44,\).*\(43,\)"),
    "dtype": (_bad(bias_ih=torch.randn(44).double()), TypeError, "bias_ih.*float64.*float32"),
    "one state": (_bad(initial=torch.randn(4, 11)), TypeError, "initial.*two tensors.*Tensor"),
    "state": (_bad(initial=(torch.randn(4, 11), torch.randn(3, 11))), ValueError, r"initial\[1\].*11\).*\(3, 11\)"),
    "lengths": (_bad(lengths=torch.tensor([3, 6, 1, 1])), ValueError, r"lengths.*\[0, 5\].*6"),
    "lengths dtype": (_bad(lengths=torch.ones(4)), TypeError, "lengths.*int.*float32"),
    "lengths shape": (_bad(lengths=torch.tensor([1])), ValueError, r"lengths.*\(4,\).*\(1,\)"),
    "cu_seqlens": (
        _bad(input=torch.randn(5, 7), cu_seqlens=torch.tensor([0, 3, 2, 5])), ValueError, r"cu_seqlens.*0 to 5.*3, 2",
    ),
    "cu_seqlens of a batch": (_bad(cu_seqlens=torch.tensor([0, 5])), ValueError, r"input.*\(total, in\).*\(4, 5, 7\)"),
    "max_seqlen": (
        _bad(input=torch.randn(5, 7), cu_seqlens=torch.tensor([0, 5]), max_seqlen=4), ValueError, "max_seqlen.*5.*4",
    ),
    "max_seqlen alone": (_bad(max_seqlen=4), ValueError, "max_seqlen.*None.*4"),
    "reverse": (_bad(reverse="yes"), TypeError, "reverse.*True or False.*str"),
}  # fmt: skip


@pytest.mark.quick
@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    arguments, error, message = BAD[name]
    with pytest.raises(error, match=message):
        tf.lstm(**arguments)


@pytest.mark.parametrize("isa", native.supported_isas() if not native.load() else [])
def test_one_sequence_is_as_exact_as_dot_products(isa):
    """Plain PyTorch computes one row by dot products with many partial sums. The errors of many draws are pooled."""
    found = []
    with running_on(isa):
        for seed in range(627, 691):
            torch.manual_seed(seed)
            x, w, u, b, c = (torch.randn(n) for n in (48, 3168, 74, 198, 198))
            x, w, u = x.view(1, 3, 16), w.view(198, 16), u.as_strided((198, 66), (0, 1), 8)
            lengths = torch.randint(0, 4, (1,))
            ours = tf.gru(x, w, u, b, c, lengths=lengths)[0]
            with tf.backend("eager"):
                truth = tf.gru(*(t.double() for t in (x, w, u, b, c)), lengths=lengths)[0]
                plain = tf.gru(x, w, u, b, c, lengths=lengths)[0]
            found.append((ours, truth, plain))
    assert_as_accurate(*map(torch.cat, zip(*found)))
