"""A drawn call of each op as source text: tensors with any layout, the call, and the same in plain PyTorch."""

import random

import fuzz_decoders
import fuzz_embeddings
import fuzz_int8
from fuzz_draw import ACTIVATIONS, Call, Draw

_PLAIN_ACTIVATION = {
    "gelu": "F.gelu({})", "gelu_tanh": "F.gelu({}, approximate='tanh')", "relu": "F.relu({})", "silu": "F.silu({})",
    None: "{}",
}  # fmt: skip


def _norm(d: Draw) -> None:
    width = d.size(1, 300)
    shape = d.shape(width)
    rms, add = d.chance(), d.chance()
    kind = d.parameter_dtype()
    d.tensor("x", shape, shift=d.rng.choice((0.0, 0.0, 3.0)))
    if add:
        d.tensor("r", shape)
    weight = d.maybe("w", (width,), dtype=kind)
    bias = "None" if rms else d.maybe("b", (width,), dtype=kind)
    eps = d.rng.choice((1e-5, 1e-6, 1e-12, 0.1))
    if add:
        both = d.chance()
        p = d.rng.choice((0.0, 0.0, 0.3))
        more = f"{eps}, dropout_p={p}, return_sum={both}"
        arguments = f"x, r, {weight}, {more}" if rms else f"x, r, {weight}, {bias}, {more}"
        d.call.ours = f"tf.add_{'rms' if rms else 'layer'}_norm({arguments})"
    elif rms:
        d.call.ours = f"tf.rms_norm(x, ({width},), {weight}, {eps})"
    else:
        d.call.ours = f"tf.layer_norm(x, ({width},), {weight}, {bias}, {eps})"
    if width < 8:  # the norm of so few elements is almost constant: gradients are rounding noise
        d.call.grad = False


def _bias_activation(d: Draw) -> None:
    width = d.size(1, 300)
    shape = d.shape(width)
    d.tensor("x", shape, scale=d.rng.choice((1.0, 3.0)))
    bias = d.maybe("b", (width,), dtype=d.parameter_dtype())
    gate = d.maybe("g", shape)
    d.call.ours = f"tf.bias_activation(x, {bias}, {d.rng.choice(ACTIVATIONS)!r}, gate={gate})"
    d.call.few = "'relu'" in d.call.ours  # the sign of a sum near zero depends on rounding


def _dropout(d: Draw) -> None:
    d.tensor("x", d.shape(d.size(1, 300)))
    d.call.ours = f"tf.dropout(x, {d.rng.choice((0.0, 0.1, 0.5, 0.9, 1.0))}, {d.chance(0.9)})"


def _linear(d: Draw) -> None:
    inner, outer = d.size(1, 100), d.size(1, 100)
    if d.chance(0.1):  # long sums
        inner = d.rng.randint(100, 5000)
    d.tensor("x", d.shape(inner))
    d.tensor("w", (outer, inner), scale=0.2)
    bias = d.maybe("b", (outer,))
    activation = d.rng.choice((None, *ACTIVATIONS))
    d.call.ours = f"tf.linear(x, w, {bias}, {activation!r})"
    d.call.plain = _PLAIN_ACTIVATION[activation].format(f"F.linear(x, w, {bias})")


def _projections(d: Draw) -> None:
    inner, count = d.rng.randint(100, 5000) if d.chance(0.1) else d.size(1, 60), d.rng.randint(1, 3)
    d.tensor("x", d.shape(inner))
    outs = [d.size(1, 60) for _ in range(count)]
    weights = [d.tensor(f"w{i}", (n, inner)) for i, n in enumerate(outs)]
    biases = [d.maybe(f"b{i}", (n,)) for i, n in enumerate(outs)]
    d.call.ours = f"tf.projections(x, [{', '.join(weights)}], [{', '.join(biases)}])"
    d.call.plain = f"({', '.join(f'F.linear(x, {w}, {b})' for w, b in zip(weights, biases))},)"


def _to_panels(d: Draw) -> None:
    """to_panels rounds the weight, so plain PyTorch gets the rounded weight."""
    inner, outer = d.size(1, 100), d.size(1, 100)
    d.call.grad = False
    d.tensor("x", d.shape(inner))
    d.tensor("w", (outer, inner), scale=0.2)
    bias = d.maybe("b", (outer,))
    activation = d.rng.choice((None, *ACTIVATIONS))
    storage = "torch.bfloat16" if d.dtype == "torch.bfloat16" else "torch.float32"
    d.call.ours = f"tf.linear(x, tf.to_panels(w, {storage}), {bias}, {activation!r})"
    d.call.plain = _PLAIN_ACTIVATION[activation].format(f"F.linear(x, w, {bias})")


