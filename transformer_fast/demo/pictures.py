"""Pictures: attention of chosen heads, times, sinusoidal positions."""

import pathlib

import matplotlib
import torch

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from ..benchmarks.timing import Timing
from ..layers import sinusoids

__all__ = ["attention_picture", "choose_heads", "positions_picture", "timing_picture"]

COLOURS = {"transformer_fast": "#c0392b"}


def choose_heads(attentions: tuple[torch.Tensor, ...]) -> list[int]:
    """Per layer, the head with the most attention between different words, not to [CLS], [SEP] or the word itself."""
    chosen = []
    for layer in attentions:
        inner = layer[0, :, 1:-1, 1:-1]
        between = inner.sum((-1, -2)) - inner.diagonal(dim1=-2, dim2=-1).sum(-1)
        chosen.append(int(between.argmax()))
    return chosen


def attention_picture(model, tokenizer, sentence: str, path: pathlib.Path) -> pathlib.Path:
    """One heatmap per layer: row i shows the attention of token i."""
    encoded = tokenizer(sentence, return_tensors="pt")
    with torch.inference_mode():
        attentions = model(**encoded, output_attentions=True).attentions
    tokens = tokenizer.convert_ids_to_tokens(encoded["input_ids"][0].tolist())
    columns = (len(attentions) + 1) // 2
    figure, grid = plt.subplots(2, columns, figsize=(4.2 * columns, 8), squeeze=False, layout="constrained")
    for axes in grid.flat[len(attentions) :]:
        axes.axis("off")
    for number, (layer, head) in enumerate(zip(attentions, choose_heads(attentions))):
        axes = grid.flat[number]
        image = axes.imshow(layer[0, head].float().numpy(), cmap="magma", vmin=0.0, vmax=1.0)
        axes.set_xticks(range(len(tokens)), tokens, rotation=90, fontsize=8)
        axes.set_yticks(range(len(tokens)), tokens, fontsize=8)
        axes.set_title(f"layer {number}, head {head}", fontsize=10)  # from 0, as attentions[layer][:, head]
    figure.colorbar(image, ax=grid, shrink=0.6, label="attention")
    figure.suptitle(sentence)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def timing_picture(timings: dict[str, Timing], lengths: list[int], padded: int, path: pathlib.Path) -> pathlib.Path:
    """Left: seconds for all sentences, whiskers p20 to p80. Right: the lengths of the sentences."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.8), layout="constrained")
    names = [name.strip() for name in timings]
    medians = [timing.median for timing in timings.values()]
    spread = [
        [t.median - t.p20 for t in timings.values()],
        [t.p80 - t.median for t in timings.values()],
    ]
    left.barh(names, medians, xerr=spread, color=[COLOURS.get(name, "#34495e") for name in names])
    left.invert_yaxis()
    left.set_xlabel("seconds for all sentences (median of the passes)")
    for name, median in zip(names, medians):
        left.text(0.02 * max(medians), name, f"{median:.2f} s", va="center", color="white", fontweight="bold")
    right.hist(lengths, bins=range(0, max(lengths) + 5, 4), color="#34495e")
    right.set_xlabel("tokens in a sentence")
    right.set_ylabel("sentences")
    right.set_title(f"{sum(lengths):,} real tokens; padded in batches they are {padded:,}", fontsize=10)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def positions_picture(count: int, width: int, path: pathlib.Path) -> pathlib.Path:
    """Left: sinusoids, one row per position. Right: dot products of all rows with the first, the middle and the last
    one, relative to the largest."""
    table = sinusoids(torch.arange(count), width)
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    image = left.imshow(table.numpy(), cmap="RdBu", vmin=-1.0, vmax=1.0, aspect="auto", interpolation="nearest")
    left.set_xlabel("dimension")
    left.set_ylabel("position")
    figure.colorbar(image, ax=left, label="PE(position, dimension)")
    alike = table @ table.T / (width / 2)
    for position in (0, count // 2, count - 1):
        right.plot(alike[position].numpy(), label=f"from position {position}")
    right.set_xlabel("position")
    right.set_ylabel("product of the two rows / (width / 2)")
    right.legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path
