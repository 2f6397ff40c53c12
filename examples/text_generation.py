"""Text generation: train a small GPT-2 and its tokenizer from scratch, then let it write in three ways.

    python examples/text_generation.py

The text is the 100 short biographies of data/questions.json, made from phrases: a byte-level BPE tokenizer is trained
on them, then a GPT-2 with 4 layers. The model soon memorises so few, so every tenth of them is held out, and the
weights with the least loss on those are kept. It continues the same beginnings greedily, by sampling and by beam
search. Saved: the model with its tokenizer, and a picture of the learning curve.
"""

import argparse
import json
import pathlib
import random

import matplotlib
import tokenizers
import torch
import transformers
from tqdm import tqdm

import transformer_fast as tf
from transformer_fast.demo.arguments import argument_parser
from transformer_fast.demo.training import Training

matplotlib.use("Agg")
import matplotlib.pyplot as plt

DATA = pathlib.Path(__file__).resolve().parent / "data" / "questions.json"
END = "<|endoftext|>"
BEGINNINGS = ["Kenji Dubois was born in", "Elena Weber was born in Prague in 1911. After school"]
HELD_OUT = 10  # every tenth biography is held out


def read(path: pathlib.Path) -> tuple[list[str], list[str]]:
    """(training texts, held-out texts)."""
    lives = json.loads(path.read_text(encoding="utf-8"))["contexts"]
    known, held_out = ([life for i, life in enumerate(lives) if (i % HELD_OUT == 0) == held] for held in (False, True))
    return known, held_out


