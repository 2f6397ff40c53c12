"""Drawn native decoding steps: small decoders with any options, padding, beams and a moved cache, compared with whole
rows in plain PyTorch. The printed programs import this file, so tests/ must be on the path."""

import torch
from fuzz_draw import ACTIVATIONS, Draw
from native_decoders import POSITIONS, VOCABULARY, Decoder, make_cache, round_weights, walk
from torch import nn

from transformer_fast.ops.decoder_step import DecoderCache


class Rows:
    """Rows that a decoder decodes column by column. At column `turn` row r continues from row index[r], with other
    tokens after it. moved: the keys and values are copied to a new cache there.

    mask: the padding of the columns: None, "left", or "any". storage: dtype of the weight copies, which represents the
    weights exactly; "in place": no copies.
    """

    def __init__(self, token, dtype, options, rows, length, turn, index, mask, storage, capacity, moved, sources):
        self.model = Decoder(width=token.shape[1], **options).to(dtype).eval()
        self.storage, self.copy = (None, False) if storage == "in place" else (storage, True)
        self.turn, self.index, self.capacity, self.moved = turn, torch.tensor(index), capacity, moved
        self.model.token.weight.data.copy_(token)
        if self.storage in (torch.bfloat16, torch.int8):
            round_weights(self.model, self.storage)
        ids, later = torch.randint(VOCABULARY, (rows, length)), torch.randint(VOCABULARY, (rows, length))
        keep = None
        if mask == "left":
            keep = torch.arange(length) >= torch.randint(length, (rows, 1))
        elif mask == "any":
            keep = torch.rand(rows, length) > 0.3
        self.before = ids, keep
        self.after = self._turned(ids, later), None if keep is None else self._turned(keep, keep)
        self.kept = None  # mask of the encoder's states
        if sources is not None:
            self.kept = torch.rand(rows, sources) > 0.3
            self.kept[:, -1] = True

    def _turned(self, before, after):
        return torch.cat([before[self.index, : self.turn], after[: len(self.index), self.turn :]], 1)

    def _positions(self, mask) -> torch.Tensor | None:
        return None if mask is None else (mask.cumsum(1) - 1).clamp(min=0)

    def _with(self, token) -> Decoder:
        model = self.model.to_copy(token.dtype)
        weight = token.detach()
        if self.storage in (torch.bfloat16, torch.int8):
            weight = model.token.weight.detach()
        model.token.weight = model.head.weight = nn.Parameter(weight)
        return model

    @torch.no_grad()
    def ours(self, token, states=None) -> tuple[torch.Tensor, ...]:
        model = self._with(token)
        (ids, mask), (later, later_mask) = self.before, self.after
        more = {} if states is None else {"states": states, "states_mask": self.kept}
        cache = make_cache(model, ids, storage=self.storage, copy=self.copy, capacity=self.capacity, **more)
        first = walk(model, cache, ids[:, : self.turn], mask, self._positions(mask))
        cache.reorder(self.index)
        if self.moved:
            cache = self._move(cache, later_mask)
        return first, walk(model, cache, later, later_mask, self._positions(later_mask))

    def _move(self, old: DecoderCache, mask) -> DecoderCache:
        shape = None if old.cross_shape is None else (len(self.index), old.cross_shape[1])
        new = DecoderCache(old.weights, len(self.index), 1, shape)
        for i, pair in enumerate(old.gather()):
            new.load(i, *pair)
            if shape is not None:
                new.load_cross(i, *(t[i, old.sources[: old.live].long()] for t in (old.cross_keys, old.cross_values)))
        if shape is not None:
            new.cross_lengths.copy_(old.cross_lengths[old.sources[: old.live].long()])
            new.sources.copy_(torch.arange(len(self.index)))
        every = torch.ones(len(self.index), self.turn, dtype=torch.bool)
        new.attend(torch.arange(len(self.index)), every if mask is None else mask[:, : self.turn])
        return new

    @torch.no_grad()
    def plain(self, token, states=None) -> tuple[torch.Tensor, ...]:
        model = self._with(token)
        (ids, mask), (later, later_mask) = self.before, self.after
        states = None if states is None else states.contiguous()  # Conv1D takes views
        first = model(ids, mask, self._positions(mask), states, self.kept)[:, : self.turn]
        states = None if states is None else states[self.index]
        kept = None if self.kept is None else self.kept[self.index]
        return first, model(later, later_mask, self._positions(later_mask), states, kept)[:, self.turn :]


