"""Cases of whole models: BERT encoders at inference, and fine-tuning steps."""

import importlib
import importlib.util
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch

import transformer_fast as tf

from . import checkpoints, peers, shapes
from .case import OURS, Bar, Candidate, Case, Unavailable
from .peers import EncoderInputs

__all__ = [
    "HF_SDPA",
    "TrainingInputs",
    "gpu_model_cases",
    "model_cases",
    "optimizer_step",
    "random_batch",
    "training_step",
]

HF_SDPA = "HF sdpa"
HF_EAGER = "HF eager"
OTHERS = ("ONNX Runtime", "OpenVINO", "CTranslate2 float32", "CTranslate2 int8")


def model_cases(device: str) -> list[Case]:
    if device == "cuda":
        return gpu_model_cases(device)
    full, ragged = [128] * 8, shapes.ragged_lengths(32)
    return [
        _encoder("bert-base-ragged-32", "bert-base, 32 ragged sentences (mean 40, max 128)", ragged, device,
                 Bar(3.0, ahead_of=OTHERS)),
        _minilm(device),
        _encoder("distilbert-base-ragged-32", "distilbert-base, 32 ragged sentences (mean 40, max 128)", ragged, device,
                 Bar(3.0), ("distilbert-base", shapes.DISTILBERT_BASE), family="DistilBert"),
        _encoder("albert-base-ragged-32", "albert-base, 32 ragged sentences (mean 40, max 128)", ragged, device,
                 Bar(3.0), ("albert-base", shapes.ALBERT_BASE), family="Albert"),
        *(
            _encoder(f"{name}-ragged-32", f"{name}, 32 ragged sentences (mean 40, max 128)", ragged, device, Bar(3.0),
                     (name, config), family=family)
            for name, config, family in (
                ("roberta-base", shapes.ROBERTA_BASE, "Roberta"),
                ("electra-base", shapes.ELECTRA_BASE, "Electra"),
                ("mpnet-base", shapes.MPNET_BASE, "MPNet"),
                ("modernbert-base", shapes.MODERNBERT_BASE, "ModernBert"),
                ("deberta-v3-base", shapes.DEBERTA_BASE, "DebertaV2"),
            )
        ),
        _encoder("bert-base-full-8x128", "bert-base, 8 x 128 full", full, device, Bar(1.15)),
        _training("ragged-16x128", "bert-base fine-tuning step, ragged 16 x 128 (mean 40)",
                  shapes.ragged_lengths(16), device, Bar(2.2)),
        _training("full-8x128", "bert-base fine-tuning step, full 8 x 128", full, device, Bar(1.25)),
        _training("autocast-ragged-16x128", "bert-base fine-tuning step, bf16 autocast, ragged 16 x 128 (mean 40)",
                  shapes.ragged_lengths(16), device, Bar(3.5), autocast=True),
        _training("autocast-full-8x128", "bert-base fine-tuning step, bf16 autocast, full 8 x 128", full, device,
                  Bar(1.4), autocast=True),
    ]  # fmt: skip


def gpu_model_cases(device: str) -> list[Case]:
    """Cases in bfloat16, with batches large enough for a GPU, of which 40% of the tokens are real."""
    sentences, steps = shapes.ragged_lengths(256, mean=51), shapes.ragged_lengths(64, mean=51)
    cases = []
    for name, config in (("bert-base", shapes.BERT_BASE), ("bert-large", shapes.BERT_LARGE)):
        more = {"device": device, "model": (name, config), "dtype": "bf16"}
        cases += [
            _encoder(f"{name}-bf16-ragged-256", f"{name} bf16, 256 ragged sentences (mean 51, max 128)", sentences,
                     bar=Bar(3.0), **more),
            _training("bf16-ragged-64x128", f"{name} fine-tuning step bf16, ragged 64 x 128 (mean 51)", steps,
                      bar=Bar(1.8), **more),
        ]  # fmt: skip
    return cases


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
BERT_BASE = "bert-base", shapes.BERT_BASE


def _our(name: str):
    """A name of the package, which may be missing (without optional dependencies)."""
    try:
        return getattr(tf, name)
    except (AttributeError, ImportError) as error:
        raise Unavailable(f"transformer_fast.{name}: {error}") from error


