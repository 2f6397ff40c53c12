"""Train a translation model from scratch on a CPU, in minutes: dates as people write them into ISO dates.

    python examples/translation_from_scratch.py                    # the Transformer of 2017
    python examples/translation_from_scratch.py --model rnn        # the recurrent network with attention before it

The data are generated: "tuesday, the 3rd of march 1998" -> "1998-03-03", character by character. At the end, held-out
dates are translated, greedily and by beam search. Labels are smoothed, so the loss has a lower bound, which is printed
too. Saved: the model, and pictures of the learning curve and of the attention while the model writes.
"""

import argparse
import datetime
import math
import pathlib
import random

import matplotlib
import torch
from tqdm import tqdm

import transformer_fast as tf
from transformer_fast.demo.arguments import argument_parser
from transformer_fast.demo.training import Training

matplotlib.use("Agg")
import matplotlib.pyplot as plt

PAD, START, END = 0, 1, 2
ALPHABET = "abcdefghijklmnopqrstuvwxyz0123456789 ,./-"
IDS = {character: i + 3 for i, character in enumerate(ALPHABET)}
FIRST, LAST = datetime.date(1900, 1, 1).toordinal(), datetime.date(2099, 12, 31).toordinal()
HELD_OUT = 10  # every tenth date is held out
SMOOTHING = 0.1


def ordinal(day: int) -> str:
    return f"{day}{'th' if 11 <= day <= 13 else {1: 'st', 2: 'nd', 3: 'rd'}.get(day % 10, 'th')}"


def written(date: datetime.date, rng: random.Random) -> str:
    """A date as people may write it."""
    day, month, weekday = date.day, date.strftime("%B").lower(), date.strftime("%A").lower()
    if rng.random() < 0.4:
        month = month[:3]
    style = rng.randrange(5)
    if style == 0:
        text = f"{day} {month} {date.year}"
    elif style == 1:
        text = f"{month} {day}, {date.year}"
    elif style == 2:
        text = f"the {ordinal(day)} of {month} {date.year}"
    elif style == 3:
        text = f"{month} the {ordinal(day)}, {date.year}"
    else:
        text = f"{day}.{date.month}.{date.year}"
    return f"{weekday}, {text}" if rng.random() < 0.3 else text


def pairs(count: int, rng: random.Random, held_out: bool) -> list[tuple[str, str]]:
    """`count` random pairs (written date, ISO date), from the training dates or from the held-out ones."""
    found: list[tuple[str, str]] = []
    while len(found) < count:
        number = rng.randint(FIRST, LAST)
        if (number % HELD_OUT == 0) == held_out:
            date = datetime.date.fromordinal(number)
            found.append((written(date, rng), date.isoformat()))
    return found


def encode(texts: list[str], end: bool = False) -> torch.Tensor:
    """(len(texts), longest) ids, padded on the right."""
    rows = [torch.tensor([IDS[c] for c in text] + [END] * end) for text in texts]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD)


def decode(ids: torch.Tensor) -> str:
    return "".join(ALPHABET[i - 3] for i in ids.tolist() if i > END)


def batch(examples: list[tuple[str, str]]) -> dict[str, torch.Tensor]:
    source, target = encode([s for s, _ in examples]), encode([t for _, t in examples], end=True)
    return {
        "input_ids": source,
        "attention_mask": (source != PAD).long(),
        "labels": target.masked_fill(target == PAD, -100),
    }


def build(arguments: argparse.Namespace):
    ids = {"pad_token_id": PAD, "decoder_start_token_id": START, "bos_token_id": START, "eos_token_id": END}
    size, vocabulary = arguments.size, len(ALPHABET) + 3
    if arguments.model == "transformer":
        config = tf.TransformerConfig(
            vocab_size=vocabulary, d_model=size, encoder_layers=2, decoder_layers=2, num_attention_heads=4,
            ffn_dim=4 * size, norm_position=arguments.norm, dropout=arguments.dropout, label_smoothing=SMOOTHING, **ids,
        )  # fmt: skip
        return tf.TransformerForConditionalGeneration(config)
    config = tf.AttentionRNNConfig(
        vocab_size=vocabulary, embedding_size=size // 2, hidden_size=size, attention=arguments.attention,
        dropout=arguments.dropout,
        label_smoothing=SMOOTHING, **ids,
    )  # fmt: skip
    return tf.AttentionRNNForConditionalGeneration(config)