def _cross_entropy(d: Draw) -> None:
    rows, classes = d.size(0, 40), d.size(1, 300)
    d.tensor("x", (rows, classes), scale=d.rng.choice((1.0, 5.0)))
    d.integers("target", 0, classes, (rows,))
    weight = d.other("w", "torch.rand({n}).add(0.1)", (classes,), "torch.float32") if d.chance(0.3) else "None"
    smoothing, z = d.rng.choice((0.0, 0.1, 1.0)), d.rng.choice((0.0, 0.01))
    ignore = d.rng.choice((-100, 0, 5))
    reduction = d.rng.choice(("none", "sum") if rows == 0 or ignore >= 0 else ("none", "sum", "mean"))
    d.call.ours = f"tf.cross_entropy(x, target, {weight}, {ignore}, {reduction!r}, {smoothing}, z_loss={z})"
    d.call.few = classes < 8


def _linear_cross_entropy(d: Draw) -> None:
    rows, width, classes = d.size(1, 40), d.size(1, 40), d.size(2, 200)
    d.tensor("x", (rows, width))
    d.tensor("w", (classes, width), expand=())
    bias = d.maybe("b", (classes,))
    d.integers("target", 0, classes, (rows,))
    chunk = d.rng.choice((None, 1, 7))
    smoothing = d.rng.choice((0.0, 0.1))
    d.call.ours = (
        f"tf.linear_cross_entropy(x, w, target, {bias}, {chunk}, reduction={d.rng.choice(('mean', 'sum'))!r}, "
        f"label_smoothing={smoothing}, ignore_index={d.rng.choice((-100, 1))})"
    )
    more = d.call.ours.split("reduction=")[1].rstrip(")")
    d.call.plain = f"F.cross_entropy(F.linear(x, w, {bias}).to(torch.promote_types(x.dtype, torch.float32)), target.long(), reduction={more})"  # noqa: E501
    d.call.few = width < 4 or classes < 8 or rows < 4


def _additive(d: Draw) -> None:
    batch, queries, keys, width = d.size(1, 3), d.size(1, 20), d.size(1, 40), d.size(1, 70)
    d.tensor("q", (batch, queries, width))
    d.tensor("k", (batch, keys, width))
    d.tensor("v", (batch, keys, d.size(1, 70)))
    dtype = d.parameter_dtype()
    d.tensor("s", (width,), dtype=dtype)
    bias = d.maybe("b", (width,), dtype=dtype)
    mask = "None"
    if d.chance(0.4):
        mask = d.other("mask", "(torch.rand({n}) > 0.3)", (batch, d.rng.choice((1, queries)), keys), "torch.bool")
    lengths = d.integers("lengths", 0, keys + 1, (batch,)) if d.chance(0.4) else "None"
    d.call.ours = (
        f"tf.additive_attention(q, k, v, s, {bias}, {mask}, key_lengths={lengths}, return_weights={d.chance()})"
    )
    d.call.few = True


def _recurrence(d: Draw) -> None:
    batch, steps, inputs, width = d.size(1, 9), d.size(1, 9), d.size(1, 40), d.size(1, 70)
    cell, gates = d.rng.choice((("lstm", 4), ("gru", 3)))
    d.tensor("x", (batch, steps, inputs))
    d.tensor("w", (gates * width, inputs))
    d.tensor("u", (gates * width, width))
    biases = [d.maybe(name, (gates * width,)) for name in ("b", "c")]
    lengths = d.integers("lengths", 0, steps + 1, (batch,)) if d.chance() else "None"
    call = f"tf.{cell}(x, w, u, {', '.join(biases)}, lengths={lengths}, reverse={d.chance()})"
    d.call.ours = f"(lambda out, last: out)(*{call})"
    d.call.few = True