def build_tokenizer(texts: list[str], size: int) -> transformers.PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of at most `size` tokens; pads on the left, as generation needs."""
    made = tokenizers.ByteLevelBPETokenizer()
    made.train_from_iterator(texts, vocab_size=size, special_tokens=[END], show_progress=False)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made._tokenizer, bos_token=END, eos_token=END, pad_token=END, padding_side="left"
    )


def encode(texts: list[str], tokenizer) -> dict[str, torch.Tensor]:
    """A batch of whole texts between two END tokens, padded on the right. Padding and the first END have no label."""
    rows = [torch.tensor(tokenizer(END + text + END)["input_ids"]) for text in texts]
    lengths = torch.tensor([len(row) for row in rows])
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=tokenizer.pad_token_id)
    mask = torch.arange(ids.shape[1]) < lengths[:, None]
    learned = mask & (torch.arange(ids.shape[1]) > 0)
    return {"input_ids": ids, "attention_mask": mask.long(), "labels": ids.masked_fill(~learned, -100)}


def build_model(tokenizer, arguments: argparse.Namespace) -> tf.GPT2LMHeadModel:
    config = transformers.GPT2Config(
        vocab_size=len(tokenizer), n_positions=256, n_embd=arguments.size, n_layer=arguments.layers, n_head=4,
        resid_pdrop=arguments.dropout, embd_pdrop=arguments.dropout, attn_pdrop=arguments.dropout,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return tf.GPT2LMHeadModel(config)


def train(model, tokenizer, known: list[str], held_out: list[str], arguments: argparse.Namespace) -> Training:
    """Train; evaluate the held-out texts after every twentieth of the steps. At the end the model has the best
    weights."""
    training = Training(
        model, arguments,
        lambda weights: torch.optim.AdamW(weights, lr=arguments.lr, weight_decay=arguments.weight_decay),
        lambda optimizer: torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, arguments.steps),
        clip=1.0, seed=arguments.seed,
    )  # fmt: skip
    validation, rng = encode(held_out, tokenizer), random.Random(arguments.seed)
    validation, held = {name: t.to(training.device) for name, t in validation.items()}, float("nan")
    for step, bar in training.steps(arguments.steps, "training"):
        loss = training.step(encode(rng.sample(known, arguments.batch_size), tokenizer))
        if (step + 1) % max(1, arguments.steps // 20) == 0 or step + 1 == arguments.steps:
            held = training.check(lambda: judge(model, validation))
            if held == min(training.checked.values()):
                training.keep()
        bar.set_postfix(loss=f"{loss:.3f}", held_out=f"{held:.3f}")
        training.save_if_due()
    training.use_kept()
    return training


@torch.no_grad()
def judge(model, batch: dict[str, torch.Tensor]) -> float:
    return model.eval()(**batch).loss.item()


def write(folder: pathlib.Path, beginnings: list[str], arguments: argparse.Namespace) -> dict[str, list[str]]:
    """{decoding method: one text per beginning}."""
    ways = {
        "greedy": {"do_sample": False},
        "sampled": {"do_sample": True, "temperature": arguments.temperature, "top_p": 0.95},
        f"{arguments.beams} beams": {"do_sample": False, "num_beams": arguments.beams, "early_stopping": True},
    }
    generator = tf.pipeline("text-generation", str(folder))
    found = {}
    for way, settings in tqdm(ways.items(), desc="writing", unit="way"):
        transformers.set_seed(arguments.seed)
        config = transformers.GenerationConfig.from_model_config(generator.model.config)
        config.update(max_new_tokens=arguments.new_tokens, **settings)
        answers = generator([END + text for text in beginnings], generation_config=config, return_full_text=False)
        found[way] = [text + answer[0]["generated_text"] for text, answer in zip(beginnings, answers)]
    return found


def draw(losses: list[float], checked: dict[int, float], path: pathlib.Path) -> None:
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    axes.plot(range(1, len(losses) + 1), losses, color="#b0b8c0", linewidth=0.8, label="training, each step")
    axes.plot(list(checked), list(checked.values()), color="#c0392b", marker="o", label="held-out texts")
    best = min(checked, key=checked.get)
    axes.plot(best, checked[best], "k*", markersize=14, label=f"kept: step {best}", zorder=3)
    axes.set_xlabel("step")
    axes.set_ylabel("cross entropy per token")
    axes.set_ylim(bottom=0)
    axes.legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argument_parser(__doc__, "text_generation", training=True)
    parser.add_argument("--vocabulary", type=int, default=600, help="tokens of the tokenizer")
    parser.add_argument("--size", type=int, default=128, help="width of the model")
    parser.add_argument("--layers", type=int, default=4, help="layers of the model")
    parser.add_argument("--steps", type=int, default=200, help="steps of training")
    parser.add_argument("--batch-size", type=int, default=16, help="rows per step")
    parser.add_argument("--lr", type=float, default=2e-3, help="learning rate")
    parser.add_argument("--weight-decay", type=float, default=0.1, help="of AdamW")
    parser.add_argument("--dropout", type=float, default=0.2, help="in training")
    parser.add_argument("--beginnings", nargs="+", default=BEGINNINGS, metavar="TEXT", help="to be continued")
    parser.add_argument("--new-tokens", type=int, default=80, help="largest number of tokens to write")
    parser.add_argument("--temperature", type=float, default=0.8, help="of sampling")
    parser.add_argument("--beams", type=int, default=4, help="of beam search")
    parser.add_argument("--seed", type=int, default=0, help="of everything random")
    return parser.parse_args(arguments)


def main(arguments: argparse.Namespace) -> dict[str, list[str]] | None:
    transformers.set_seed(arguments.seed)
    arguments.output.mkdir(parents=True, exist_ok=True)
    known, held_out = read(DATA)
    tokenizer = build_tokenizer(known, arguments.vocabulary)
    model = build_model(tokenizer, arguments)
    print(f"{type(model).__name__}: {model.num_parameters():,} parameters, {len(tokenizer)} tokens; "
          f"trained on {len(known)} texts")  # fmt: skip
    training = train(model, tokenizer, known, held_out, arguments)
    losses, checked, folder = training.losses, training.checked, arguments.output / "model"
    if not training.finish(folder):
        return None
    best = min(checked, key=checked.get)
    print(f"loss {losses[0]:.3f} -> {losses[best - 1]:.3f}, of held-out texts {checked[best]:.3f}: "
          f"kept from step {best} of {arguments.steps}")  # fmt: skip
    picture = arguments.output / "text_generation.png"
    tokenizer.save_pretrained(folder)
    draw(losses, checked, picture)
    found = write(folder, arguments.beginnings, arguments)
    for way, texts in found.items():
        for text in texts:
            print(f"  {way:8} {text!r}")
    print(f"saved {picture} and the model in {folder}")
    return found


if __name__ == "__main__":
    main(parse())
