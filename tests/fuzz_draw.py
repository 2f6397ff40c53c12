"""A drawn call as source text, and the functions that draw its tensors."""

import random
from dataclasses import dataclass, field

from transformer_fast.backends import native

DTYPES = ("torch.float32", "torch.bfloat16", "torch.float16")
ISAS = [] if native.load() else native.supported_isas()  # the instruction sets to draw from
ACTIVATIONS = ("gelu", "gelu_tanh", "relu", "silu")


@dataclass
class Call:
    """ours, plain: expressions of `tensors`; plain None means ours on the eager backend. wanted: tensors that get a
    gradient. few: the softmax has so few keys that its gradients are rounding noise."""

    tensors: dict[str, str] = field(default_factory=dict)
    setup: list[str] = field(default_factory=list)
    ours: str = ""
    plain: str | None = None
    wanted: list[str] = field(default_factory=list)
    grad: bool = True
    few: bool = False
    isa: str = ""


class Draw:
    def __init__(self, rng: random.Random, layouts: float = 0.5):
        self.rng, self.layouts, self.call = rng, layouts, Call()
        self.dtype = rng.choice(DTYPES)
        self.call.grad = rng.random() < 0.8
        self.call.isa = rng.choice(ISAS) if ISAS else ""

    def chance(self, p: float = 0.5) -> bool:
        return self.rng.random() < p

    def size(self, low: int, high: int) -> int:
        """A size; small sizes and those next to full vectors and tiles are as likely as all others together."""
        near = [n for base in (1, 4, 8, 16, 32, 64, 128, 256) for n in (base - 1, base, base + 1) if low <= n <= high]
        return self.rng.choice(near) if near and self.chance() else self.rng.randint(low, high)

    def shape(self, *last: int) -> tuple[int, ...]:
        """A shape with a few leading dimensions, one of which is sometimes 0."""
        leading = [self.size(1, 9) for _ in range(self.rng.randint(0, 3))]
        if leading and self.chance(0.05):
            leading[0] = 0
        return (*leading, *last)

    def layout(self, shape: tuple[int, ...], expand=()) -> tuple[tuple[int, ...], int, int]:
        """Strides, offset and size of the storage: dimensions are permuted, padded and stepped, and one of `expand` is
        expanded."""
        rng, strides, step = self.rng, [0] * len(shape), 1
        order = list(range(len(shape)))[::-1]
        odd = self.chance(self.layouts)
        expanded = rng.choice(expand) if odd and expand and self.chance(0.3) else None
        if odd and self.chance():
            rng.shuffle(order)
        if odd and self.chance(0.3):
            step = rng.choice((2, 3))
        for i in order:
            if shape[i] == 1 and odd:
                strides[i] = rng.choice((0, 1, 3, 7, 1000))
                continue
            if i == expanded:
                continue
            strides[i] = step
            step *= max(shape[i], 1)
            if odd and self.chance(0.3):
                step += rng.choice((1, 2, 5, 16))
        offset = rng.choice((1, 3, 8)) if odd else 0
        reach = sum((n - 1) * s for n, s in zip(shape, strides)) if 0 not in shape else 0
        return tuple(strides), offset, offset + reach + 1

    def tensor(self, name, shape, dtype: str | None = None, scale: float = 1.0, shift: float = 0.0, expand=(0,)):
        strides, offset, storage = self.layout(tuple(shape), expand)
        scaled = "" if scale == 1.0 else f".mul({scale})"
        scaled += "" if shift == 0.0 else f".add({shift})"
        self.call.tensors[name] = (
            f"torch.randn({storage}){scaled}.to({dtype or self.dtype}).as_strided({tuple(shape)}, {strides}, {offset})"
        )
        if self.chance(0.85):
            self.call.wanted.append(name)
        return name

    def other(self, name: str, expression: str, shape, kind: str):
        """A tensor without gradient. expression: source that makes {n} values. kind: its dtype."""
        strides, offset, storage = self.layout(tuple(shape))
        source = expression.format(n=storage)
        self.call.setup.append(f"{name} = {source}.to({kind}).as_strided({tuple(shape)}, {strides}, {offset})")
        return name

    def integers(self, name: str, low: int, high: int, shape):
        return self.other(name, f"torch.randint({low}, {max(high, low + 1)}, ({{n}},))", shape,
                          self.rng.choice(("torch.int64", "torch.int32")))  # fmt: skip

    def parameter_dtype(self) -> str:
        return self.rng.choice((self.dtype, self.dtype, "torch.float32"))

    def maybe(self, name: str, shape, **more) -> str:
        return self.tensor(name, shape, **more) if self.chance(0.7) else "None"