def _scores(d: Draw, batch: int, heads: int, queries: int, keys: int) -> list[str]:
    """Arguments for the operations on the scores."""
    more = []

    def axes(n):
        return tuple(m if d.chance(0.6) else 1 for m in n)

    full = (batch, heads, queries, keys)
    if d.chance(0.25):
        shape = axes(full)
        d.other("mask", "(torch.rand({n}) > 0.2)", shape[d.rng.choice((0, 0, 1, 2)) if shape[:2] == (1, 1) else 0 :],
                "torch.bool")  # fmt: skip
        more.append("attn_mask=mask")
    if d.chance(0.25):
        d.tensor("bias", axes(full), dtype=d.parameter_dtype())
        more.append("bias=bias")
    if d.chance(0.5):
        more.append("is_causal=True")
    if d.chance(0.5):
        more.append("causal_alignment='bottom_right'")
    if d.chance(0.25):
        left, right = d.rng.choice((None, 0, 3, 60)), d.rng.choice((None, 0, 20, 2**62))
        more.append(f"window=({left}, {right})")
    if d.chance(0.2):
        more.append(f"softcap={d.rng.choice((2.0, 30.0))}")
    if d.chance(0.3):
        more.append(f"scale={d.rng.choice((0.3, -0.2, 1.0))}")
    if d.chance(0.2):
        both = d.chance()
        d.tensor("table", (d.rng.choice((4, 8, 32)), heads), dtype=d.parameter_dtype())
        more.append(f"relative_bias=tf.RelativeBias(table, {d.rng.choice((40, 128))}, {both})")
    if d.chance(0.25):
        more.append(f"dropout_p={d.rng.choice((0.1, 0.5))}")
    if d.chance(0.5):
        more.append("return_lse=True")
    return more


def _heads(d: Draw) -> tuple[int, int]:
    shared = d.rng.choice((1, 1, 2, 3))
    key_heads = d.size(1, 3)
    return shared * key_heads, key_heads


def _attention(d: Draw) -> None:
    batch, (heads, key_heads) = d.size(1, 3), _heads(d)
    queries, keys, dim = d.size(1, 150), d.size(1, 300), d.size(1, 100)
    q_scale, shift = d.rng.choice((1.0, 1.0, 3.0)), d.rng.choice((0.0, 0.0, 3.0))
    d.tensor("q", (batch, heads, queries, dim), scale=q_scale, expand=(0, 1, 2))
    d.tensor("k", (batch, key_heads, keys, dim), shift=shift, expand=(0, 1))
    d.tensor("v", (batch, key_heads, keys, dim), shift=shift, expand=(0, 1))
    more = _scores(d, batch, heads, queries, keys)
    if d.chance(0.3):
        d.integers("lengths", 0, keys + 1, (batch,))
        more.append("key_lengths=lengths")
    d.call.ours = f"tf.scaled_dot_product_attention(q, k, v, {', '.join(['enable_gqa=True', *more])})"
    d.call.few = True


def _varlen(d: Draw) -> None:
    batch, (heads, key_heads), dim = d.size(1, 4), _heads(d), d.size(1, 100)
    queries, keys = ([d.rng.choice((0, d.size(1, 90))) for _ in range(batch)] for _ in range(2))
    alike = d.chance()
    keys = queries if alike else keys
    d.tensor("q", (sum(queries), heads, dim))
    d.tensor("k", (sum(keys), key_heads, dim), expand=(1,))
    d.tensor("v", (sum(keys), key_heads, dim), expand=(1,))
    more = _scores(d, batch, heads, max(queries), max(keys))
    cus = []
    for name, lengths in (("cu_q", queries), ("cu_k", keys))[: 1 if alike else 2]:
        values = [sum(lengths[:i]) for i in range(batch + 1)]
        step = d.rng.choice((1, 2))
        d.call.setup.append(f"{name} = torch.tensor({values}, dtype={d.rng.choice(('torch.int32', 'torch.int64'))})"
                            f".repeat_interleave({step})[::{step}]")  # fmt: skip
        cus.append(name)
    d.call.ours = f"tf.varlen_attention(q, k, v, {', '.join([*cus, *more])})"
    d.call.few = True


