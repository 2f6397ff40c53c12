"""dequantize: the model in floating point again, with the rounded weights."""

import copy

import pytest
import torch
import transformers as hf
from torch import nn

import transformer_fast as tf
from transformer_fast.layers.quantized import Int8Linear

_CONFIG = {
    "vocab_size": 80, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 144,
}  # fmt: skip
_SEQ2SEQ = {
    "vocab_size": 80, "d_model": 64, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 144, "decoder_ffn_dim": 144, "pad_token_id": 0,
    "decoder_start_token_id": 2,
}  # fmt: skip
IDS = torch.arange(5, 26).view(3, 7)
FAMILIES = {
    "bert": ("BertForMaskedLM", lambda: hf.BertConfig(**_CONFIG)),
    "gpt2": ("GPT2LMHeadModel", lambda: hf.GPT2Config(vocab_size=80, n_embd=64, n_layer=2, n_head=4)),
    "marian": ("MarianMTModel", lambda: hf.MarianConfig(**_SEQ2SEQ)),
    "t5": ("T5ForConditionalGeneration", lambda: hf.T5Config(vocab_size=80, d_model=64, d_kv=16, d_ff=144, num_layers=1,
                                                            num_heads=4, decoder_start_token_id=0)),
}  # fmt: skip


def _model(family: str, library=tf):
    name, config = FAMILIES[family]
    torch.manual_seed(0)
    model = getattr(library, name)(config()).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("bias"):
                p.normal_(0, 0.1)
    return model


def _call(model) -> dict:
    return {"input_ids": IDS} | ({"decoder_input_ids": IDS[:, :4]} if model.config.is_encoder_decoder else {})


@pytest.mark.parametrize("library", [tf, hf], ids=["ours", "theirs"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_model_as_it_was_with_rounded_weights(family, library, tmp_path):
    wanted = _model(family, library)
    frozen = {name for name, p in wanted.named_parameters() if not p.requires_grad}
    model = tf.quantize(copy.deepcopy(wanted))
    model.save_pretrained(tmp_path / "int8")
    call = _call(model)
    low = model(**call).logits
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, Int8Linear) and name != "lm_head" and "decoder.weight" not in f"{name}.weight":
                weight, rounded = wanted.get_submodule(name).weight, module.dequantized()
                weight.copy_(rounded if weight.shape == rounded.shape and not _is_conv(wanted, name) else rounded.t())
    truth = wanted(**call).logits
    loaded = type(model).from_pretrained(tmp_path / "int8")
    for i, found in enumerate((tf.dequantize(model), loaded.dequantize())):
        logits = found(**call).logits
        assert (logits - truth).std() < 1e-5 * truth.std() < (logits - low).std()
        assert not any(isinstance(m, Int8Linear) for m in found.modules()) and not found.is_quantized
        assert {name for name, p in found.named_parameters() if not p.requires_grad} == frozen
        assert found.get_output_embeddings().weight is found.get_input_embeddings().weight  # tied, as before
        found.save_pretrained(tmp_path / f"{i}")
        assert "quantization" not in (tmp_path / f"{i}" / "config.json").read_text()
        again, info = getattr(hf, type(found).__name__).from_pretrained(tmp_path / f"{i}", output_loading_info=True)
        assert not any(info.values()) and again.state_dict().keys() == found.state_dict().keys()
        assert (again(**call).logits - truth).std() < 1e-5 * truth.std()
        found.train()(**call, labels=call.get("decoder_input_ids", IDS).contiguous()).loss.backward()
        assert all(p.grad is not None for p in found.parameters() if p.requires_grad)


def _is_conv(model, name: str) -> bool:
    return type(model.get_submodule(name)).__name__ == "Conv1D"


def test_an_output_layer_of_its_own_stays():
    """The weight of an output layer that is not a rounded copy of the embedding table is not replaced by it."""
    model = tf.quantize(_model("gpt2"))
    with torch.no_grad():
        model.transformer.wte.weight.normal_()
    rounded = model.lm_head.dequantized()
    assert torch.equal(model.dequantize().lm_head.weight, rounded)
    assert not torch.equal(model.transformer.wte.weight, rounded)


def test_any_module():
    layer = nn.Linear(64, 64)
    layer.bias.requires_grad_(False)
    model = nn.Sequential(layer, nn.ReLU(), layer, nn.Linear(64, 8)).train()
    x = torch.randn(3, 64)
    tf.quantize(model)
    wanted = model[0].dequantized()
    assert tf.dequantize(model) is model and not model.training
    assert type(model[0]) is nn.Linear and model[0] is model[2] and torch.equal(model[0].weight, wanted)
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["0.weight", "3.weight", "3.bias"]
    model.train()(x).sum().backward()
    assert model[0].weight.grad is not None
    # Quantised again, the weights are the same but for the last bits of the scales.
    again = tf.dequantize(tf.quantize(model), torch.bfloat16)
    assert {p.dtype for p in again.parameters()} == {torch.bfloat16}
    assert (again[0].weight.float() - wanted).abs().max() < 0.01 * wanted.abs().max()


def test_a_model_within_a_module():
    outer = copy.deepcopy(tf.quantize(nn.ModuleDict({"inner": _model("t5"), "other": nn.Linear(64, 64)})))
    inner = tf.dequantize(outer)["inner"]
    assert not inner.is_quantized and not hasattr(inner, "hf_quantizer")
    configs = [m.config for m in outer.modules() if hasattr(m, "config")]
    assert configs and not any(hasattr(c, "quantization_config") for c in configs)


def test_bad_input():
    for model, options, error, message in (
        (_model("bert"), {}, ValueError, "model: has no int8 layer"),
        ("bert", {}, TypeError, "model: wanted an nn.Module, got str"),
        (tf.quantize(_model("bert")), {"dtype": torch.int8}, ValueError, "dtype: wanted a floating-point dtype"),
        (Int8Linear.of(torch.randn(64, 64), None), {}, ValueError, "model: is itself an Int8Linear"),
    ):
        with pytest.raises(error, match=message):
            tf.dequantize(model, **options)
    with pytest.raises(ValueError, match="quantize your model in order to dequantize it"):
        _model("bert").dequantize()
