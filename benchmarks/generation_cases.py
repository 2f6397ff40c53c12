"""Cases of text generation: decoders and encoder-decoders of real sizes with random weights."""

import json
import pathlib
import shutil
import tempfile
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch

import transformer_fast as tf

from . import shapes
from .case import OURS, Bar, Candidate, Case, Part
from .checkpoints import folder
from .openvino_generation import openvino_generation

__all__ = ["Inputs", "checkpoint", "generation_cases", "make_inputs", "run_generate"]

HF_SDPA = "HF sdpa"
_SEQ2SEQ = {"vocab_size": 58101, "d_model": 512, "encoder_layers": 6, "decoder_layers": 6, "encoder_attention_heads": 8,
            "decoder_attention_heads": 8, "encoder_ffn_dim": 2048, "decoder_ffn_dim": 2048}  # fmt: skip
_LARGE_SEQ2SEQ = {
    "d_model": 1024, "encoder_layers": 12, "decoder_layers": 12, "encoder_attention_heads": 16,
    "decoder_attention_heads": 16, "encoder_ffn_dim": 4096, "decoder_ffn_dim": 4096, "scale_embedding": True,
    "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 2,
}  # fmt: skip

_OUR_TOKENS = {"pad_token_id": 0, "eos_token_id": 2}

# name: (model class, its configuration). Sizes of gpt2, Helsinki-NLP/opus-mt-en-de, t5-small, facebook/bart-base,
# facebook/nllb-200-distilled-600M, facebook/mbart-large-cc25, HuggingFaceTB/SmolLM-135M and Qwen/Qwen3-0.6B; of the
# base model of Vaswani et al. (2017), and of RNNsearch (Bahdanau et al., 2015) with 500 units per direction.
MODELS: dict[str, tuple[str, dict]] = {
    "gpt2": ("GPT2LMHeadModel", {"bos_token_id": 50256, "eos_token_id": 50256}),
    "marian": ("MarianMTModel", {
        **_SEQ2SEQ, "decoder_vocab_size": 58101, "max_position_embeddings": 512, "activation_function": "swish",
        "scale_embedding": True, "share_encoder_decoder_embeddings": True, "pad_token_id": 58100, "bos_token_id": 0,
        "eos_token_id": 0, "decoder_start_token_id": 58100, "forced_eos_token_id": 0,
    }),
    "t5-small": ("T5ForConditionalGeneration", {
        "vocab_size": 32128, "d_model": 512, "d_ff": 2048, "num_layers": 6, "num_heads": 8, "d_kv": 64,
        "pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0,
    }),
    "bart-base": ("BartForConditionalGeneration", {
        **_SEQ2SEQ, "vocab_size": 50265, "d_model": 768, "encoder_attention_heads": 12, "decoder_attention_heads": 12,
        "encoder_ffn_dim": 3072, "decoder_ffn_dim": 3072, "activation_function": "gelu", "bos_token_id": 0,
        "pad_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2, "forced_eos_token_id": 2,
    }),
    "nllb-distilled-600m": ("M2M100ForConditionalGeneration", {
        **_LARGE_SEQ2SEQ, "vocab_size": 256206, "activation_function": "relu", "encoder_layerdrop": 0.0,
        "decoder_layerdrop": 0.0,
    }),
    "mbart-large": ("MBartForConditionalGeneration", {
        **_LARGE_SEQ2SEQ, "vocab_size": 250027, "activation_function": "gelu", "forced_eos_token_id": 2,
    }),
    "smollm-135m": ("LlamaForCausalLM", {
        "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True, "rms_norm_eps": 1e-5,
        "bos_token_id": 0, "eos_token_id": 0,
    }),
    "qwen3-0.6b": ("Qwen3ForCausalLM", {
        "vocab_size": 151936, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
        "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "bos_token_id": 151643, "eos_token_id": 151645,
    }),
    # As in torch.nn.Transformer: norms after the last layers, dropout inside the sublayers too.
    "transformer-base": ("TransformerForConditionalGeneration", {
        "final_norm": True, "attention_dropout": 0.1, "activation_dropout": 0.1, **_OUR_TOKENS,
    }),
    "attention-rnn": ("AttentionRNNForConditionalGeneration", {
        "vocab_size": 30000, "embedding_size": 620, "hidden_size": 1000, "label_smoothing": 0.1, **_OUR_TOKENS,
    }),
}  # fmt: skip
_TINY_DECODER = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
                 "num_attention_heads": 2, "num_key_value_heads": 1, "bos_token_id": 1, "eos_token_id": 1}  # fmt: skip
