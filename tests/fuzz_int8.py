"""Drawn calls of the int8 products, which must have the bits of the definition, and of int8 layers, which must be as
accurate as their parts."""

from fuzz_draw import ACTIVATIONS, Draw

from transformer_fast.backends import native

_DEFINITION = """
from transformer_fast.backends import eager, eager_int8
from transformer_fast.ops.linear_int8 import *
weigh = lambda f: Int8Weight(*quantize_weight(f, {group}), {group})
def defined(x, w, b, activation=None, kind=torch.float32):
    rows = x.to({dtype}).reshape(-1, x.shape[-1]) if x.dtype == torch.float64 else x.reshape(-1, x.shape[-1])
    y = eager_int8.finish(eager_int8.linear_int8(rows, *w.parts(), {group}), b, None, torch.float32)
    y = y.double() if x.dtype == torch.float64 else y
    y = eager.bias_activation(y, None, None, activation) if activation else y
    return y.to(torch.float64 if x.dtype == torch.float64 else kind).view(*x.shape[:-1], w.shape[0])
"""

_LINEAR = """
def ours_of(x):
    y = linear_int8(x, [weigh(f) for f in floats], biases, activation, kind)
    others = 0 if activation else (y != plain_of(x)[0]).sum()  # places with other bits than the definition's
    for f in floats:
        others += sum((a != b).sum() for a, b in zip(weigh(f).parts(), eager_int8.quantize_weight(f, {group})))
    return y, torch.as_tensor(float(others))
def plain_of(x):
    found = [defined(x, weigh(f), b, activation, kind or x.dtype) for f, b in zip(floats, biases)]
    return torch.cat(found, -1), torch.zeros((), dtype=x.dtype)
"""

_BLOCK = """
weights = [None if f is None else weigh(f) for f in floats]
def norm(n, x):
    weight, bias = (None if t is None else t.to(x.dtype) for t in n[:2])
    return F.rms_norm(x, x.shape[-1:], weight, n.eps) if rms else F.layer_norm(x, x.shape[-1:], weight, bias, n.eps)
def ours_of(context, residual):
    w = Int8BlockWeights(*weights, tuple(biases), first, second, rms, activation)
    assert not w.why_not(), w.why_not()
    return int8_block(context, residual, w)
def plain_of(context, residual):
    exact, kind = residual.dtype == torch.float64, residual.dtype
    def linear(i, x):
        if exact: return F.linear(x, floats[i].double(), None if biases[i] is None else biases[i].double())
        return defined(x, weights[i], biases[i])
    r = (residual if exact else residual.float()) + linear(0, context)
    r = norm(first, r) if first else r
    h = r if first else norm(second, r)
    inner = eager.bias_activation(linear(1, h), None, None, activation)
    inner = inner if weights[2] is None else inner * linear(2, h)
    y = r + linear(3, inner)
    return (norm(second, y) if first else y).to(kind)
"""


def _weights(d: Draw, sizes: list[tuple[int, int] | None], scale: float) -> str:
    """Draw floats and biases for weights of sizes (out, in); None for a weight that is left out. Returns the group."""
    if d.call.isa:  # set the matching int8 kernels too
        there = native.supported_int8_isas()
        within = [n for n in (d.call.isa, native._INT8_WIDEST[d.call.isa]) if n in there] or there[:1]
        d.call.setup.append(f"native.set_int8_isa({d.rng.choice(within)!r})")
    d.call.grad = False
    floats, biases = [], []
    for i, size in enumerate(sizes):
        if size is None:
            floats.append("None")
            biases.append("None")
            continue
        floats.append(d.other(f"f{i}", f"torch.randn({{n}}).mul({scale * size[1] ** -0.5:.4f})", size, d.dtype))
        biased = d.chance(0.7)
        biases.append(d.other(f"b{i}", "torch.randn({n})", size[:1], d.parameter_dtype()) if biased else "None")
    group = d.rng.choice((32, 64, 128, 256))
    d.call.setup.append(f"floats, biases = [{', '.join(floats)}], [{', '.join(biases)}]")
    return str(group)


def linear(d: Draw) -> None:
    inner, count = d.size(1, 600), d.rng.randint(1, 3)
    d.tensor("x", d.shape(inner), scale=d.rng.choice((1.0, 0.1)), shift=d.rng.choice((0.0, 0.3)))
    group = _weights(d, [(d.size(1, 140), inner) for _ in range(count)], 1.0)
    kind = d.rng.choice(("None", d.dtype, "torch.float32"))
    d.call.setup.append(f"activation, kind = {d.rng.choice((None, None, *ACTIVATIONS))!r}, {kind}")
    d.call.setup.append((_DEFINITION + _LINEAR).replace("{group}", group).replace("{dtype}", d.dtype))
    d.call.ours, d.call.plain = "ours_of(x)", "plain_of(x)"


def block(d: Draw) -> None:
    """Compared with the layer in float64 without quantised weights."""
    width, inner, heads = d.size(8, 140), d.size(8, 600), d.size(8, 300)
    shape = d.shape(width)
    d.tensor("context", (*shape[:-1], heads), dtype=d.rng.choice((d.dtype, "torch.bfloat16")))
    d.tensor("residual", shape)
    gate = (inner, width) if d.chance(0.4) else None
    group = _weights(d, [(width, heads), (inner, width), gate, (width, inner)], 1.0)
    rms, post = d.chance(0.4), d.chance()
    norms = []
    for name in ("first", "second"):
        made = [
            d.other(f"{name}_{what}", f"torch.rand({{n}}).add({shift})", (width,), d.parameter_dtype())
            if d.chance(0.7) and not (rms and what == "bias")
            else "None"
            for what, shift in (("weight", 0.5), ("bias", -0.5))
        ]
        norms.append(f"Int8Norm({', '.join(made)}, {d.rng.choice((1e-5, 1e-3))})")
    d.call.setup.append((_DEFINITION + _BLOCK).replace("{group}", group).replace("{dtype}", d.dtype))
    d.call.setup.append(f"rms, activation = {rms}, {d.rng.choice(ACTIVATIONS)!r}")
    d.call.setup.append(f"first, second = {norms[0] if post else None}, {norms[1]}")
    d.call.ours, d.call.plain = "ours_of(context, residual)", "plain_of(context, residual)"


OPS = {"int8_block": block, "linear_int8": linear}
