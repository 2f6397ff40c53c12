"""Models in int8: accuracy, every family, saving and loading, and what is refused."""

import copy

import pytest
import torch
import transformers as hf
from numerics import assert_as_accurate
from torch import nn

import transformer_fast as tf
from transformer_fast.backends import eager_int8
from transformer_fast.generation.native_step import NativeStepper
from transformer_fast.generation.stepper import Prompt
from transformer_fast.layers.quantized import Int8Linear
from transformer_fast.verify import VerifyError
from transformer_fast.verify_precision import verify_precision

LENGTHS = (9, 4, 1, 7)
_WIDE = {
    "vocab_size": 80,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 144,
}
_SEQ2SEQ = {
    "vocab_size": 80, "d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 144, "decoder_ffn_dim": 144, "max_position_embeddings": 40,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2, "forced_eos_token_id": None,
}  # fmt: skip
_T5 = {
    "vocab_size": 80, "d_model": 64, "d_kv": 16, "d_ff": 144, "num_layers": 2, "num_heads": 4,
    "relative_attention_num_buckets": 8, "pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0,
}  # fmt: skip
_GPT = {"vocab_size": 80, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 40}
FAMILIES = {
    "bert": ("BertForMaskedLM", lambda: hf.BertConfig(**_WIDE)),
    "distilbert": (
        "DistilBertForMaskedLM",
        lambda: hf.DistilBertConfig(vocab_size=80, dim=64, n_layers=2, n_heads=4, hidden_dim=144),
    ),
    "albert": ("AlbertForMaskedLM", lambda: hf.AlbertConfig(**_WIDE, embedding_size=64)),
    "roberta": ("RobertaForMaskedLM", lambda: hf.RobertaConfig(**_WIDE)),
    "electra": ("ElectraForMaskedLM", lambda: hf.ElectraConfig(**_WIDE, embedding_size=128)),
    "mpnet": ("MPNetForMaskedLM", lambda: hf.MPNetConfig(**_WIDE)),
    "modernbert": ("ModernBertForMaskedLM", lambda: hf.ModernBertConfig(**_WIDE, local_attention=4, pad_token_id=0)),
    "deberta-v2": (
        "DebertaV2ForMaskedLM",
        lambda: hf.DebertaV2Config(**_WIDE, relative_attention=True, pos_att_type=["c2p", "p2c"], position_buckets=4),
    ),
    "gpt2": ("GPT2LMHeadModel", lambda: hf.GPT2Config(**_GPT, bos_token_id=1, eos_token_id=2, pad_token_id=0)),
    "openai-gpt": ("OpenAIGPTLMHeadModel", lambda: hf.OpenAIGPTConfig(**_GPT)),
    "gpt_neox": ("GPTNeoXForCausalLM", lambda: hf.GPTNeoXConfig(**_WIDE, bos_token_id=1)),
    "phi": ("PhiForCausalLM", lambda: hf.PhiConfig(**_WIDE)),
    "opt": ("OPTForCausalLM", lambda: hf.OPTConfig(**_WIDE, ffn_dim=144, bos_token_id=1)),
    "bart": ("BartForConditionalGeneration", lambda: hf.BartConfig(**_SEQ2SEQ)),
    "marian": ("MarianMTModel", lambda: hf.MarianConfig(**_SEQ2SEQ, activation_function="swish")),
    "m2m_100": ("M2M100ForConditionalGeneration", lambda: hf.M2M100Config(**_SEQ2SEQ)),
    "umt5": ("UMT5ForConditionalGeneration", lambda: hf.UMT5Config(**_T5)),
    "mbart": ("MBartForConditionalGeneration", lambda: hf.MBartConfig(**_SEQ2SEQ)),
    "t5": ("T5ForConditionalGeneration", lambda: hf.T5Config(**_T5)),
    "t5-v1.1": (
        "T5ForConditionalGeneration",
        lambda: hf.T5Config(**_T5, feed_forward_proj="gated-gelu", tie_word_embeddings=False),
    ),
    "transformer": (
        "TransformerForConditionalGeneration",
        lambda: tf.TransformerConfig(
            vocab_size=80, d_model=64, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
            decoder_attention_heads=4, encoder_ffn_dim=144, decoder_ffn_dim=144,
        ),
    ),
}  # fmt: skip
GENERATING = ("gpt2", "openai-gpt", "gpt_neox", "phi", "opt", "bart", "marian", "mbart", "m2m_100", "umt5", "t5",
              "t5-v1.1", "transformer")  # fmt: skip


