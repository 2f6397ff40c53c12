"""recurrent_step: the kernels of every instruction set against the definition, weights in every storage dtype, and
torch's requirements for ops."""

import functools

import pytest
import torch
from instruction_sets import running_on
from numerics import assert_as_accurate

import transformer_fast as tf
from transformer_fast.backends import native
from transformer_fast.ops import recurrent_step
from transformer_fast.ops.decoder_step import DecoderCopies
from transformer_fast.ops.decoder_tensors import Projection
from transformer_fast.ops.recurrent_step import CellTensors, RecurrentSource, RecurrentTensors, RecurrentWeights

# name: (when the context is computed, its score function, whether the readout is fed to the next step)
KINDS = {
    "plain": (None, None, False), "peeky": ("before", "given", False), "one state": ("after", "given", True),
    "additive before": ("before", "additive", False), "product before": ("before", "product", False),
    "additive after": ("after", "additive", True), "product after": ("after", "product", True),
    "not fed": ("after", "product", False), "states as they are": ("after", "bare", True),
}  # fmt: skip
VOCABULARY = 19


@pytest.fixture(params=native.ISAS)
def isa(request):
    with running_on(request.param) as isa:
        yield isa


def case(kind, cell="gru", rows=4, width=11, embedding=7, size=6, layers=2, keys=5, dtype=torch.float32, bias=True,
         seed=0):  # fmt: skip
    """The arguments of a call, by name. One source has no positions to attend to, and one is not used by any row."""
    placing, score, feeds = KINDS[kind]
    g = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return (torch.randn(shape, generator=g) * (0.4 if len(shape) == 2 else 1.0)).to(dtype)

    gates, maxout = (4 if cell == "lstm" else 3) * width, placing == "before"
    beside = width if maxout else size if feeds else 0
    cells = [
        (draw(gates, width if i else embedding + beside), draw(gates, width),
         *((draw(gates), draw(gates)) if bias else (None, None)))
        for i in range(layers)
    ]  # fmt: skip
    given = {
        "ids": torch.randint(VOCABULARY, (rows,), generator=g), "token": draw(VOCABULARY, embedding), "cells": cells,
        "head": draw(33, size if placing else width), "hidden": draw(layers, rows, width).tanh(),
        "memory": draw(layers, rows, width) if cell == "lstm" else None, "head_bias": draw(33) if bias else None,
    }  # fmt: skip
    if placing is None:
        return given
    sources = rows // 2 + 2
    length = 1 if score == "given" else keys
    given |= {
        "values": draw(sources, length, width), "sources": torch.arange(rows) // 2, "maxout": maxout,
        "readout": draw(2 * size, 2 * width + embedding) if maxout else draw(size, 2 * width),
        "readout_bias": draw(2 * size if maxout else size) if bias else None,
    }  # fmt: skip
    if feeds:
        given["feed"] = draw(rows, size)
    if score != "given":
        inner = 9 if score == "additive" else width
        mask = torch.rand(sources, length, generator=g) > 0.3
        mask[0], mask[1, -1] = False, True
        given |= {"keys": draw(sources, length, inner) * 0.3, "mask": mask}  # small, so that no key gets all the weight
        if score != "bare":
            given["query"] = draw(inner, width)
        if score == "additive":
            given["score_weight"] = draw(inner)
    return given


def cast(given, dtype):
    def one(t):
        if isinstance(t, (list, tuple)):
            return [one(x) for x in t]
        return t.to(dtype) if isinstance(t, torch.Tensor) and t.is_floating_point() else t

    return {name: one(t) for name, t in given.items()}


def run(given, backend="cpu"):
    with tf.backend(backend), torch.no_grad():
        return [t for t in recurrent_step(**given) if t is not None]


def definition(given):
    """The result in float64, and that of plain PyTorch in the tensors' dtype."""
    return run(cast(given, torch.float64), "eager"), run(given, "eager")


