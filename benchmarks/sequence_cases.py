"""Cases of models without a Hugging Face class: the 2017 Transformer in the paper's base size, and the recurrent
network with additive attention that preceded it. No bars: the only reference is plain PyTorch."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import transformers

import transformer_fast as tf

from . import shapes
from .case import OURS, Candidate, Case
from .generation_cases import Inputs, checkpoint, make_inputs, run_generate
from .model_cases import TrainingInputs, random_batch, training_step
from .peers import quiet
from .sequence_peers import PlainAttentionRNN, PlainTransformer

__all__ = ["sequence_cases"]

HF_LOOP = "HF's loop"
NEW_TOKENS = 32
# name: (its class, the same in plain PyTorch, the name of the latter, a description of the size)
MODELS: dict[str, tuple[str, Callable, str, str]] = {
    "transformer-base": (
        "TransformerForConditionalGeneration", PlainTransformer, "nn.Transformer", "the 2017 Transformer's base model",
    ),
    "attention-rnn": (
        "AttentionRNNForConditionalGeneration", PlainAttentionRNN, "plain PyTorch",
        "bidirectional GRU with additive attention, width 1000",
    ),
}  # fmt: skip


def sequence_cases(device: str) -> list[Case]:
    if device != "cpu":
        return []
    return [
        _training("transformer-base"),
        _generation("transformer-base", 1),
        _generation("transformer-base", 4),
        _training("attention-rnn"),
        _generation("attention-rnn", 1),
        _recurrent_layer("lstm"),
        _recurrent_layer("gru"),
    ]


def _recurrent_layer(cell: str) -> Case:
    """Forward and backward of one layer, 32 sequences of 50 steps, width 512, against torch's own."""
    peer = f"nn.{cell.upper()}"

    def inputs(tiny: bool) -> tuple[Any, torch.Tensor, torch.Tensor]:
        torch.manual_seed(0)
        batch, steps, width = (2, 3, 16) if tiny else (32, 50, 512)
        layer = getattr(torch.nn, cell.upper())(width, width, batch_first=True)
        return layer, torch.randn(batch, steps, width), torch.randn(batch, steps, width)

    def prepare(given: tuple, call: Callable) -> Callable:
        layer, x, cotangent = given
        leaves = [x.requires_grad_(), *layer.parameters()]
        return lambda: torch.autograd.grad(call(layer, *leaves), leaves, cotangent)

    return Case(
        name=f"recurrence/{cell}",
        title=f"one {cell.upper()} layer of width 512, forward and backward, 32 sequences of 50 steps",
        inputs=inputs,
        candidates=(
            Candidate(OURS, partial(prepare, call=lambda layer, *leaves: getattr(tf, cell)(*leaves)[0])),
            Candidate(peer, partial(prepare, call=lambda layer, x, *_: layer(x)[0])),
        ),
        peer=peer,
        dtype="fp32",
        shape="32 x 50 x 512",
    )


def _load(path: Any, name: str) -> Any:
    return getattr(tf, MODELS[name][0]).from_pretrained(path)


def _training(name: str) -> Case:
    """A step with dropout and label smoothing on ragged pairs, against the same model in plain PyTorch."""
    _, plain, peer, title = MODELS[name]
    lengths = shapes.ragged_lengths(16, mean=25, longest=60), shapes.ragged_lengths(16, mean=25, longest=60, seed=1)

    def inputs(tiny: bool) -> TrainingInputs:
        source, target = ([5, 3], [4, 6]) if tiny else lengths
        words = (10, 90) if tiny else (1000, 30000)
        ids, mask = random_batch(source, "cpu", words)
        labels, real = random_batch(target, "cpu", words)
        labels = labels.where(real.bool(), -100)
        return TrainingInputs(checkpoint(name, tiny), ids, mask, labels, torch.float32)

    def in_plain_pytorch(path: Any, change: Callable = lambda model: model) -> Any:
        return change(plain(_load(path, name)))

    makes: dict[str, Callable] = {OURS: partial(_load, name=name), peer: in_plain_pytorch}
    if name == "transformer-base":
        makes["torch.compile"] = partial(in_plain_pytorch, change=partial(torch.compile, dynamic=False))
    return Case(
        name=f"training/{name}-ragged-16",
        title=f"{title}, training step on 16 ragged pairs (mean 25, max 60)",
        inputs=inputs,
        candidates=tuple(
            Candidate(key, partial(training_step, make), slow=key == "torch.compile") for key, make in makes.items()
        ),
        peer=peer,
        dtype="fp32",
        shape=f"16 x {max(lengths[0])} to {max(lengths[1])}, {sum(map(sum, lengths))} tokens",
        result=None,  # dropout; tests check that both are the same model
    )


def _ours(inputs: Inputs, name: str) -> Callable:
    return run_generate(_load(inputs.checkpoint, name), inputs)


def _huggingface_loop(inputs: Inputs, name: str) -> Callable:
    cls = getattr(tf, MODELS[name][0])
    loops = {name: getattr(transformers.GenerationMixin, name) for name in ("_sample", "_beam_search")}
    return run_generate(type(cls.__name__, (cls,), loops).from_pretrained(inputs.checkpoint), inputs)


def _in_plain_pytorch(inputs: Inputs, name: str) -> Callable:
    ours = _load(inputs.checkpoint, name)
    model = MODELS[name][1](ours).eval()
    call = partial(model.greedy, inputs.ids, inputs.mask, inputs.tokens, ours.config.eos_token_id)
    with quiet():  # torch warns once about the nested tensors in its own encoder
        call()
    return call


def _generation(name: str, beams: int) -> Case:
    """The peer is Hugging Face's loop with this package's forward and cache, without its engine: the best other way to
    decode with these weights. nn.Transformer has no cache; its usual loop, which runs the decoder on the whole prefix
    for every token, is measured too, and so is the recurrent network's own loop."""
    _, _, plain, title = MODELS[name]
    lengths = shapes.ragged_lengths(8, mean=25, longest=60)
    candidates = [
        Candidate(OURS, partial(_ours, name=name)),
        Candidate(HF_LOOP, partial(_huggingface_loop, name=name)),
    ]
    if beams == 1:
        candidates.append(Candidate(plain, partial(_in_plain_pytorch, name=name)))
    how = "greedy" if beams == 1 else f"beam {beams}"
    return Case(
        name=f"generation/{name}-{how.replace(' ', '')}-b8",
        title=f"{title}, {how}, 8 ragged sources (mean 25, max 60), {NEW_TOKENS} new tokens",
        inputs=partial(make_inputs, name, lengths, NEW_TOKENS, beams, "cpu"),
        candidates=tuple(candidates),
        peer=HF_LOOP,
        dtype="fp32",
        shape=f"8 x {max(lengths)}, {NEW_TOKENS} new",
        result=None,  # with random weights, rounding decides the next token
    )