def _qkv(d: Draw) -> None:
    heads, dim, causal, p = d.size(1, 4), d.size(1, 70), d.chance(), d.rng.choice((0.0, 0.2))
    if d.chance():
        batch, length = d.size(1, 3), d.size(1, 150)
        d.tensor("qkv", (batch, length, 3, heads, dim))
        lengths = d.integers("lengths", 0, length + 1, (batch,)) if d.chance(0.4) else "None"
        d.call.ours = f"tf.ops.qkv_attention(qkv, None, None, {p}, {causal}, key_lengths={lengths}, return_lse=False)"
    else:
        lengths = [d.rng.choice((0, d.size(1, 90))) for _ in range(d.size(1, 4))]
        d.tensor("qkv", (sum(lengths), 3, heads, dim), expand=(2,))
        values = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
        d.call.setup.append(f"cu = torch.tensor({values}, dtype=torch.int32)")
        d.call.ours = f"tf.ops.qkv_attention(qkv, cu, None, {p}, {causal})"
    d.call.few = True


def _shapes(d: Draw) -> None:
    """The shapes other than (B, H, S, D) that torch's own function accepts."""
    queries, keys, dim, width = d.size(1, 40), d.size(1, 60), d.size(1, 70), d.size(1, 70)
    leading = tuple(d.size(1, 3) for _ in range(d.rng.randint(0, 3)))

    def some():
        shape = tuple(1 if d.chance(0.2) else n for n in leading)
        return shape[d.rng.randint(0, len(shape)) :] if d.chance(0.3) else shape

    d.tensor("q", (*leading, queries, dim))
    shared = some()
    d.tensor("k", (*shared, keys, dim), expand=())
    d.tensor("v", (*shared, keys, width), expand=())
    causal = d.chance(0.3)
    more = f"is_causal={causal}, scale={d.rng.choice((None, 0.3))}"
    if not causal and d.chance(0.4):
        shape = (*some(), d.rng.choice((1, queries)), keys)
        d.other("mask", "(torch.rand({n}) > 0.05)", shape[-len(leading) - 2 :], "torch.bool")
        more += ", attn_mask=mask"
    d.call.ours = f"tf.scaled_dot_product_attention(q, k, v, {more})"
    d.call.setup.append(
        "def math(*args, **more):\n"
        "    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):\n"
        "        return F.scaled_dot_product_attention(*args, **more)"
    )
    d.call.plain = f"math(q, k, v, {more})"
    d.call.few = True


def _kv_cache(d: Draw) -> None:
    batch, (heads, key_heads), dim = d.size(1, 3), _heads(d), d.size(1, 100)
    new, capacity = d.size(1, 10), d.size(11, 300)
    d.call.grad = False
    d.tensor("q", (batch, heads, new, dim))
    for name, rows in (("k", new), ("v", new), ("key_cache", capacity), ("value_cache", capacity)):
        d.tensor(name, (batch, key_heads, rows, dim))
    d.integers("lengths", 0, capacity - new + 1, (batch,))
    more = []
    if d.chance(0.3):
        more.append(f"window=({d.rng.choice((3, 2**62))}, None)")
    if d.chance(0.3):
        more.append("softcap=5.0")
    if d.chance(0.3):
        d.tensor("table", (8, heads), dtype=d.parameter_dtype())
        more.append("relative_bias=tf.RelativeBias(table, 40, False)")
    more = ", ".join(["", *more])
    d.call.ours = f"tf.kv_cache_attention(q, k, v, key_cache.clone(), value_cache.clone(), lengths{more})"