def _model(family: str):
    name, config = FAMILIES[family]
    torch.manual_seed(1)
    model = getattr(tf, name)(config()).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.2 * torch.randn(p.shape) if p.dim() > 1 else p + 0.1 * torch.randn(p.shape))
    return model


def _inputs(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mask = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
    ids = torch.randint(5, 80, mask.shape, generator=generator).masked_fill(~mask, 0)
    found = {"input_ids": ids, "attention_mask": mask.long()}
    if model.config.is_encoder_decoder:
        found["decoder_input_ids"] = torch.randint(5, 80, (len(LENGTHS), 6), generator=generator)
    return found, mask if "decoder_input_ids" not in found else torch.ones(len(LENGTHS), 6, dtype=torch.bool)


class _Simulated(nn.Module):
    """The reference of an int8 layer, in plain PyTorch."""

    def __init__(self, of: Int8Linear):
        super().__init__()
        self.q, self.scale = of.int8_weight().parts()
        self.weight, self.bias, self.group = self.q, of.bias, of.group

    def forward(self, x):
        y = eager_int8.linear_int8(x.reshape(-1, x.shape[-1]), self.q, self.scale, self.group)
        return eager_int8.finish(y, self.bias, None, x.dtype).view(*x.shape[:-1], -1)


def _simulated(model):
    """The model with the reference in place of each int8 layer; each is called as a module."""
    model = copy.deepcopy(model)
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if isinstance(child, Int8Linear):
                parent._modules[name] = _Simulated(child)
    return model


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_outputs_are_as_accurate_as_the_definition(family):
    """The only error is that of the quantisation: it is not larger than that of the reference."""
    model = _model(family)
    inputs, real = _inputs(model)
    truth = copy.deepcopy(model).double()(**inputs).logits[real]
    found = tf.quantize(model, "int8")
    assert found is model and not model.training
    left = tf.quantized_modules(model).left
    assert not left, left
    logits = model(**inputs).logits[real]
    assert_as_accurate(logits, truth, _simulated(model)(**inputs).logits[real])
    assert not torch.equal(logits, truth.float())


@pytest.mark.parametrize("family", GENERATING)
@torch.no_grad()
def test_generates(family):
    model = tf.quantize(_model(family), "int8")
    inputs, _ = _inputs(model)
    prompt = {"input_ids": inputs["input_ids"][:1, :5]}
    for options in ({}, {"num_beams": 3}):
        found = model.generate(**prompt, max_new_tokens=8, do_sample=False, **options)
        assert found.shape[0] == 1 and found.shape[1] > 1
    # The likeliest token after each prefix, from the forward without a cache.
    ids = model.generate(**prompt, max_new_tokens=8, do_sample=False)[0]
    start = 0 if model.config.is_encoder_decoder else 4
    for end in range(start + 1, len(ids)):
        given = {"decoder_input_ids": ids[None, :end]} if model.config.is_encoder_decoder else {}
        logits = model(**(prompt | given if given else {"input_ids": ids[None, :end]})).logits[0, -1]
        # Equal, except where rounding changes a quantised value by one step.
        assert logits[ids[end]] >= logits.max() - 0.05 * logits.std()


@pytest.mark.parametrize("rows", [1, 3, 30])
@pytest.mark.parametrize("family", GENERATING)
@torch.no_grad()
def test_native_step_computes_in_int8(family, rows):
    """One native call per token, as close to float64 as the reference."""
    _check_native_step(_model(family), rows)


@torch.no_grad()
def test_native_step_with_long_groups():
    torch.manual_seed(1)
    model = tf.GPT2LMHeadModel(hf.GPT2Config(**_GPT | {"n_inner": 768})).eval()
    _check_native_step(model, 3)
    assert [m.group for m in model.transformer.h[0].modules() if isinstance(m, Int8Linear)] == [128, 128, 128, 256]


def _check_native_step(model, rows):
    torch.manual_seed(4)
    ids, given = torch.randint(5, 80, (rows, 7)), {}
    if model.config.is_encoder_decoder:
        given = {"encoder_outputs": model.get_encoder()(torch.randint(5, 80, (rows, 9)))}
    name = "decoder_input_ids" if given else "input_ids"
    double = copy.deepcopy(model).double()
    wide = {k: type(v)(last_hidden_state=v[0].double()) for k, v in given.items()}
    truth = double(**{name: ids}, **wide).logits[:, -1]
    tf.quantize(model, "int8")
    simulated = _simulated(model)(**{name: ids}, **given).logits[:, -1]
    prompt = Prompt(ids[:, :5], 1, 12, given)
    assert NativeStepper.why_not(model, prompt) == ""
    stepper = NativeStepper(model, prompt)
    stepper.start()
    stepper.step(ids[:, 5])
    assert_as_accurate(stepper.step(ids[:, 6]), truth, simulated)


@torch.no_grad()
def test_native_step_is_the_same_on_any_number_of_threads():
    """Inputs quantised within a phase and inputs quantised in a separate phase have the same bits."""
    torch.manual_seed(1)
    config = hf.GPT2Config(vocab_size=80, n_embd=256, n_layer=2, n_head=4, n_inner=2048, n_positions=40)
    model = tf.quantize(tf.GPT2LMHeadModel(config).eval(), "int8")
    ids, before, found = torch.randint(5, 80, (3, 6)), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            stepper = NativeStepper(model, Prompt(ids[:, :5], 1, 12))
            stepper.start()
            stepper.step(ids[:, 5])
            # The prompt's keys and values are replaced: their rounding depends on the number of threads.
            for t in (stepper._cache.keys, stepper._cache.values):
                t.copy_(torch.randn(t.shape, generator=torch.Generator().manual_seed(2)))
            found.append(stepper.step(ids[:, 5]).clone())
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(found[0], f) for f in found[1:])


