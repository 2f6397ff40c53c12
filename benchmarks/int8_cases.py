"""Encoders in int8 on the CPU, compared with other engines' int8; the note of a row has the cost in accuracy."""

import json
from collections.abc import Callable
from functools import partial

import torch

import transformer_fast as tf

from . import checkpoints, peers, shapes
from .case import OURS, Bar, Candidate, Case, Part
from .model_cases import DTYPES, HF_SDPA, random_batch
from .peers import EncoderInputs

__all__ = ["int8_cases"]

PEERS = ("OpenVINO int8 (nncf)", "CTranslate2 int8", "ONNX Runtime int8 (dynamic)", "torchao int8 (dynamic)")


def int8_cases(device: str) -> list[Case]:
    if device != "cpu":
        return []
    return [
        _case("minilm-as-they-come", "all-MiniLM-L6-v2 in int8, the demo's sentences in batches of 32", _sentences),
        _case("minilm-sorted", "all-MiniLM-L6-v2 in int8, the demo's sentences sorted by length, batches of 32",
              partial(_sentences, by_length=True)),
        _case("bert-base-ragged-32", "bert-base in int8, 32 ragged sentences (mean 40, max 128)",
              partial(_random, shapes.ragged_lengths(32))),
        _case("bert-base-full-8x128", "bert-base in int8, 8 x 128 full", partial(_random, [128] * 8)),
    ]  # fmt: skip


def _random(lengths: list[int], tiny: bool) -> EncoderInputs:
    model = ("bert-tiny", shapes.TINY_BERT) if tiny else ("bert-base", shapes.BERT_BASE)
    return EncoderInputs(checkpoints.random_bert(*model), [random_batch([5, 3] if tiny else lengths, "cpu")])


def _sentences(tiny: bool, by_length: bool = False) -> EncoderInputs:
    if tiny:
        return _random([], True)
    from transformer_fast.demo.checkpoint import load_sentences, tokenize
    from transformer_fast.demo.encode import sorted_batches

    path = checkpoints.minilm()
    batches = list(tokenize(path, load_sentences()))
    return EncoderInputs(path, sorted_batches(batches, 32)[0] if by_length else batches)


def _ours(inputs: EncoderInputs, precision: str | None) -> Callable:
    model = inputs.load(tf)
    if precision is not None:
        model = tf.quantize(model, precision)
    return peers.run_batches(lambda ids, mask: model(input_ids=ids, attention_mask=mask).last_hidden_state, inputs)


def _hf_bf16(inputs: EncoderInputs) -> Callable:
    return peers.hugging_face(inputs._replace(dtype=DTYPES["bf16"]))


def torchao_encoder(inputs: EncoderInputs) -> Callable:
    """torch.compile of the sdpa model with torchao's int8 weights and activations quantised per row."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    def change(model):
        quantize_(model, Int8DynamicActivationInt8WeightConfig())
        return torch.compile(model, dynamic=len({ids.shape for ids, _ in inputs.batches}) > 1)

    return peers.hugging_face(inputs, change=change)


def onnxruntime_encoder(inputs: EncoderInputs) -> Callable:
    """ONNX Runtime's dynamic quantisation of the optimised graph."""
    return peers.onnxruntime_encoder(inputs, int8=True)


def openvino_encoder(inputs: EncoderInputs) -> Callable:
    """OpenVINO's CPU plugin after nncf's quantisation, calibrated on the first batches."""
    return peers.openvino_encoder(inputs, int8=True)


def _parts(inputs: EncoderInputs) -> list[Part]:
    """Each batch: its tokens, without padding, through the layers' products, whose weights are a byte each."""
    config = json.loads((inputs.checkpoint / "config.json").read_text())
    width, inner = config["hidden_size"], config["intermediate_size"]
    weights = config["num_hidden_layers"] * (4 * width * width + 2 * width * inner)
    return [Part(2.0 * weights * int(mask.sum()), weights) for _, mask in inputs.batches]


def _case(name: str, title: str, inputs: Callable) -> Case:
    needs = ("transformers",)
    low = {"low_precision": True}
    foreign = {"works_on": ("cpu",), "settle": 0.25, **low}
    candidates = (
        Candidate(OURS, partial(_ours, precision="int8"), needs, **low),
        Candidate(f"{OURS} bf16", partial(_ours, precision="bf16"), needs, **low),
        Candidate(f"{OURS} fp32", partial(_ours, precision=None), needs),
        Candidate(HF_SDPA, peers.hugging_face, needs),
        Candidate("HF bf16", _hf_bf16, needs, **low),
        Candidate("OpenVINO int8 (nncf)", openvino_encoder, ("openvino", "nncf", *needs), **foreign),
        Candidate("OpenVINO bf16", partial(peers.openvino_encoder, precision="bf16"), ("openvino", *needs), **foreign),
        Candidate("CTranslate2 int8", partial(peers.ctranslate2_encoder, compute_type="int8"),
                  ("ctranslate2", *needs), **foreign),
        Candidate("ONNX Runtime int8 (dynamic)", onnxruntime_encoder, ("onnxruntime", "onnx", *needs), **foreign),
        Candidate("torchao int8 (dynamic)", torchao_encoder, ("torchao", *needs), slow=True, **low),
    )  # fmt: skip
    return Case(
        name=f"int8/{name}",
        title=title,
        inputs=inputs,
        candidates=candidates,
        peer=HF_SDPA,
        dtype="int8",
        shape="the demo's sentences" if "minilm" in name else title.split(", ", 1)[1],
        bar=Bar(3.0, ahead_of=PEERS),
        parts=_parts,
        result=peers.gather,
    )