def random_batch(
    lengths: list[int], device: str, words: tuple[int, int] = (1000, 30000)
) -> tuple[torch.Tensor, torch.Tensor]:
    """Random token ids, padded on the right with 0, and their attention mask."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(*words, (len(lengths), max(lengths)), generator=generator)
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    return (ids * mask).to(device), mask.to(device)


def _encoder_flops(lengths: list[int], config: dict) -> float:
    """FLOPs of the real tokens only: projections, feed-forward and attention."""
    width, layers, inner = config["hidden_size"], config["num_hidden_layers"], config["intermediate_size"]
    products = 3 if config is shapes.MODERNBERT_BASE else 2  # matrix products of the feed-forward block
    per_token = 2 * (4 * width * width + products * width * inner)
    return float(layers * sum(n * per_token + 4 * n * n * width for n in lengths))


# ---- inference ---------------------------------------------------------------------------------------
def _ours(inputs: EncoderInputs) -> Callable:
    _our(f"{inputs.family}Model")
    model = inputs.load(tf)
    return peers.run_batches(lambda ids, mask: model(input_ids=ids, attention_mask=mask).last_hidden_state, inputs)


def _accelerated(inputs: EncoderInputs, attention: str = "sdpa") -> Callable:
    def change(model):
        _our("accelerate")(model, verbose=False)
        return model

    return peers.hugging_face(inputs, attention, change)


def _attention_door(inputs: EncoderInputs) -> Callable:
    if importlib.util.find_spec("transformer_fast.integrations.huggingface") is None:
        raise Unavailable("transformer_fast.integrations.huggingface is missing")
    importlib.import_module("transformer_fast.integrations.huggingface")
    return peers.hugging_face(inputs, attention="transformer_fast")


def _sorted_by_length(inputs: EncoderInputs) -> Callable:
    """What careful users do by hand: batches sorted by length, each padded to its longest sentence."""
    from transformer_fast.demo.encode import sorted_batches

    groups, _ = sorted_batches(inputs.batches, 8)
    return peers.hugging_face(inputs._replace(batches=groups))


_NO_INTERFACE = ("DebertaV2",)  # transformers' class has no attention interface
_NO_CONVERTER = ("DebertaV2", "ModernBert")  # no converter in CTranslate2


def _encoder_candidates(sortable: bool, exported: bool = True, family: str = "Bert") -> tuple[Candidate, ...]:
    needs = ("transformers",)
    if family in _NO_INTERFACE:
        return (
            Candidate(OURS, _ours, needs),
            Candidate(HF_EAGER, partial(peers.hugging_face, attention="eager"), needs),
            Candidate("HF with accelerate()", partial(_accelerated, attention="eager"), needs),
        )
    candidates = [
        Candidate(OURS, _ours, needs),
        Candidate(HF_SDPA, peers.hugging_face, needs),
        Candidate(HF_EAGER, partial(peers.hugging_face, attention="eager"), needs),
        Candidate("HF with attn_implementation", _attention_door, needs),
        Candidate("HF with accelerate()", _accelerated, needs),
        Candidate("torch.compile", peers.compiled, needs, slow=True),
        Candidate(
            "torch.compile + freezing", partial(peers.compiled, freezing=True), needs, slow=True, works_on=("cpu",)
        ),
    ]
    if family in _NO_CONVERTER:
        return tuple(candidates)
    if sortable:
        candidates.append(Candidate("HF sdpa, sorted in 8s", _sorted_by_length, needs, comparable=False))
    foreign = {"works_on": ("cpu",), "settle": 0.25}
    exporters = [
        Candidate("ONNX Runtime", peers.onnxruntime_encoder, ("onnxruntime", "onnx", *needs), **foreign),
        Candidate("OpenVINO", peers.openvino_encoder, ("openvino", *needs), **foreign),
    ]  # fmt: skip
    candidates += [
        *(exporters if exported else ()),
        *(
            Candidate(f"CTranslate2 {kind}", partial(peers.ctranslate2_encoder, compute_type=kind),
                      ("ctranslate2", *needs), **foreign)
            for kind in ("float32", "int8")
        ),
    ]  # fmt: skip
    return tuple(candidates)


def _encoder(
    name: str, title: str, lengths: list[int], device: str, bar: Bar, model=BERT_BASE, dtype: str = "fp32",
    family: str = "Bert",
) -> Case:  # fmt: skip
    ragged = len(set(lengths)) > 1

    def inputs(tiny: bool) -> EncoderInputs:
        small = ("bert-tiny", shapes.TINY_BERT) if family == "Bert" else (f"{family}-tiny".lower(), shapes.TINY[family])
        checkpoint = checkpoints.random_bert(*(small if tiny else model), family)
        return EncoderInputs(checkpoint, [random_batch([5, 3] if tiny else lengths, device)], DTYPES[dtype], family)

    return Case(
        name=f"inference/{name}",
        title=title,
        inputs=inputs,
        candidates=_encoder_candidates(ragged, exported=family == "Bert", family=family),
        peer=HF_EAGER if family in _NO_INTERFACE else HF_SDPA,
        dtype=dtype,
        shape=f"{len(lengths)} x {max(lengths)}, {sum(lengths)} tokens",
        flops=_encoder_flops(lengths, model[1] if family in ("Bert", "ModernBert") else shapes.BERT_BASE)
        / (1 + (family == "DistilBert")),
        bar=bar,
        result=peers.gather,
    )


def _minilm(device: str) -> Case:
    def inputs(tiny: bool) -> EncoderInputs:
        if tiny:
            return EncoderInputs(checkpoints.random_bert("bert-tiny", shapes.TINY_BERT), [random_batch([5, 3], device)])
        from transformer_fast.demo.checkpoint import load_sentences, tokenize

        path = checkpoints.minilm()
        batches = [(ids.to(device), mask.to(device)) for ids, mask in tokenize(path, load_sentences())]
        return EncoderInputs(path, batches)

    return Case(
        name="inference/minilm-real-sentences",
        title="all-MiniLM-L6-v2 on the demo's real sentences, batches of 32",
        inputs=inputs,
        candidates=_encoder_candidates(True),
        peer=HF_SDPA,
        dtype="fp32",
        shape="the demo's sentences",
        bar=Bar(3.0),
        result=peers.gather,
    )


# ---- fine-tuning -------------------------------------------------------------------------------------
class TrainingInputs(NamedTuple):
    """dtype: of the weights. autocast: the forward runs in torch.autocast's bfloat16."""

    checkpoint: object
    ids: torch.Tensor
    mask: torch.Tensor
    labels: torch.Tensor
    dtype: torch.dtype
    autocast: bool = False