@torch.no_grad()
def test_keys_of_decoding_are_bfloat16():
    """The native step stores keys in bfloat16, half the memory; callers get them in the model's dtype."""
    model = tf.quantize(_model("gpt2"), "int8")
    stepper = NativeStepper(model, Prompt(torch.randint(5, 80, (2, 5)), 1, 12))
    stepper.start()
    assert stepper._cache.keys.dtype == stepper._cache.values.dtype == torch.bfloat16
    assert all(t.dtype == torch.float32 for pair in stepper.key_values() for t in pair)
    partly = tf.quantize(_model("gpt2"), "int8", skip=[f"transformer.h.{i}.attn.c_attn" for i in range(2)])
    stepper = NativeStepper(partly, Prompt(torch.randint(5, 80, (2, 5)), 1, 12))
    stepper.start()
    assert stepper._cache.keys.dtype == torch.float32


@pytest.mark.parametrize("family", ["bert", "gpt2", "t5"])
@torch.no_grad()
def test_saved_and_loaded(family, tmp_path):
    model = _model(family)
    cls, inputs = type(model), _inputs(model)[0]
    model.save_pretrained(tmp_path / "float")
    whole = sum(f.stat().st_size for f in (tmp_path / "float").glob("*.safetensors"))
    logits = tf.quantize(model, "int8")(**inputs).logits
    model.save_pretrained(tmp_path / "int8")
    saved = sum(f.stat().st_size for f in (tmp_path / "int8").glob("*.safetensors"))
    assert saved < 0.6 * whole
    again = cls.from_pretrained(tmp_path / "int8")
    assert torch.equal(again(**inputs).logits, logits)
    assert torch.equal(copy.deepcopy(again)(**inputs).logits, logits)
    assert again.state_dict().keys() == model.state_dict().keys()
    # Quantised during loading of a floating-point checkpoint, with our class and with Hugging Face's.
    on_the_way = cls.from_pretrained(tmp_path / "float", quantization_config=tf.Int8Config())
    assert torch.equal(on_the_way(**inputs).logits, logits)
    on_the_way.save_pretrained(tmp_path / "again")
    assert torch.equal(cls.from_pretrained(tmp_path / "again")(**inputs).logits, logits)
    theirs = getattr(hf, cls.__name__).from_pretrained(tmp_path / "int8")
    assert any(isinstance(m, Int8Linear) for m in theirs.modules())
    assert theirs(**inputs).logits.isfinite().all()