def _options(d: Draw) -> dict:
    rng, heads, head_dim, layers = d.rng, d.rng.choice((1, 2, 3, 4)), d.size(1, 70), d.rng.choice((1, 2, 2))
    pre, cross = d.chance(0.7), d.chance(0.4)
    parallel = pre and not cross and d.chance(0.3)
    options = {
        "heads": heads, "head_dim": head_dim, "inner": d.size(1, 100), "layers": layers, "pre_norm": pre,
        "rms": d.chance(0.4), "bias": d.chance(0.7), "fused": d.chance(0.4), "transposed": d.chance(0.3),
        "gated": d.chance(0.4), "activation": rng.choice(ACTIVATIONS), "positions": d.chance(), "cross": cross,
        "relative": d.chance(0.3), "embedding_norm": d.chance(0.3), "final_norm": not pre or d.chance(0.9),
        "embed_scale": rng.choice((1.0, 3.5)), "head_scale": rng.choice((1.0, 0.2)), "head_bias": d.chance(0.3),
        "scale": rng.choice((None, None, 0.3, 1.0)), "scale_by_layer": d.chance(0.2), "parallel": parallel,
        "head_norms": head_dim >= 8 and d.chance(0.3), "after_norms": pre and not parallel and d.chance(0.2),
        "softcap": 0.0 if cross else rng.choice((0.0, 0.0, 0.5, 5.0)), "logits_softcap": rng.choice((0.0, 0.0, 0.7)),
    }  # fmt: skip
    if not cross:
        options["key_heads"] = rng.choice([n for n in range(1, heads + 1) if heads % n == 0])
    options["by_head"] = options["fused"] and options.get("key_heads", heads) == heads and d.chance()
    if head_dim > 1 and d.chance():
        options |= {"rotary": rng.randint(1, head_dim // 2), "interleaved": d.chance()}
    if d.chance(0.4):
        options["windows"] = tuple(rng.choice((None, 1, 3, 17)) for _ in range(layers))
    return options


def step(d: Draw) -> None:
    rng, width, rows, length = d.rng, d.size(8, 70), d.rng.randint(1, 9), d.size(2, POSITIONS - 7)
    dtype = rng.choice(("torch.float32", "torch.float32", "torch.bfloat16"))
    options, turn = _options(d), d.rng.randint(1, length - 1)
    sources = d.size(1, 20) if options["cross"] else None
    index = [rng.randrange(rows) for _ in range(rng.randint(1, rows))]
    storage = rng.choice(("None", "'in place'", "torch.float32", "torch.bfloat16", "torch.int8"))
    mask, capacity = rng.choice((None, None, "left", "any")), rng.choice((1, 2, length))
    d.call.grad = False
    names = [d.tensor("token", (VOCABULARY, width), dtype=dtype, expand=())]
    if sources is not None:
        names.append(d.tensor("states", (rows, sources, width), dtype=dtype))
    d.call.setup.append("from fuzz_decoders import Rows")
    d.call.setup.append(
        f"rows = Rows(token, {dtype}, {options!r}, {rows}, {length}, {turn}, {index}, {mask!r}, {storage}, {capacity}, "
        f"{d.chance(0.3)}, {sources})"
    )
    d.call.ours, d.call.plain = f"rows.ours({', '.join(names)})", f"rows.plain({', '.join(names)})"


OPS = {"decoder_step": step}