def least_loss(vocabulary: int) -> float:
    """The entropy of a smoothed label, which is the least possible cross entropy."""
    other = SMOOTHING / vocabulary
    true = 1 - SMOOTHING + other
    return -true * math.log(true) - (vocabulary - 1) * other * math.log(other)


def train(model, arguments: argparse.Namespace, rng: random.Random) -> tuple[Training, float]:
    """(training, loss of the held-out dates at the end). Held-out dates are evaluated after every tenth of the steps.
    The final weights are the mean of those after the last five twentieths, as in section 6.1 of the Transformer's
    paper."""
    if arguments.model == "transformer":  # section 5.3 of the paper
        training = Training(
            model, arguments, lambda weights: torch.optim.Adam(weights, arguments.lr or 1.0, (0.9, 0.98), 1e-9),
            lambda optimizer: tf.noam_schedule(optimizer, arguments.size, max(1, arguments.steps // 5)),
            clip=1.0, seed=arguments.seed,
        )  # fmt: skip
    else:
        training = Training(
            model, arguments, lambda weights: torch.optim.Adam(weights, arguments.lr or 2e-3),
            lambda optimizer: torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, arguments.steps),
            clip=1.0, seed=arguments.seed,
        )  # fmt: skip
    validation, held = batch(pairs(200, random.Random(1), held_out=True)), float("nan")
    validation = {name: t.to(training.device) for name, t in validation.items()}
    for step, bar in training.steps(arguments.steps, f"training the {arguments.model}"):
        loss = training.step(batch(pairs(arguments.batch_size, rng, held_out=False)))
        if (step + 1) % max(1, arguments.steps // 20) == 0 and step + 1 > 0.75 * arguments.steps:
            training.keep(average=True)
        if (step + 1) % max(1, arguments.steps // 10) == 0:
            held = training.check(lambda: judge(model, validation))
        bar.set_postfix(loss=f"{loss:.3f}", held_out=f"{held:.3f}")
        training.save_if_due()
    training.use_kept()
    return training, judge(model, validation)


@torch.no_grad()
def judge(model, examples: dict[str, torch.Tensor]) -> float:
    return model.eval()(**examples).loss.item()


def translate(model, texts: list[str], beams: int) -> list[str]:
    source = encode(texts)
    ids = model.eval().generate(
        source, attention_mask=(source != PAD).long(), num_beams=beams, max_new_tokens=12, early_stopping=beams > 1
    )
    return [decode(row) for row in ids]


def accuracy(model, examples: list[tuple[str, str]], beams: int) -> float:
    right = 0
    parts = [examples[i : i + 100] for i in range(0, len(examples), 100)]
    for part in tqdm(parts, desc=f"translating, {beams} beam{'s' * (beams > 1)}", unit="batch"):
        found = translate(model, [s for s, _ in part], beams)
        right += sum(a == t for a, (_, t) in zip(found, part))
    return right / len(examples)


def draw_learning_curve(losses: list[float], checked: dict[int, float], path: pathlib.Path) -> None:
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    axes.plot(range(1, len(losses) + 1), losses, color="#b0b8c0", linewidth=0.8, label="training, each step")
    axes.plot(list(checked), list(checked.values()), color="#c0392b", marker="o", label="held-out dates")
    floor = least_loss(len(ALPHABET) + 3)
    axes.axhline(floor, color="#2c3e50", linestyle="--", linewidth=0.8, label="least possible with smoothed labels")
    axes.set_xlabel("step")
    axes.set_ylabel("cross entropy, smoothed labels")
    axes.legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_attention(model, text: str, path: pathlib.Path) -> None:
    """One map per head of the last layer: row i is the attention while the model writes character i."""
    source = encode([text])
    target = model.eval().generate(source, max_new_tokens=12)
    with torch.no_grad():
        weights = model(source, decoder_input_ids=target[:, :-1], output_attentions=True).cross_attentions[-1][0]
    rows = [ALPHABET[i - 3] if i > END else "end" for i in target[0, 1:].tolist()]
    figure, grid = plt.subplots(
        1, len(weights), figsize=(1.5 + 4.2 * len(weights), 4), squeeze=False, layout="constrained"
    )
    for head, (axes, map_) in enumerate(zip(grid.flat, weights)):
        image = axes.imshow(map_.numpy(), cmap="magma", vmin=0.0, vmax=1.0, aspect="auto")
        axes.set_xticks(range(len(text)), ["␣" if c == " " else c for c in text], fontsize=8)
        axes.set_yticks(range(len(rows)), rows, fontsize=8)
        if len(weights) > 1:
            axes.set_title(f"head {head + 1}", fontsize=10)
    figure.colorbar(image, ax=grid, shrink=0.8, label="attention")
    figure.suptitle(f'"{text}" -> "{decode(target[0])}"')
    figure.savefig(path, dpi=110)
    plt.close(figure)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argument_parser(__doc__, "translation_from_scratch", training=True)
    parser.add_argument("--model", choices=("transformer", "rnn"), default="transformer", help="which architecture")
    parser.add_argument("--norm", choices=("post", "pre"), default="post", help="of the Transformer")
    parser.add_argument("--attention", choices=("additive", "dot", "general", "concat"), default="additive",
                        help="score of the recurrent network")  # fmt: skip
    parser.add_argument("--size", type=int, default=128, help="width of the model")
    parser.add_argument("--steps", type=int, default=1000, help="steps of training")
    parser.add_argument("--batch-size", type=int, default=64, help="rows per step")
    parser.add_argument("--lr", type=float, help="learning rate; the Transformer's multiplies its schedule")
    parser.add_argument("--beams", type=int, default=4, help="of beam search")
    parser.add_argument("--test", type=int, default=500, help="held-out dates to translate at the end")
    parser.add_argument("--dropout", type=float, default=0.1, help="in training")
    parser.add_argument("--seed", type=int, default=0, help="of everything random")
    return parser.parse_args(arguments)


def main(arguments: argparse.Namespace) -> None:
    torch.manual_seed(arguments.seed)
    rng = random.Random(arguments.seed)
    arguments.output.mkdir(parents=True, exist_ok=True)
    model = build(arguments)
    print(f"{type(model).__name__}: {model.num_parameters():,} parameters")
    training, held = train(model, arguments, rng)
    losses, checked = training.losses, training.checked | {arguments.steps: held}
    if not training.finish(arguments.output / arguments.model):
        return
    model = type(model).from_pretrained(arguments.output / arguments.model)
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}, of held-out dates {list(checked.values())[-1]:.3f} "
          f"(least possible: {least_loss(len(ALPHABET) + 3):.3f})")  # fmt: skip
    examples = pairs(arguments.test, random.Random(2), held_out=True)
    greedy, beam = (accuracy(model, examples, beams) for beams in (1, arguments.beams))
    print(f"translated exactly, of {len(examples)} held-out dates: {greedy:.1%} greedily, "
          f"{beam:.1%} with {arguments.beams} beams")  # fmt: skip
    texts, truth = zip(*examples[:5])
    for text, found, true in zip(texts, translate(model, list(texts), arguments.beams), truth):
        print(f"  {text:36} -> {found}{'' if found == true else f' (true: {true})'}")
    curve, attention = (arguments.output / f"{arguments.model}_{name}.png" for name in ("learning_curve", "attention"))
    draw_learning_curve(losses, checked, curve)
    draw_attention(model, "tuesday, the 3rd of march 1998", attention)
    print(f"saved {curve}, {attention} and the model in {arguments.output / arguments.model}")


if __name__ == "__main__":
    main(parse())
