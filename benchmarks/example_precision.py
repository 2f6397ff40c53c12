"""What bf16 and int8 cost the models that the examples train: their accuracy on the same held-out data.

    python benchmarks/example_precision.py [--models FOLDER] [--only PATTERN]

Each example runs as users run it and saves its model, unless FOLDER has it already. The model is then judged in
float32, bf16 and int8. Writes benchmarks/results/examples/<date>-<commit>-precision.csv. All of it takes about 15
minutes of processor time.
"""

import argparse
import csv
import datetime
import fnmatch
import functools
import importlib
import pathlib
import random
import sys
import tempfile
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import transformers
from transformer_fast.benchmarks import results

import transformer_fast as tf

ROOT = pathlib.Path(__file__).resolve().parent.parent
PRECISIONS = ("float32", "bf16", "int8")
DATES = 1000  # held-out dates to translate

Judge = Callable[[Any, pathlib.Path, str], tuple[float, int]]


class Work(NamedTuple):
    """model: the folder of the trained model in the example's output. judge(example, folder, precision): the share of
    right answers, and of how many."""

    example: str
    measure: str
    model: str
    judge: Judge


def loaded(auto, folder: pathlib.Path, precision: str):
    """The model of a folder, in inference mode."""
    return in_precision(auto.from_pretrained(folder).eval(), precision)


def in_precision(model, precision: str):
    return model if precision == "float32" else tf.quantize(model, precision)


def right(found: torch.Tensor, labels: torch.Tensor) -> tuple[float, int]:
    """The share of equal elements where there is a label, and the number of labels."""
    known = labels != -100
    return (found == labels)[known].float().mean().item(), int(known.sum())


@torch.no_grad()
def classified(model, batch: dict[str, torch.Tensor]) -> tuple[float, int]:
    labels = batch.pop("labels")
    return right(model(**batch).logits.argmax(-1), labels)


def reviews(example, folder: pathlib.Path, precision: str) -> tuple[float, int]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    rows = example.read(example.DATA, tokenizer)
    batch = transformers.DataCollatorWithPadding(tokenizer)(rows[2 * len(rows) // 3 :])
    return classified(loaded(tf.AutoModelForSequenceClassification, folder, precision), batch)


def tags(example, folder: pathlib.Path, precision: str) -> tuple[float, int]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    rows = [example.encode(sentence, tokenizer) for sentence in example.read(example.DATA)]
    batch = transformers.DataCollatorForTokenClassification(tokenizer)(rows[3 * len(rows) // 4 :])
    return classified(loaded(tf.AutoModelForTokenClassification, folder, precision), batch)


def answers(example, folder: pathlib.Path, precision: str, long: bool = False) -> tuple[float, int]:
    held_out = [row for row in example.read(example.DATA) if row["context_id"] % 5 == 0]
    answer = tf.pipeline("question-answering", folder, max_seq_len=example.WINDOW, doc_stride=example.STRIDE)
    answer.model = in_precision(answer.model.eval(), precision)
    whole = " ".join(dict.fromkeys(row["context"] for row in held_out))
    contexts = [whole if long else row["context"] for row in held_out]
    return example.score(answer, held_out, contexts, f"in {precision}")[0], len(held_out)


@torch.no_grad()
def next_tokens(example, folder: pathlib.Path, precision: str) -> tuple[float, int]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    batch = example.encode(example.read(example.DATA)[1], tokenizer)
    labels = batch.pop("labels")[:, 1:]
    found = loaded(tf.AutoModelForCausalLM, folder, precision)(**batch).logits[:, :-1].argmax(-1)
    return right(found, labels)


def dates(example, folder: pathlib.Path, precision: str) -> tuple[float, int]:
    pairs = example.pairs(DATES, random.Random(2), held_out=True)
    model = loaded(tf.TransformerForConditionalGeneration, folder, precision)
    return example.accuracy(model, pairs, 1), DATES


WORKS = (
    Work("finetune_classifier", "reviews classified", "model", reviews),
    Work("finetune_classifier", "reviews classified, encoder frozen", "frozen", reviews),
    Work("name_tagging", "words tagged", "model", tags),
    Work("reading_answers", "answered exactly", "model", answers),
    Work("reading_answers", "answered exactly in a long text", "model", functools.partial(answers, long=True)),
    Work("text_generation", "next tokens predicted", "model", next_tokens),
    Work("translation_from_scratch", "dates translated exactly", "transformer", dates),
)


def trained(example, name: str, models: pathlib.Path, folder: str) -> pathlib.Path:
    """The folder of the model that the example trains."""
    output = models / name
    if not (output / folder / "config.json").exists():
        print(f"== {name}: training")
        example.main(example.parse(["--output", str(output)]))
    return output / folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=pathlib.Path, help="folder of the trained models; default: a temporary one")
    parser.add_argument("--only", default="*", metavar="PATTERN", help="examples by name, * and ? allowed")
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    sys.path.insert(0, str(ROOT / "examples"))
    about, rows = results.machine("cpu"), []
    with tempfile.TemporaryDirectory() as temporary:
        models = arguments.models or pathlib.Path(temporary)
        for work in WORKS:
            if not fnmatch.fnmatch(work.example, arguments.only):
                continue
            example = importlib.import_module(work.example)
            folder = trained(example, work.example, models, work.model)
            found = {precision: work.judge(example, folder, precision) for precision in PRECISIONS}
            percent = {precision: f"{100 * share:.2f}" for precision, (share, _) in found.items()}
            lost = 100 * (found["float32"][0] - found["int8"][0])
            row = [f"{work.example}.py", work.measure, found["float32"][1], *percent.values(), f"{lost:.2f}"]
            rows.append([*row, about["cpu"], about["commit"]])
            print(f"{row[0]:28} {row[1]:36} of {row[2]:5}: " + ", ".join(f"{k} {v} %" for k, v in percent.items()))
    percents = [f"{precision}_percent" for precision in PRECISIONS]
    names = ["example", "measure", "of", *percents, "int8_loses_points", "machine", "commit"]
    file = f"{datetime.date.today()}-{about['commit'][:7]}-precision.csv"
    output = ROOT / "benchmarks" / "results" / "examples" / file
    with output.open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows([names, *rows])
    print(f"results: {output}")


if __name__ == "__main__":
    main()
