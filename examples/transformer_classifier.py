"""A transformer from scratch, with Keras-style attention: one block, global average pooling, and a classifier.

    python examples/transformer_classifier.py
    torchrun --nproc-per-node 2 examples/transformer_classifier.py

Word embeddings and sinusoidal positions are added; the block is `layers.MultiHeadAttention` and a feed-forward layer,
each with a residual and a norm; a small classifier reads the mean of its tokens. It is trained on two thirds of
data/reviews.tsv, 300 sentences made from phrases, and evaluated on the others, in seconds. Saved: pictures of the
learning curve, of the heads' attention in the first held-out review, and of the sinusoids.
"""

import argparse
import csv
import pathlib
import re
from typing import NamedTuple

import matplotlib
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import transformer_fast as tf
from transformer_fast.demo.arguments import argument_parser
from transformer_fast.demo.pictures import positions_picture
from transformer_fast.demo.training import Training

matplotlib.use("Agg")
import matplotlib.pyplot as plt

DATA = pathlib.Path(__file__).resolve().parent / "data" / "reviews.tsv"
LABELS = ["negative", "positive"]
PAD, UNKNOWN = 0, 1


class Judged(NamedTuple):
    logits: torch.Tensor  # (B, 2)
    weights: torch.Tensor  # of attention, (B, heads, T, T)
    loss: torch.Tensor | None


