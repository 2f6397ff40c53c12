"""Draws calls of the embeddings for fuzz_calls."""

from fuzz_draw import Draw


def _token_embedding(d: Draw) -> None:
    entries = d.size(1, 30)
    d.integers("ids", 0, entries, (d.size(0, 5), d.size(1, 12)))
    d.tensor("word", (entries, d.size(1, 200)))
    padding = d.rng.choice((None, 0, -1))
    d.call.ours = f"tf.ops.embedding(ids, word, {padding})"
    d.call.plain = f"F.embedding(ids.long(), word, {padding})"


def _embedding(d: Draw) -> None:
    width, entries = d.size(2, 200), d.size(1, 30)
    shape = (d.size(1, 5), d.size(1, 12))
    d.integers("ids", 0, entries, shape)
    d.tensor("word", (entries, width))
    arguments = ["ids", "word"]
    for name in ("position", "kind"):
        if d.chance(0.7):
            n = d.size(1, 20)
            d.integers(f"{name}_ids", 0, n, shape if d.chance() else (1, shape[1]))
            arguments += [f"{name}_ids", d.tensor(name, (n, width))]
        else:
            arguments += ["None", "None"]
    dtype = d.parameter_dtype()
    arguments += [d.maybe("w", (width,), dtype=dtype), d.maybe("b", (width,), dtype=dtype), "1e-5"]
    padding = d.rng.choice((None, 0, -1))
    p = d.rng.choice((0.0, 0.2))
    d.call.ours = f"tf.embedding_layer_norm({', '.join(arguments)}, dropout_p={p}, padding_idx={padding})"
    if width < 8:  # the norm of so few elements is almost constant: gradients are rounding noise
        d.call.grad = False


OPS = {"embedding": _token_embedding, "embedding_layer_norm": _embedding}