def check(*calls, ours=run, known=None):
    """Compare `ours`, a function of a call's arguments, with float64. known: the definition's results, if computed
    already. The errors of all calls are pooled, because the largest error of few elements depends on chance."""
    found = [(ours(given), *(known[i] if known else definition(given))) for i, given in enumerate(calls)]
    assert len(found[0][0]) == 1 + sum(calls[0].get(n) is not None for n in ("hidden", "memory", "feed"))
    for i in range(len(found[0][0])):
        assert_as_accurate(*(torch.cat([call[k][i].flatten() for call in found]) for k in range(3)), name=f"output {i}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_kernels(isa, cell, dtype):
    """Partial panels, several panels, partial blocks of rows, and heads wider than 256."""
    for kind in KINDS:
        check(*(case(kind, cell, dtype=dtype, seed=seed) for seed in range(4)))
    check(case("additive after", cell, 37, 70, 33, 65, 1, 40, dtype))
    check(case("product before", cell, 9, 300, 16, 31, 1, 33, dtype, bias=False))


@pytest.mark.quick
@pytest.mark.parametrize("kind", KINDS)
def test_quick(kind):
    check(*(case(kind, seed=seed) for seed in range(4)))


def weights_of(given, storage=None, copy=True):
    def projection(name):
        return Projection((given[name],), (given.get(f"{name}_bias"),)) if given.get(name) is not None else None

    tensors = RecurrentTensors(
        given["token"], [CellTensors(*cell) for cell in given["cells"]], given["memory"] is not None,
        projection("head"), projection("query"), given.get("score_weight"), projection("readout"),
        given.get("maxout", False),
    )  # fmt: skip
    return RecurrentWeights(tensors, DecoderCopies(tensors, storage) if copy else None)


def step(given, weights):
    def float32(t):
        return None if t is None else t.float()

    source = RecurrentSource(
        float32(given.get("keys")), float32(given.get("values")), given.get("mask"), given["sources"].int()
    )
    logits = torch.full((len(given["ids"]), 33), float("nan"))
    state = weights.step(
        given["ids"], tuple(float32(given.get(n)) for n in ("hidden", "memory", "feed")), source, logits
    )
    return [logits, *(t for t in state if t is not None)]


@functools.cache
def laid_out_calls(kind, cell):
    """Calls with float32 weights, with bfloat16 weights, and with weights that int8 represents exactly, each with the
    results of the definition. All instruction sets are compared with these."""
    calls = [case(kind, cell, 17, 40, seed=seed) for seed in range(10)]
    narrow = [cast(given, torch.bfloat16) for given in calls]
    exact = [case(kind, cell, 17, 40, seed=seed) for seed in range(10)]
    for given in exact:
        for t in [w for c in given["cells"] for w in c[:2]] + [given[n] for n in ("head", "query", "readout")]:
            scale = 2.0 ** (t.abs().amax(1, keepdim=True) / 127).log2().ceil()
            t.copy_((t / scale).round())
            t[:, 0] = 127.0
            t.mul_(scale / 4)
    rounded = [cast(given, torch.float32) for given in narrow]
    return [(group, [definition(given) for given in plain])
            for group, plain in ((calls, calls), (narrow, rounded), (exact, exact))]  # fmt: skip


@pytest.mark.parametrize("cell", ["gru", "lstm"])
@pytest.mark.parametrize("kind", ["additive before", "product after"])
def test_laid_out_weights(isa, kind, cell):
    """Copies in every storage dtype, of weights that it represents exactly, and weights in place in both dtypes."""
    if native.load():
        pytest.skip(native.load())
    (calls, of_calls), (narrow, of_narrow), (exact, of_exact) = laid_out_calls(kind, cell)
    for copy in (True, False):
        for given, known in ((calls, of_calls), (narrow, of_narrow)):
            check(*given, ours=lambda given, copy=copy: step(given, weights_of(given, copy=copy)), known=known)
    check(*exact, ours=lambda given: step(given, weights_of(given, torch.int8)), known=of_exact)


def test_same_bits_on_any_number_of_threads():
    if native.load():
        pytest.skip(native.load())
    given, before, found = (
        case("additive before", rows=5, width=300, embedding=64, layers=1),
        torch.get_num_threads(),
        [],
    )
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(run(given))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other))


@pytest.mark.quick
def test_no_rows():
    for kind in ("plain", "additive after"):
        given = case(kind)
        rows = {n: given[n][:0] for n in ("ids", "feed", "sources") if n in given}
        logits, hidden, *_ = recurrent_step(**{**given, **rows, "hidden": given["hidden"][:, :0]})
        assert logits.shape == (0, 33) and hidden.shape == (2, 0, 11)


# ---- torch's requirements for ops ------------------------------------------------------------------
def tensors_of(given):
    return [t for v in given.values() for t in (sum(map(list, v), []) if isinstance(v, list) else [v])
            if isinstance(t, torch.Tensor) and t.is_floating_point()]  # fmt: skip


@pytest.mark.quick
@pytest.mark.parametrize("kind", ["plain", "additive before", "product after"])
def test_opcheck(kind):
    given = case(kind, "lstm")
    names = ("ids", "token", "hidden", "memory", "feed", "keys", "values", "mask", "sources", "query", "score_weight")
    cells = [t for cell in given["cells"] for t in cell]
    tail = [given.get(n) for n in ("readout", "readout_bias", "head", "head_bias")]
    op = torch.ops.transformer_fast.recurrent_step.default
    torch.library.opcheck(op, (*map(given.get, names), cells, *tail, given.get("maxout", False)))


@pytest.mark.quick
def test_compiles_to_one_graph():
    given = case("additive after", "lstm")
    compiled = torch.compile(recurrent_step, fullgraph=True, backend="aot_eager")
    for a, b in zip(compiled(**given), recurrent_step(**given)):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("kind", ["additive before", "product after"])