def _rotary_append(d: Draw) -> None:
    batch, (heads, key_heads), dim = d.size(1, 3), _heads(d), d.size(2, 100)
    new, capacity = d.size(1, 5), d.size(6, 40)
    d.call.grad = False
    d.tensor("q", (batch, heads, new, dim))
    for name, rows in (("k", new), ("v", new), ("key_cache", capacity), ("value_cache", capacity)):
        d.tensor(name, (batch, key_heads, rows, dim))
    d.integers("lengths", 0, capacity - new + 1, (batch,))
    columns = d.size(1, dim // 2)
    for name in ("cos", "sin"):
        d.other(name, "torch.rand({n})", (capacity, columns), d.parameter_dtype())
    positions = d.integers("positions", 0, capacity, (batch, new)) if d.chance() else "None"
    weights = [d.maybe(name, (dim,)) for name in ("query_weight", "key_weight")]
    d.call.setup.append(
        "def append(q, k, v, keys, values, **more):\n"
        f"    q = tf.rotary_cache_append(q, k, v, keys, values, lengths, cos, sin, {positions}, **more)\n"
        "    return q, keys, values"
    )
    d.call.ours = (
        f"append(q, k, v, key_cache.clone(), value_cache.clone(), query_weight={weights[0]}, key_weight={weights[1]}, "
        f"interleaved={d.chance()})"
    )


def _multi_head(d: Draw) -> None:
    batch, queries, keys, heads, dim = d.size(1, 3), d.size(1, 30), d.size(1, 30), d.size(1, 4), d.size(1, 20)
    e = heads * dim
    d.tensor("q", (batch, queries, e))
    others = d.rng.choice(("None, None", "k, None", "k, v"))
    for name in ("k", "v"):
        if name in others:
            d.tensor(name, (batch, keys, e))
    d.tensor("w", (3 * e, e), scale=0.2, expand=())
    bias = d.maybe("b", (3 * e,))
    d.tensor("o", (e, e), scale=0.2, expand=())
    out = d.maybe("c", (e,))
    d.call.ours = (
        f"tf.multi_head_attention(q, {others}, {heads}, w, {bias}, o, {out}, is_causal={d.chance()}, "
        f"dropout_p={d.rng.choice((0.0, 0.2))})"
    )
    d.call.few = True


def _probabilities(d: Draw) -> None:
    batch, (heads, key_heads), queries, keys, dim = d.size(1, 3), _heads(d), d.size(1, 40), d.size(1, 60), d.size(1, 70)
    d.tensor("q", (batch, heads, queries, dim), scale=d.rng.choice((1.0, 4.0)))
    d.tensor("k", (batch, key_heads, keys, dim))
    more = [m for m in _scores(d, batch, heads, queries, keys) if not m.startswith(("dropout_p", "return_lse"))]
    if d.chance(0.3):
        d.integers("lengths", 0, keys + 1, (batch,))
        more.append("key_lengths=lengths")
    more = ", ".join(["", *more])
    chosen = d.rng.choice(("", f", heads=[{heads - 1}]"))
    lse = f"tf.scaled_dot_product_attention(q, k, k, enable_gqa=True, return_lse=True{more})[1]"
    d.call.ours = f"tf.attention_probabilities(q, k, {lse}{more}{chosen})"
    d.call.plain = f"_soft(q, k{more}{chosen})"
    d.call.setup.append(
        "def _soft(q, k, heads=None, **more):\n"
        "    one = torch.eye(k.shape[2], dtype=q.dtype).expand(*k.shape[:2], -1, -1)\n"
        "    with tf.backend('eager'):\n"
        "        out = tf.scaled_dot_product_attention(q, k, one, enable_gqa=True, **more)\n"
        "    return out if heads is None else out[:, heads]"
    )
    d.call.few = True


def _rotary(d: Draw) -> None:
    tokens, heads, dim = d.size(1, 20), d.size(1, 4), d.size(2, 100)
    unpadded = d.chance()
    leading = (tokens,) if unpadded else (d.size(1, 3), tokens)
    d.tensor("x", (*leading, heads, dim))
    columns, rows = d.size(1, dim // 2), tokens + d.size(0, 9)
    for name in ("cos", "sin"):
        d.other(name, "torch.rand({n})", (rows, columns), d.parameter_dtype())
    positions = "None"
    if d.chance():
        positions = d.integers("positions", 0, rows, leading if d.chance() else (tokens,))
    d.call.ours = f"tf.rotary_embedding(x, cos, sin, {positions}, interleaved={d.chance()}, inverse={d.chance()})"


def _step(d: Draw) -> None:
    batch, width = d.size(1, 9), d.size(1, 70)
    d.call.setup.append("from transformer_fast.ops.step_weight import gru_step, lstm_step")
    if d.chance():
        d.tensor("g", (batch, 3 * width))
        d.tensor("p", (batch, 3 * width))
        d.tensor("h", (batch, width))
        d.call.setup.append(
            "def step(g, p, h):\n"
            "    (r, z, n), (a, b, c) = g.chunk(3, -1), p.chunk(3, -1)\n"
            "    z = torch.sigmoid(z + b)\n"
            "    return (1 - z) * torch.tanh(n + torch.sigmoid(r + a) * c) + z * h"
        )
        d.call.ours, d.call.plain = "gru_step(g, p, h)", "step(g, p, h)"
        return
    d.tensor("g", (batch, 4 * width))
    d.tensor("m", (batch, width))
    d.call.setup.append(
        "def step(g, m):\n"
        "    i, f, n, o = g.chunk(4, -1)\n"
        "    m = torch.sigmoid(f) * m + torch.sigmoid(i) * torch.tanh(n)\n"
        "    return torch.sigmoid(o) * torch.tanh(m), m"
    )
    d.call.ours, d.call.plain = "lstm_step(g, m)", "step(g, m)"


def _recurrent_decoder(d: Draw) -> None:
    """A step of a recurrent decoder, without gradients, because with them it runs in plain PyTorch."""
    rows, layers, width, embedding, size = d.size(1, 20), d.size(1, 2), d.size(1, 70), d.size(1, 40), d.size(1, 40)
    vocabulary, sources, keys = d.size(1, 100), d.size(1, 5), d.size(1, 40)
    lstm, maxout, source = d.chance(), d.chance(), d.chance(0.8)
    feed = source and not maxout and d.chance()
    gates, beside = (4 if lstm else 3) * width, width if source and maxout else size if feed else 0
    d.call.grad = False
    ids = d.integers("ids", 0, vocabulary, (rows,))
    d.tensor("token", (vocabulary, embedding))
    cells = []
    for i in range(layers):
        names = [d.tensor(f"w{i}", (gates, width if i else embedding + beside), scale=0.3)]
        names.append(d.tensor(f"u{i}", (gates, width), scale=0.3))
        names += [d.maybe(f"{name}{i}", (gates,)) for name in "bc"]
        cells.append(f"({', '.join(names)})")
    d.tensor("head", (vocabulary, size if source else width))
    d.tensor("hidden", (layers, rows, width))
    memory = d.tensor("memory", (layers, rows, width)) if lstm else "None"
    more = [f"head_bias={d.maybe('head_bias', (vocabulary,))}"]
    if source:
        score = d.rng.choice(("given", "product", "bare", "additive"))
        length, inner = 1 if score == "given" else keys, d.size(1, 50) if score == "additive" else width
        d.tensor("values", (sources, length, width))
        d.tensor("readout", (2 * size, 2 * width + embedding) if maxout else (size, 2 * width), scale=0.3)
        bias = d.maybe("readout_bias", (2 * size if maxout else size,))
        index = d.integers("sources", 0, sources, (rows,))
        more.append(f"values=values, readout=readout, readout_bias={bias}, sources={index}, maxout={maxout}")
        if score != "given":
            d.tensor("keys", (sources, length, inner), scale=0.3)
            more.append("keys=keys")
            if d.chance():
                d.other("mask", "(torch.rand({n}) > 0.3)", (sources, length), "torch.bool")
                more.append("mask=mask")
        if score in ("product", "additive"):
            more.append(f"query={d.tensor('query', (inner, width), scale=0.3)}")
        if score == "additive":
            more.append(f"score_weight={d.tensor('score_weight', (inner,))}")
        if feed:
            more.append(f"feed={d.tensor('feed', (rows, size))}")
    call = f"tf.ops.recurrent_step({ids}, token, [{', '.join(cells)}], head, hidden, {memory}, {', '.join(more)})"
    d.call.ours = f"tuple(t for t in {call} if t is not None)"


OPS = {
    "additive_attention": _additive,
    "attention": _attention,
    "attention_probabilities": _probabilities,
    "attention_shapes": _shapes,
    "bias_activation": _bias_activation,
    "cross_entropy": _cross_entropy,
    "dropout": _dropout,
    "kv_cache_attention": _kv_cache,
    "linear": _linear,
    "linear_cross_entropy": _linear_cross_entropy,
    "multi_head_attention": _multi_head,
    "norm": _norm,
    "to_panels": _to_panels,
    "projections": _projections,
    "qkv_attention": _qkv,
    "recurrence": _recurrence,
    "recurrent_decoder": _recurrent_decoder,
    "recurrent_step": _step,
    "rotary_cache_append": _rotary_append,
    "rotary_embedding": _rotary,
    "varlen_attention": _varlen,
    **fuzz_decoders.OPS,
    **fuzz_embeddings.OPS,
    **fuzz_int8.OPS,
}


def draw(op: str, rng: random.Random, layouts: float = 0.5) -> Call:
    """Draw a call of `op`. layouts: the fraction of tensors that are not contiguous."""
    d = Draw(rng, layouts)
    OPS[op](d)
    return d.call