def training_step(make: Callable, inputs: TrainingInputs) -> Callable:
    """One step like Trainer's: forward with dropout, loss, backward, fused AdamW."""
    model = make(inputs.checkpoint).train().to(inputs.ids.device, inputs.dtype)
    batch = {"input_ids": inputs.ids, "attention_mask": inputs.mask, "labels": inputs.labels}
    return optimizer_step(model, batch, inputs.autocast)


def optimizer_step(model, batch: dict, autocast: bool = False) -> Callable:
    """The same for a given model and the keywords of its forward."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    device = next(model.parameters()).device.type

    def call():
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device, torch.bfloat16, enabled=autocast):
            loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        return loss.detach()

    return call


def _our_classifier(checkpoint):
    return _our("BertForSequenceClassification").from_pretrained(checkpoint)


def _hf_classifier(checkpoint, attention: str, change: Callable | None = None):
    from transformers import BertForSequenceClassification

    model = BertForSequenceClassification.from_pretrained(checkpoint, attn_implementation=attention)
    return change(model) if change else model


def _training(
    name: str, title: str, lengths: list[int], device: str, bar: Bar, model=BERT_BASE, dtype: str = "fp32",
    autocast: bool = False,
) -> Case:  # fmt: skip
    def inputs(tiny: bool) -> TrainingInputs:
        sizes = [5, 3] if tiny else lengths
        config = ("bert-tiny", shapes.TINY_BERT) if tiny else model
        ids, mask = random_batch(sizes, device)
        labels = torch.arange(len(sizes), device=device) % 2
        return TrainingInputs(checkpoints.random_bert(*config), ids, mask, labels, DTYPES[dtype], autocast)

    def accelerated(model):
        _our("accelerate")(model, verbose=False)
        return model

    makes = {
        OURS: _our_classifier,
        HF_SDPA: partial(_hf_classifier, attention="sdpa"),
        HF_EAGER: partial(_hf_classifier, attention="eager"),
        "HF with accelerate()": partial(_hf_classifier, attention="sdpa", change=accelerated),
        "torch.compile": partial(_hf_classifier, attention="sdpa", change=partial(torch.compile, dynamic=False)),
    }
    return Case(
        name=f"training/{model[0]}-{name}",
        title=title,
        inputs=inputs,
        candidates=tuple(
            Candidate(key, partial(training_step, make), ("transformers",), slow=key == "torch.compile")
            for key, make in makes.items()
        ),
        peer=HF_SDPA,
        dtype="bf16, autocast" if autocast else dtype,
        shape=f"{len(lengths)} x {max(lengths)}, {sum(lengths)} tokens",
        flops=3 * _encoder_flops(lengths, model[1]),
        bar=bar,
        result=None,
    )