def test_gradients_are_those_of_the_definition(kind):
    given, found = case(kind, "lstm"), []
    for backend in ("cpu", "eager"):
        leaves = [t.detach_().requires_grad_() for t in tensors_of(given)]
        with tf.backend(backend):
            outputs = [t for t in recurrent_step(**given) if t is not None]
        found.append(torch.autograd.grad(sum(o.square().sum() for o in outputs), leaves))
    assert all(torch.equal(a, b) for a, b in zip(*found)) and all(g.any() for g in found[0])


def test_autocast():
    given = case("product after")
    with torch.autocast("cpu", torch.bfloat16):
        found = recurrent_step(**given)
    for a, b in zip(found, recurrent_step(**cast(given, torch.bfloat16))):
        assert a is b is None or (a.dtype == torch.bfloat16 and torch.equal(a, b))


def test_strides():
    given, turned = case("additive before", "lstm"), case("additive before", "lstm")
    for name, t in turned.items():
        if isinstance(t, torch.Tensor) and t.dim() > 1:
            turned[name] = t.transpose(0, -1).contiguous().transpose(0, -1)
    turned["cells"] = [[t.t().contiguous().t() if t.dim() > 1 else t for t in cell] for cell in turned["cells"]]
    for a, b in zip(run(turned), run(given)):
        torch.testing.assert_close(a, b)


def _bad(kind="additive after", **changed):
    return {**case(kind, "lstm"), **changed}


BAD = {
    "ids": (_bad(ids=torch.tensor([0, 1, 2, 19])), ValueError, r"ids.*\[0, 19\).*19"),
    "ids shape": (_bad(ids=torch.zeros(3, dtype=torch.long)), ValueError, r"ids.*\(4,\).*\(3,\)"),
    "ids dtype": (_bad(ids=torch.zeros(4)), TypeError, "ids.*int64.*float32"),
    "token": (_bad(token=torch.randn(19, 7, 1)), ValueError, r"token.*\(tokens, E\).*\(19, 7, 1\)"),
    "cells": (_bad(cells=[]), ValueError, "cells.*wanted 2.*got 0"),
    "cell": (_bad(cells=[(torch.randn(44, 13),)] * 2), ValueError, r"cells\[0\].*weight_ih.*1 entries"),
    "weight": (
        _bad(cells=[(torch.randn(44, 12), torch.randn(44, 11), None, None)] * 2), ValueError,
        r"cells\[0\].weight_ih.*\(44, 13\).*\(44, 12\)",
    ),
    "no weight": (_bad(cells=[(torch.randn(44, 13), None, None, None)] * 2), TypeError, r"weight_hh.*tensor.*NoneType"),
    "hidden": (_bad(hidden=torch.randn(4, 11)), ValueError, r"hidden.*\(layers, rows, H\).*\(4, 11\)"),
    "memory": (_bad(memory=torch.randn(2, 3, 11)), ValueError, r"memory.*\(2, 4, 11\).*\(2, 3, 11\)"),
    "dtype": (_bad(head=torch.randn(33, 6).double()), TypeError, "head.*float64.*float32"),
    "head": (_bad("plain", head=torch.randn(33, 6)), ValueError, r"head.*H = 11.*\(33, 6\)"),
    "no values": (_bad(values=None), ValueError, "values.*feed, keys, mask.*none"),
    "values": (_bad(values=torch.randn(4, 5, 12)), ValueError, r"values.*\(4, 5, 11\).*\(4, 5, 12\)"),
    "keys": (_bad(keys=torch.randn(4, 6, 9)), ValueError, r"keys.*\(4, 5, 9\).*\(4, 6, 9\)"),
    "no keys": (_bad(keys=None), ValueError, "keys.*more than one state"),
    "wide keys": (_bad(score_weight=None), ValueError, "keys.*width 11 without score_weight.*9"),
    "mask": (_bad(mask=torch.ones(4, 5)), TypeError, "mask.*bool.*float32"),
    "mask shape": (_bad(mask=torch.ones(4, 6).bool()), ValueError, r"mask.*\(4, 5\).*\(4, 6\)"),
    "sources": (_bad(sources=torch.tensor([0, 1, 2, 4])), ValueError, r"sources.*\[0, 4\).*4"),
    "no sources": (
        _bad(sources=None, **{n: case("additive after", "lstm")[n][:3] for n in ("keys", "values", "mask")}),
        ValueError, "sources.*4 rows of 3",
    ),
    "readout": (_bad(readout=torch.randn(6, 21)), ValueError, r"readout.*\(6, 22\).*\(6, 21\)"),
    "feed": (_bad(feed=torch.randn(4, 5)), ValueError, r"feed.*\(4, 6\).*\(4, 5\)"),
    "feed of maxout": (_bad("peeky", feed=torch.randn(4, 6)), ValueError, "feed.*none with maxout"),
    "maxout": (_bad(maxout="yes"), TypeError, "maxout.*True or False.*str"),
}  # fmt: skip


@pytest.mark.quick
@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    arguments, error, message = BAD[name]
    with pytest.raises(error, match=message):
        recurrent_step(**arguments)
