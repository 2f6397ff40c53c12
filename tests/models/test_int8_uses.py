"""What users do to an int8 model after it was quantised: devices, weights, tying, pruning, Trainer, names to skip."""

import copy

import pytest
import torch
import transformers as hf
from torch import nn
from torch.nn.utils import parametrize, prune

import transformer_fast as tf
from transformer_fast.layers.quantized import Int8Linear

_CONFIG = {
    "vocab_size": 80, "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 144,
}  # fmt: skip
IDS = torch.arange(5, 26).view(3, 7)
X = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))


def _bert(head: str = "ForMaskedLM", library=tf, **options):
    torch.manual_seed(0)
    return getattr(library, f"Bert{head}")(hf.BertConfig(**_CONFIG, **options)).eval()


def _layer(called: bool) -> Int8Linear:
    torch.manual_seed(0)
    layer = tf.quantize(nn.Sequential(nn.Linear(64, 64)))[0]
    if called:
        layer(X)
    return layer


@pytest.mark.parametrize("called", [False, True])
@torch.no_grad()
def test_on_the_meta_device(called):
    model = tf.quantize(_bert())
    wanted, state = model(IDS).logits if called else None, model.state_dict()
    model.to("meta")
    assert model(IDS.to("meta")).logits.shape == (3, 7, 80)
    model.to_empty(device="cpu").load_state_dict(state)
    model.bert.embeddings.position_ids = torch.arange(512)[None]  # buffers that are not in the state dict
    model.bert.embeddings.token_type_ids = torch.zeros(1, 512, dtype=torch.long)
    assert wanted is None or torch.equal(model(IDS).logits, wanted)


@pytest.mark.parametrize("library", [tf, hf], ids=["ours", "theirs"])
@torch.no_grad()
def test_tie_weights_after_a_call(library):
    """transformers fits the bias of an output layer to its weight, which is in another layout after a call."""
    model = tf.quantize(_bert(library=library))
    logits = model(IDS).logits
    model.tie_weights()
    assert torch.equal(model(IDS).logits, logits) and isinstance(model.get_output_embeddings(), Int8Linear)


@torch.no_grad()
def test_half_and_float():
    """Where transformers only says that they are not supported."""
    model = tf.quantize(_bert())
    logits = model(IDS).logits
    low = model.half()(IDS).logits
    assert low.dtype == torch.float16 and (low - logits).std() < 0.05 * logits.std()
    assert model.float()(IDS).logits.dtype == torch.float32


@pytest.mark.parametrize("called", [False, True])
@torch.no_grad()
def test_a_weight_that_is_set_is_used(called):
    layer, other = _layer(called), Int8Linear.of(torch.randn(64, 64), None)
    wanted = other(X) + layer.bias
    layer.weight, layer.weight_scale = other.int8_weight().parts()
    torch.testing.assert_close(layer(X), wanted)


@pytest.mark.parametrize("called", [False, True])
@torch.no_grad()
def test_functional_call(called):
    layer, other = _layer(called), tf.quantize(nn.Sequential(nn.Linear(64, 64)))[0]
    wanted, state = copy.deepcopy(layer)(X), {k: t.clone() for k, t in layer.state_dict().items()}
    found = torch.func.functional_call(layer, other.state_dict(), (X,))
    assert torch.equal(found, other(X)) and not torch.equal(found, wanted)
    assert torch.equal(layer(X), wanted)
    assert all(torch.equal(t, state[k]) for k, t in layer.state_dict().items())
    assert torch.equal(layer.cpu()(X), wanted)


@pytest.mark.parametrize("called", [False, True])
def test_a_weight_is_not_pruned_or_parametrised(called):
    """Not silently, as the forward would not read the result."""
    with pytest.raises(ValueError, match="weight_orig: an int8 weight cannot be pruned or normalised"):
        prune.l1_unstructured(_layer(called), "weight", 0.5)
    layer = _layer(called)
    parametrize.register_parametrization(layer, "weight", nn.Identity(), unsafe=True)
    with pytest.raises(ValueError, match="weight: an int8 weight cannot be parametrised"):
        layer(X)
    layer = _layer(called)
    before = layer(X)
    prune.random_unstructured(layer, "bias", 63)
    assert not torch.equal(layer(X), before)


@pytest.mark.parametrize("strict", [False, True])
def test_int8_weights_do_not_become_floating_point(strict):
    state = tf.quantize(_bert()).state_dict()
    with pytest.raises(RuntimeError, match="state_dict: bert.encoder.*.query is int8, but the model's layer is not"):
        _bert().load_state_dict(state, strict=strict)
    with pytest.raises(ValueError, match="state_dict: holds quantised weights"):
        tf.BertForMaskedLM.from_pretrained(None, config=_bert().config, state_dict=state)


@pytest.mark.parametrize("library", [tf, hf], ids=["ours", "theirs"])
def test_trainer_evaluates_and_does_not_train(library, tmp_path):
    model = tf.quantize(_bert("ForSequenceClassification", library))
    rows = [{"input_ids": row, "labels": 1} for row in IDS]
    arguments = hf.TrainingArguments(str(tmp_path), report_to=[], use_cpu=True, disable_tqdm=True, max_steps=3)
    trainer = hf.Trainer(model=model, args=arguments, train_dataset=rows, eval_dataset=rows)
    with torch.no_grad():
        wanted = model(IDS, labels=torch.ones(3, dtype=torch.long))
    assert trainer.evaluate()["eval_loss"] == pytest.approx(wanted.loss.item(), rel=1e-4)
    assert torch.tensor(trainer.predict(rows).predictions).sub(wanted.logits).abs().max() < 1e-3
    with pytest.raises(ValueError, match="cannot be trained; train the model before it is quantised, or dequantize"):
        trainer.train()
    if library is tf:
        model.classifier.requires_grad_(True)
        before = model.classifier.weight.clone()
        hf.Trainer(model=model, args=arguments, train_dataset=rows).train()
        assert not torch.equal(model.classifier.weight, before)


def test_a_head_in_training_mode():
    """The rest stays in evaluation mode, so its dropout is off."""
    model = tf.quantize(_bert("ForSequenceClassification"))
    model.classifier.requires_grad_(True)
    assert [name for name, module in model.train().named_modules() if module.training] == ["classifier"]
    assert not any(module.training for module in model.eval().modules())


def test_names_to_skip(tmp_path):
    model = tf.quantize(_bert(), skip=["*.key", "cls", "cls.predictions.decoder"])
    key, query = (f"bert.encoder.layer.0.attention.self.{name}" for name in ("key", "query"))
    skipped = [name for name, why in tf.quantized_modules(model).left.items() if why == "it is in skip"]
    assert skipped == [key, "cls.predictions.transform.dense", "cls.predictions.decoder"]
    assert model.config.quantization_config.skip == [key, "cls"]
    for name, hint in (("query", f"; there is {query!r}, which '*.query' matches"), ("*.quer", ""), ("", "")):
        with pytest.raises(ValueError) as raised:
            tf.quantize(_bert(), skip=[name])
        assert str(raised.value) == f"skip: {name!r}: no such module in BertForMaskedLM{hint}"
    _bert().save_pretrained(tmp_path)
    model = tf.BertForMaskedLM.from_pretrained(tmp_path, quantization_config=tf.Int8Config(skip=["*.query"]))
    assert list(tf.quantized_modules(model).left) == [query] == model.config.quantization_config.skip