_TINY = {
    "LlamaForCausalLM": _TINY_DECODER,
    "Qwen3ForCausalLM": _TINY_DECODER | {"head_dim": 16},
    "GPT2LMHeadModel": {"vocab_size": 99, "n_embd": 32, "n_layer": 1, "n_head": 2, "bos_token_id": 1,
                        "eos_token_id": 1},
    "T5ForConditionalGeneration": {"vocab_size": 99, "d_model": 32, "d_ff": 32, "num_layers": 1, "num_heads": 2,
                                   "d_kv": 16, "pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0},
    "TransformerForConditionalGeneration": {
        **MODELS["transformer-base"][1], "vocab_size": 99, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1,
        "num_attention_heads": 2, "ffn_dim": 64,
    },
    "AttentionRNNForConditionalGeneration": {
        **MODELS["attention-rnn"][1], "vocab_size": 99, "embedding_size": 24, "hidden_size": 32,
    },
}  # fmt: skip
_TINY_SEQ2SEQ = {"vocab_size": 99, "decoder_vocab_size": 99, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1,
                 "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 32,
                 "decoder_ffn_dim": 32, "pad_token_id": 98, "bos_token_id": 0, "eos_token_id": 1,
                 "decoder_start_token_id": 98, "forced_eos_token_id": 1}  # fmt: skip
for _kind in ("M2M100ForConditionalGeneration", "MBartForConditionalGeneration"):
    _TINY[_kind] = {**_TINY_SEQ2SEQ, "pad_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2,
                    "forced_eos_token_id": None}  # fmt: skip


class Inputs(NamedTuple):
    """The inputs of a generate call that makes exactly `tokens` new tokens per row of ids."""

    checkpoint: pathlib.Path
    kind: str
    ids: torch.Tensor
    mask: torch.Tensor
    tokens: int
    beams: int


def checkpoint(name: str, tiny: bool) -> pathlib.Path:
    """The folder of a model of MODELS with random weights, or of a tiny one with the same architecture."""
    kind = MODELS[name][0]
    path = folder() / f"generation-{name}{'-tiny' if tiny else ''}"
    if not (path / "config.json").exists():
        import transformers

        partial_path = pathlib.Path(tempfile.mkdtemp(dir=folder()))
        torch.manual_seed(0)
        cls = getattr(transformers if hasattr(transformers, kind) else tf, kind)
        cls(cls.config_class(**_config(name, tiny))).save_pretrained(partial_path)
        shutil.rmtree(path, ignore_errors=True)
        partial_path.rename(path)
    return path


def _config(name: str, tiny: bool) -> dict:
    kind, config = MODELS[name]
    return _TINY.get(kind, _TINY_SEQ2SEQ) if tiny else config


def make_inputs(name: str, lengths: list[int], tokens: int, beams: int, device: str, tiny: bool) -> Inputs:
    if tiny:
        lengths, tokens = [5, 3 if len(set(lengths)) > 1 else 5][: len(lengths)], 3
    config, most = _config(name, tiny), 90 if tiny else 30000
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(10, most, (len(lengths), max(lengths)), generator=generator)
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    pad = config.get("pad_token_id", config["eos_token_id"])
    return Inputs(
        checkpoint(name, tiny), MODELS[name][0], ids.where(mask.bool(), pad).to(device), mask.to(device), tokens, beams
    )


def run_generate(model, inputs: Inputs) -> Callable:
    model = model.eval().to(inputs.ids.device)

    def call():
        return model.generate(
            inputs.ids, attention_mask=inputs.mask, do_sample=False, num_beams=inputs.beams,
            min_new_tokens=inputs.tokens, max_new_tokens=inputs.tokens, pad_token_id=model.config.pad_token_id or 0,
        )  # fmt: skip

    return call


# {storage of the weights: (its description, the model's dtype, arguments of set_weight_storage)}; "int8" is quantize's.
_WEIGHTS: dict[str, tuple[str, torch.dtype, dict]] = {
    "": ("fp32", torch.float32, {}),
    "in-place": ("fp32, weights in place", torch.float32, {"copy": False}),
    "bf16-weights": ("fp32, weights stored in bf16", torch.float32, {"dtype": torch.bfloat16}),
    "int8-weights": ("fp32, weights stored in int8", torch.float32, {"dtype": torch.int8}),
    "bf16": ("bf16, peer fp32", torch.bfloat16, {}),
    "int8": ("int8, peer fp32", torch.float32, {}),
}


def _ours(inputs: Inputs, weights: str = "") -> Callable:
    _, dtype, storage = _WEIGHTS[weights]
    model = getattr(tf, inputs.kind).from_pretrained(inputs.checkpoint, dtype=dtype)
    if weights == "int8":
        model = tf.quantize(model, "int8")
    if storage:
        tf.generation.set_weight_storage(model, **storage)
    return run_generate(model, inputs)


def _hugging_face(inputs: Inputs, dtype: torch.dtype = torch.float32, accelerate: bool = False) -> Callable:
    import transformers

    cls = getattr(transformers, inputs.kind)
    model = cls.from_pretrained(inputs.checkpoint, attn_implementation="sdpa", dtype=dtype)
    if accelerate:
        tf.accelerate(model, verbose=False)
    return run_generate(model, inputs)


class _Tokens:
    """A tokenizer for CTranslate2's converter, with a vocabulary without texts: token i is "ti"."""

    special_tokens_map: dict = {}

    def __init__(self, config: Any):
        self._size, self._pad = config.vocab_size, config.pad_token_id
        for name in ("bos", "eos", "pad", "unk"):
            index = getattr(config, f"{name}_token_id", None)
            setattr(self, f"{name}_token", self.convert_ids_to_tokens(3 if index is None else index))

    def get_vocab(self) -> dict[str, int]:
        return {self.convert_ids_to_tokens(i): i for i in range(self._size)}

    def convert_ids_to_tokens(self, index: int) -> str:
        return "<pad>" if index == self._pad else f"t{index}"


def _ctranslate2(inputs: Inputs, compute_type: str) -> Callable:
    import ctranslate2
    from ctranslate2.converters import TransformersConverter
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(inputs.checkpoint)

    class Converter(TransformersConverter):
        def load_tokenizer(self, *args, **kwargs):
            return _Tokens(config)

        def load_model(self, *args, **kwargs):
            model = super().load_model(*args, **kwargs)
            for name, value in (("normalize_before", config.model_type == "mbart"), ("normalize_embedding", True)):
                if not hasattr(model.config, name):  # BART's and mBART's, which configurations no longer carry
                    setattr(model.config, name, value)
            return model

    path = folder() / f"{inputs.checkpoint.name}-ctranslate2"
    if not (path / "model.bin").exists():
        Converter(str(inputs.checkpoint)).convert(str(path), force=True)
    options = {"device": "cpu", "compute_type": compute_type, "intra_threads": torch.get_num_threads()}
    rows = [[f"t{i}" for i in row[m.bool()].tolist()] for row, m in zip(inputs.ids, inputs.mask)]
    if not config.is_encoder_decoder:
        generator = ctranslate2.Generator(str(path), **options)
        return lambda: generator.generate_batch(
            rows, max_length=inputs.tokens, min_length=inputs.tokens, sampling_topk=1, include_prompt_in_result=False
        )
    translator = ctranslate2.Translator(str(path), **options)
    # mBART's first token is a language, which the converted model does not hold.
    first = [[f"t{config.decoder_start_token_id}"]] * len(rows) if config.model_type == "mbart" else None
    return lambda: translator.translate_batch(
        rows, first, beam_size=inputs.beams, max_decoding_length=inputs.tokens, min_decoding_length=inputs.tokens
    )


def _int8_parts(inputs: Inputs) -> list[Part]:
    """The encoder or the prompt, then every step: products with int8 weights, one byte each, without attention."""
    c = json.loads((inputs.checkpoint / "config.json").read_text())
    width = c.get("d_model") or c.get("n_embd") or c["hidden_size"]
    rows, sources, tokens = len(inputs.ids) * inputs.beams, int(inputs.mask.sum()), inputs.tokens
    head = float(width * c["vocab_size"])
    if "d_model" not in c:
        layers = 12.0 * c["n_layer"] * width * width if "n_embd" in c else _gated_layers(c)
        prompt = Part(2 * (layers * sources + head * rows), layers + head)
        step = Part(2 * (layers + head) * rows, layers + head)
        return [prompt] + [step] * (tokens - 1)
    inner = c["num_heads"] * c["d_kv"] if "d_kv" in c else width
    attention, feed_forward = 4.0 * width * inner, 2.0 * width * (c.get("d_ff") or c["decoder_ffn_dim"])
    layers, decoders = c.get("num_layers") or c["encoder_layers"], c.get("num_layers") or c["decoder_layers"]
    encoder = layers * (attention + feed_forward) + decoders * attention / 2  # and the keys and values of all layers
    decoder = decoders * (1.5 * attention + feed_forward) + head
    steps = tokens - (c.get("forced_eos_token_id") is not None)
    return [Part(2 * encoder * sources, encoder)] + [Part(2 * decoder * rows, decoder)] * steps


def _gated_layers(config: dict) -> float:
    """The weights of the layers of Llama and its kin."""
    width, heads, keys = (config[name] for name in ("hidden_size", "num_attention_heads", "num_key_value_heads"))
    dim = config.get("head_dim") or width // heads
    return config["num_hidden_layers"] * width * (2.0 * (heads + keys) * dim + 3.0 * config["intermediate_size"])


def _case(
    name: str, model: str, lengths: list[int], tokens: int, beams: int, bar: float, device: str,
    weights: str = "",
) -> Case:  # fmt: skip
    ours = partial(_ours, weights=weights)
    candidates = [Candidate(OURS, ours, ("transformers",)), Candidate(HF_SDPA, _hugging_face, ("transformers",))]
    if not weights:
        accelerated = partial(_hugging_face, accelerate=True)
        candidates.append(Candidate("HF with accelerate()", accelerated, ("transformers",)))
    if "bf16" in weights:
        candidates.append(Candidate("HF bf16", partial(_hugging_face, dtype=torch.bfloat16), ("transformers",)))
    engines = {"": ("float32", "int8"), "int8-weights": ("int8",), "int8": ("int8",)}.get(weights, ())
    for kind in engines:
        theirs: Callable = partial(_ctranslate2, compute_type=kind)
        needs = ("ctranslate2", "transformers")
        candidates.append(Candidate(f"CTranslate2 {kind}", theirs, needs, works_on=("cpu",), settle=0.25))
        if beams == 1:
            theirs, needs = partial(openvino_generation, weights=kind), ("openvino", "transformers")
            candidates.append(Candidate(f"OpenVINO {kind}", theirs, needs, works_on=("cpu",), settle=0.25))
    how = "greedy" if beams == 1 else f"beam {beams}"
    return Case(
        name=f"generation/{name}" + (weights and f"-{weights}"),
        title=f"{model}, {how}, {len(lengths)} prompts of up to {max(lengths)} tokens, {tokens} new tokens",
        inputs=partial(make_inputs, model, lengths, tokens, beams, device),
        candidates=tuple(candidates),
        peer=HF_SDPA,
        dtype=_WEIGHTS[weights][0],
        shape=f"{len(lengths)} x {max(lengths)}, {tokens} new",
        bar=Bar(bar),
        parts=_int8_parts if weights == "int8" else None,
        result=None,  # with random weights, rounding decides the next token; tests compare tokens with HF's
    )


def generation_cases(device: str) -> list[Case]:
    ragged = shapes.ragged_lengths(8, mean=24, longest=48)
    work = [
        ("gpt2-b1", "gpt2", [32], 64, 1, 1.2),
        ("gpt2-b8", "gpt2", [32] * 8, 64, 1, 2.0),
        ("marian-greedy-b8", "marian", ragged, 32, 1, 3.0),
        ("marian-beam4-b8", "marian", ragged, 32, 4, 3.0),
        ("t5-small-greedy-b8", "t5-small", ragged, 32, 1, 2.2),
        ("bart-base-beam4-b4", "bart-base", [512] * 4, 32, 4, 2.0),
    ]
    more = [
        ("nllb-600m-greedy-b8", "nllb-distilled-600m", ragged, 32, 1, 3.0),
        ("mbart-large-beam4-b8", "mbart-large", ragged, 32, 4, 3.0),
        *((f"{name}-b{rows}", name, [32] * rows, 64, 1, bar)
          for name in ("smollm-135m", "qwen3-0.6b") for rows, bar in ((1, 1.5), (8, 2.5))),
    ]  # fmt: skip
    cases = [_case(*w, device) for w in (*work, *more)]
    if device == "cuda":
        cases += [_case(*w, device, "bf16") for w in work[:3]]
    if device == "cpu":
        cases += [_case(*w, device, weights) for weights in ("in-place", "int8") for w in work]
        cases += [_case(*w, device, "int8") for w in more]
        for weights in ("bf16-weights", "int8-weights", "bf16"):
            cases += [_case(*work[0][:5], 2.2, device, weights), _case(*work[1][:5], 3.3, device, weights)]
    return cases