@torch.no_grad()
def test_groups_are_saved(tmp_path):
    """Layers with many inputs have groups of 256. Checkpoints with groups of 128 in all layers stay as they are."""
    torch.manual_seed(0)
    model = tf.BertModel(hf.BertConfig(**_WIDE | {"intermediate_size": 768})).eval()
    model.save_pretrained(tmp_path / "float")
    for group in (128, 256):
        model = tf.quantize(tf.BertModel.from_pretrained(tmp_path / "float"), "int8", group=group)
        model.save_pretrained(tmp_path / f"{group}")
        again = tf.BertModel.from_pretrained(tmp_path / f"{group}")
        assert {m.in_features: m.group for m in again.modules() if isinstance(m, Int8Linear)} == {64: 128, 768: group}
        inputs = _inputs(model)[0]
        assert torch.equal(again(**inputs).last_hidden_state, model(**inputs).last_hidden_state)
    default = tf.BertModel.from_pretrained(tmp_path / "float", quantization_config=tf.Int8Config())
    assert torch.equal(default(**inputs).last_hidden_state, model(**inputs).last_hidden_state)


def test_what_is_left_alone():
    model = tf.BertForSequenceClassification(hf.BertConfig(**_WIDE, num_labels=3)).eval()
    tf.quantize(model, "int8", skip=["bert.encoder.layer.1.output"], group=64)
    left = tf.quantized_modules(model).left
    assert left == {
        "bert.pooler.dense": "it reads one position of each sequence",
        "bert.encoder.layer.1.output.dense": "it is in skip",
        "classifier": "it has 3 outputs, under 64",
    }
    assert model.bert.encoder.layer[0].output.dense.group == 64
    with torch.no_grad():
        assert model(**_inputs(model)[0]).logits.shape == (4, 3)


def test_bad_input(tmp_path):
    model = _model("bert")
    with pytest.raises(ValueError, match="precision: wanted one of int8, bf16, got 'int4'"):
        tf.quantize(model, "int4")
    with pytest.raises(ValueError, match="skip: 'bert.encodr': no such module in BertForMaskedLM"):
        tf.quantize(model, "int8", skip=["bert.encodr"])
    with pytest.raises(ValueError, match="group: wanted one of 32, 64, 128, 256, got 100"):
        tf.Int8Config(group=100)
    weight = model.bert.encoder.layer[1].output.dense.weight
    kept = weight[2, 3].item()
    with torch.no_grad():
        weight[2, 3] = float("nan")
    with pytest.raises(ValueError, match=r"bert.encoder.layer.1.output.dense: weight: wanted finite numbers"):
        tf.quantize(model, "int8")
    assert not any(isinstance(m, Int8Linear) for m in model.modules())
    with torch.no_grad():
        weight[2, 3] = kept
    tf.quantize(model, "int8")
    with pytest.raises(ValueError, match="model: is quantised already"):
        tf.quantize(model, "int8")
    with pytest.raises(ValueError, match="an int8 model is for inference and cannot be trained"):
        model.train()
    with pytest.raises(ValueError, match="input: int8 weights have no gradient"):
        model(inputs_embeds=torch.randn(1, 3, 64, requires_grad=True))


def test_bfloat16_where_it_is_multiplied(monkeypatch):
    from transformer_fast import quantization

    monkeypatch.setattr(quantization.native, "current_isa", lambda: "avx512_bf16")
    monkeypatch.setattr(quantization.native, "load", lambda: "")
    assert tf.quantize(_model("bert"), "bf16").dtype == torch.bfloat16
    monkeypatch.setattr(quantization.native, "current_isa", lambda: "avx2")
    with pytest.warns(UserWarning, match="no instructions that multiply bfloat16"):
        assert tf.quantize(_model("bert"), "bf16").dtype == torch.float32