class Classifier(nn.Module):
    def __init__(self, words: int, size: int, heads: int, dropout: float):
        super().__init__()
        self.embedding = nn.Embedding(words, size, padding_idx=PAD)
        self.attention = tf.layers.MultiHeadAttention(heads, size // heads, dropout=dropout)
        self.attention.build((size,), (size,))
        self.feed_forward = nn.Sequential(nn.Linear(size, 2 * size), nn.ReLU(), nn.Linear(2 * size, size))
        self.norms = nn.ModuleList([nn.LayerNorm(size), nn.LayerNorm(size)])
        self.head = nn.Sequential(nn.Dropout(dropout), nn.Linear(size, 20), nn.ReLU(), nn.Linear(20, len(LABELS)))
        self.checkpointing = False

    def gradient_checkpointing_enable(self) -> None:
        """Keep no activations of the block: backward recomputes them."""
        self.checkpointing = True

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor | None = None) -> Judged:
        """input_ids: (B, T); labels: (B,)."""
        tokens = input_ids != PAD
        x = self.embedding(input_ids)
        positions = torch.arange(input_ids.shape[1], device=x.device)
        x = x * x.shape[-1] ** 0.5 + tf.sinusoids(positions, x.shape[-1])
        if self.checkpointing and self.training:
            x, weights = checkpoint(self.block, x, tokens, use_reentrant=False)
        else:
            x, weights = self.block(x, tokens)
        pooled = x.masked_fill(~tokens[..., None], 0.0).sum(1) / tokens.sum(1, keepdim=True)  # global average
        logits = self.head(pooled)
        return Judged(logits, weights, None if labels is None else tf.cross_entropy(logits, labels))

    def block(self, x: torch.Tensor, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        attended, weights = self.attention(x, x, value_mask=tokens, return_attention_scores=True)
        x = self.norms[0](x + attended)
        return self.norms[1](x + self.feed_forward(x)), weights


def split(text: str) -> list[str]:
    return re.findall(r"[a-z']+|[^a-z\s]", text.lower())


def read(path: pathlib.Path) -> list[tuple[list[str], int]]:
    with path.open(encoding="utf-8") as file:
        return [(split(row["text"]), LABELS.index(row["label"])) for row in csv.DictReader(file, delimiter="\t")]


def encode(rows: list[tuple[list[str], int]], known: dict[str, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids (B, T), padded on the right, labels (B,))."""
    ids = [torch.tensor([known.get(word, UNKNOWN) for word in words]) for words, _ in rows]
    padded = nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=PAD)
    return padded, torch.tensor([label for _, label in rows])


def train(model, ids, labels, held_out, arguments: argparse.Namespace) -> Training:
    """Train; evaluate the held-out reviews before training and after each epoch."""
    training = Training(
        model, arguments, lambda weights: torch.optim.AdamW(weights, lr=arguments.lr), seed=arguments.seed
    )
    held_out = [t.to(training.device) for t in held_out]
    score = training.check(lambda: judge(model, *held_out))
    shuffled = torch.Generator().manual_seed(arguments.seed)
    epoch = -(-len(ids) // arguments.batch_size)  # steps
    for step, bar in training.steps(epoch * arguments.epochs, "training"):
        if step % epoch == 0:
            batches = torch.randperm(len(ids), generator=shuffled).split(arguments.batch_size)
        rows = batches[step % epoch]
        loss = training.step({"input_ids": ids[rows], "labels": labels[rows]})
        if (step + 1) % epoch == 0:
            score = training.check(lambda: judge(model, *held_out))
        bar.set_postfix(loss=f"{loss:.3f}", accuracy=f"{score:.1%}")
        training.save_if_due()
    return training


@torch.no_grad()
def judge(model, ids, labels) -> float:
    return (model.eval()(ids).logits.argmax(-1) == labels).float().mean().item()


def draw_curve(losses: list[float], scores: list[float], path: pathlib.Path) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    left.plot(losses, color="#c0392b")
    left.set_xlabel("step")
    left.set_ylabel("cross entropy")
    right.plot(scores, "o-", color="#34495e")
    right.set_xlabel("epoch")
    right.set_ylabel("accuracy, held-out reviews")
    right.set_ylim(0, 1.05)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_heads(words: list[str], weights: torch.Tensor, path: pathlib.Path) -> None:
    figure, grid = plt.subplots(1, len(weights), figsize=(4 * len(weights), 4.5), squeeze=False, layout="constrained")
    for number, (axes, head) in enumerate(zip(grid[0], weights)):
        axes.imshow(head.numpy(), cmap="magma", vmin=0.0)
        axes.set_xticks(range(len(words)), words, rotation=90, fontsize=8)
        axes.set_yticks(range(len(words)), words, fontsize=8)
        axes.set_title(f"head {number}", fontsize=10)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argument_parser(__doc__, "transformer_classifier", training=True)
    parser.add_argument("--size", type=int, default=32, help="width of the model")
    parser.add_argument("--heads", type=int, default=2, help="of attention")
    parser.add_argument("--dropout", type=float, default=0.1, help="of attention weights and before the classifier")
    parser.add_argument("--epochs", type=int, default=12, help="passes over the training reviews")
    parser.add_argument("--batch-size", type=int, default=16, help="reviews per step")
    parser.add_argument("--lr", type=float, default=2e-3, help="learning rate")
    parser.add_argument("--seed", type=int, default=0, help="of everything random")
    return parser.parse_args(arguments)


def main(arguments: argparse.Namespace) -> tuple[float, float] | None:
    """Accuracy on the held-out reviews before and after; None in processes other than the first."""
    torch.manual_seed(arguments.seed)
    arguments.output.mkdir(parents=True, exist_ok=True)
    rows = read(DATA)
    cut = 2 * len(rows) // 3
    known = {word: i + 2 for i, word in enumerate(sorted({word for words, _ in rows[:cut] for word in words}))}
    model = Classifier(len(known) + 2, arguments.size, arguments.heads, arguments.dropout)
    count = sum(p.numel() for p in model.parameters())
    print(f"{count:,} parameters learn from {cut} reviews of {len(known)} different words")
    held_out = encode(rows[cut:], known)
    training = train(model, *encode(rows[:cut], known), held_out, arguments)
    with torch.no_grad():  # in all processes: the model may be sharded
        first = encode(rows[cut : cut + 1], known)[0].to(training.device)
        weights = model.eval()(first).weights[0].cpu()
    losses, scores = training.losses, list(training.checked.values())
    if not training.finish():
        return None
    print(f"accuracy on {len(rows) - cut} held-out reviews: {scores[0]:.1%} -> {scores[-1]:.1%}")
    names = ("learning_curve.png", "heads.png", "positions.png")
    curve, heads, positions = (arguments.output / name for name in names)
    draw_curve(losses, scores, curve)
    draw_heads(rows[cut][0], weights, heads)
    positions_picture(64, 128, positions)
    print(f"saved {curve}, {heads} and {positions}")
    return scores[0], scores[-1]


if __name__ == "__main__":
    main(parse())
