"""int8 checkpoints: which layers are int8 is in the files, whatever the head; broken files; models within models."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from torch import nn

import transformer_fast as tf
from transformer_fast.layers.quantized import Int8Linear

_CONFIG = {
    "vocab_size": 80, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 144,
}  # fmt: skip
IDS = torch.arange(5, 26).view(3, 7)
DENSE = "bert.encoder.layer.0.output.dense"


def _bert(head: str = "ForMaskedLM", **options):
    torch.manual_seed(0)
    return getattr(tf, f"Bert{head}")(hf.BertConfig(**_CONFIG, **options)).eval()


def _count(model) -> int:
    return sum(isinstance(m, Int8Linear) for m in model.modules())


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("int8")
    tf.quantize(_bert()).save_pretrained(folder / "mlm")
    tf.quantize(_bert("Model"), skip=["encoder.layer.1"]).save_pretrained(folder / "base")
    return folder


@torch.no_grad()
def test_other_heads(saved):
    """A layer that the checkpoint lacks is new: float32, initialised as usual. Names in skip are those of the head that
    was saved."""
    states = tf.BertModel.from_pretrained(saved / "base")(IDS).last_hidden_state
    model = tf.BertForSequenceClassification.from_pretrained(saved / "base", num_labels=100)
    assert torch.equal(model.bert(IDS).last_hidden_state, states)
    assert type(model.classifier) is nn.Linear and 0.01 < model.classifier.weight.std() < 0.04
    assert _count(model) == 6
    found = tf.quantized_modules(model).left
    assert found["classifier"] == "it came after the others were quantised"
    model = tf.BertForMaskedLM.from_pretrained(saved / "base")
    assert model(IDS).logits.isfinite().all() and _count(model) == 6
    assert _count(tf.BertModel.from_pretrained(saved / "mlm")) == 12


@torch.no_grad()
def test_layers_left_or_replaced_in_memory(tmp_path):
    """Layers that were hooked when the model was quantised, and heads that were replaced later, are read as saved."""
    model = _bert("ForSequenceClassification")
    hook = model.get_submodule(DENSE).register_forward_hook(lambda *_: None)
    tf.quantize(model)
    hook.remove()
    assert tf.quantized_modules(model)[DENSE] == "it came after the others were quantised"
    model.classifier, model.config.num_labels = nn.Linear(64, 100), 100
    model.save_pretrained(tmp_path)
    again = tf.BertForSequenceClassification.from_pretrained(tmp_path)
    assert _count(again) == 11 and torch.equal(again(IDS).logits, model(IDS).logits)


@torch.no_grad()
def test_models_within_models(tmp_path):
    """A model of transformers inside another module, or whose base alone was quantised, is saved as int8 too."""
    outer = nn.ModuleDict({"inner": _bert(), "other": nn.Linear(64, 64)})
    tf.quantize(outer, skip=["inner.bert.encoder.layer.1"])
    inner = outer["inner"]
    inner.save_pretrained(tmp_path / "inner")
    again = tf.BertForMaskedLM.from_pretrained(tmp_path / "inner")
    assert _count(again) == 8 and torch.equal(again(IDS).logits, inner(IDS).logits)
    assert again.config.quantization_config.skip == ["bert.encoder.layer.1"]
    model = _bert()
    tf.quantize(model.bert)
    model.save_pretrained(tmp_path / "base")
    again = tf.BertForMaskedLM.from_pretrained(tmp_path / "base")
    assert _count(again) == 12 and torch.equal(again(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("part", ["encoder", "encoder.block.0"])
@torch.no_grad()
def test_a_part_of_a_model(part, tmp_path):
    """T5's encoder has a configuration of its own; a layer has none."""
    torch.manual_seed(0)
    config = hf.T5Config(vocab_size=80, d_model=64, d_kv=16, d_ff=144, num_layers=1, num_heads=4)
    model = tf.T5ForConditionalGeneration(config).eval()
    tf.quantize(model.get_submodule(part), group=64)
    model.save_pretrained(tmp_path)
    again = tf.T5ForConditionalGeneration.from_pretrained(tmp_path)
    call = {"input_ids": IDS, "decoder_input_ids": IDS[:, :4]}
    assert _count(again) == _count(model) == 6 and torch.equal(again(**call).logits, model(**call).logits)


_W, _S = f"{DENSE}.weight", f"{DENSE}.weight_scale"
BROKEN = {
    "no scale": (lambda t: t.pop(_S), f"model.safetensors: {_W} is int8, but there is no {_S}"),
    "no weight": (lambda t: t.pop(_W), f"model.safetensors: there is a {_S}, but no {_W}"),
    "float weight": (
        lambda t: t.update({_W: t[_W].float()}),
        rf"{_W}: wanted int8 \(out, in\), as it has scales, got F32 \(64, 144\)",
    ),
    "few scales": (
        lambda t: t.update({_S: t[_S][:, :1].contiguous()}),
        rf"{_S}: wanted float32 \(64, 2\), for groups of 128 inputs .* the weight \(64, 144\), got F32 \(64, 1\)",
    ),
    "NaN": (lambda t: t[_S].fill_(float("nan")), f"{_S}: wanted finite numbers, got NaN"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_broken_tensors(saved, tmp_path, what):
    change, message = BROKEN[what]
    folder = shutil.copytree(saved / "mlm", tmp_path / "broken")
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    for library in (tf, hf):
        with pytest.raises(ValueError, match=message):
            library.BertForMaskedLM.from_pretrained(folder)


def test_broken_configuration(saved, tmp_path):
    folder = shutil.copytree(saved / "mlm", tmp_path / "broken")
    config = json.loads((folder / "config.json").read_text())
    for quantization, message in (
        (None, "holds quantised weights .* no quantization_config that is known here"),
        ({"quant_method": "transformer_fast_int4"}, "holds quantised weights"),
        ({"quant_method": "transformer_fast_int8", "group": 64}, r"wanted float32 \(64, 3\), for groups of 64"),
        (
            {"quant_method": "transformer_fast_int8", "skip": "cls"},
            "skip: wanted a list of names of modules, got 'cls'",
        ),
        ({"quant_method": "transformer_fast_int8", "groups": 64}, "groups: wanted skip and group"),
    ):
        changed = {k: v for k, v in config.items() if k != "quantization_config"}
        changed |= {} if quantization is None else {"quantization_config": quantization}
        (folder / "config.json").write_text(json.dumps(changed))
        with pytest.raises((ValueError, TypeError), match=message):
            tf.BertForMaskedLM.from_pretrained(folder)
    with pytest.raises(TypeError, match="quantization_config: wanted one such as transformer_fast.Int8Config"):
        tf.BertForMaskedLM.from_pretrained(saved / "mlm", quantization_config="int8")


@torch.no_grad()
def test_sharded(saved, tmp_path):
    model = tf.BertForMaskedLM.from_pretrained(saved / "mlm", device_map="cpu", dtype=torch.float16)
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert torch.equal(tf.BertForMaskedLM.from_pretrained(tmp_path)(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("imports", ["transformer_fast, transformers", "transformers, transformer_fast"])
def test_the_import_is_enough(saved, imports):
    """transformers reads int8 checkpoints once the package is imported, although no name of it was used."""
    code = f"""
import {imports}
model = transformers.AutoModelForMaskedLM.from_pretrained({str(saved / "mlm")!r})
print(type(model.{DENSE.replace(".0.", "[0].")}).__name__)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "Int8Linear", done.stderr