@torch.no_grad()
def test_follows_the_model_about():
    """Casts, copies and state dicts have the original weight."""
    model = tf.quantize(_model("bert"), "int8")
    inputs = _inputs(model)[0]
    logits = model(**inputs).logits
    state = {k: v.clone() for k, v in model.state_dict().items()}
    assert state["bert.encoder.layer.0.output.dense.weight"].shape == (64, 144)
    model.load_state_dict(state)
    assert torch.equal(model(**inputs).logits, logits)
    model.to(torch.bfloat16)
    assert model.bert.encoder.layer[0].output.dense.weight_scale.dtype == torch.float32
    low = model(**inputs).logits
    assert low.dtype == torch.bfloat16 and (low.float() - logits).std() < 0.05 * logits.std()


def test_verify_says_what_it_costs(tmp_path):
    """The cost of no change is zero, that of int8 is small and that of a broken weight large."""
    model = _model("gpt2")
    model.save_pretrained(tmp_path)
    report = verify_precision(tmp_path, "int8")
    costs = {cost.what: cost.value for cost in report.costs}
    assert report.model == "GPT2LMHeadModel" and report.text.startswith("random tokens") and not report.left
    assert report.megabytes[1] < 0.6 * report.megabytes[0]
    mean, least = (float(t) for t in costs["token cosine"].split(", least "))
    assert 0.99 < mean < 1 and 0.9 < least < mean
    assert float(costs["likeliest output the same"][:-1]) > 80
    assert set(costs) >= {"nearest sentence the same", "generated tokens the same"}
    with pytest.raises(VerifyError, match="precision: wanted one of int8, bf16, got int3"):
        verify_precision(tmp_path, "int3")
    with pytest.raises(VerifyError, match="cannot be loaded|no such|does not"):
        verify_precision(tmp_path / "nowhere", "int8")


def test_verify_command(tmp_path):
    from typer.testing import CliRunner

    from transformer_fast import commands

    _model("bert").save_pretrained(tmp_path)
    result = CliRunner().invoke(commands.app, ["verify", str(tmp_path), "--precision", "int8"])
    assert result.exit_code == 0, result.output
    assert "token cosine" in result.output and "MB become" in result.output


@pytest.mark.parametrize("family", ["bert", "distilbert", "albert", "gpt2", "t5", "bart"])
@torch.no_grad()
def test_what_follows_attention_is_one_op(family, monkeypatch):
    from transformer_fast.layers import stack

    calls, block = [], stack.int8_block
    monkeypatch.setattr(stack, "int8_block", lambda *args: calls.append(args) or block(*args))
    model = tf.quantize(_model(family), "int8")
    model(**_inputs(model)[0])
    assert len(calls) == 2  # two layers; those with cross-attention have no such call


@torch.no_grad()
def test_models_of_hugging_face(tmp_path):
    """In a model that is not ours, linear layers become ours; it is saved and loaded by its own class."""
    torch.manual_seed(2)
    model = hf.RobertaModel(hf.RobertaConfig(**_WIDE, max_position_embeddings=40)).eval()
    mask = torch.arange(9) < torch.tensor(LENGTHS)[:, None]
    inputs = {"input_ids": torch.randint(5, 80, mask.shape), "attention_mask": mask.long()}
    truth = copy.deepcopy(model).double()(**inputs).last_hidden_state[mask]
    found = tf.quantize(model)(**inputs).last_hidden_state[mask]
    assert list(tf.quantized_modules(model).left) == ["pooler.dense"]
    assert_as_accurate(found, truth, _simulated(model)(**inputs).last_hidden_state[mask])
    model.save_pretrained(tmp_path)
    again = hf.RobertaModel.from_pretrained(tmp_path)
    assert torch.equal(again(**inputs).last_hidden_state[mask], found)


@torch.no_grad()
def test_compiles():
    model = tf.quantize(_model("bert"), "int8")
    inputs = _inputs(model)[0]
    compiled = torch.compile(model, backend="eager")
    logits = compiled(**inputs).logits
    assert_as_accurate(logits, model(**inputs).logits.double(), _simulated(model)(**inputs).logits)
