"""int8 models under torch.compile, torch.export and torch.jit.trace, before and after their first call."""

import copy
import io
import pickle

import pytest
import torch
import transformers as hf
from torch import nn

import transformer_fast as tf
from transformer_fast.layers.quantized import COMPILER_SEES_MODULES

_BERT = {
    "vocab_size": 80, "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 144,
}  # fmt: skip
_T5 = {
    "vocab_size": 80, "d_model": 64, "d_kv": 16, "d_ff": 144, "num_layers": 1, "num_heads": 4,
    "decoder_start_token_id": 0, "use_cache": False,
}  # fmt: skip
IDS = torch.arange(5, 26).view(3, 7)
CALLS = {"bert": {"input_ids": IDS}, "t5": {"input_ids": IDS, "decoder_input_ids": IDS[:, :4]}}


def _model(library, family: str):
    torch.manual_seed(0)
    if family == "bert":
        return tf.quantize(library.BertForMaskedLM(hf.BertConfig(**_BERT)).eval())
    return tf.quantize(library.T5ForConditionalGeneration(hf.T5Config(**_T5)).eval())


def _close(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    """The same but for values of the inputs that round to another int8 number."""
    return bool((found - wanted).std() < 0.05 * wanted.std())


@pytest.mark.parametrize("family", CALLS)
@pytest.mark.parametrize("library", [tf, hf], ids=["ours", "theirs"])
@torch.no_grad()
def test_compile_before_the_first_call(library, family):
    """T5's own code reads the dtype of a weight before the layer is called."""
    model, call = _model(library, family), CALLS[family]
    wanted = copy.deepcopy(model)(**call).logits
    state = {k: v.clone() for k, v in model.state_dict().items()}
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert _close(compiled(**call).logits, wanted)
    assert _close(model(**call).logits, wanted)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


@torch.no_grad()
def test_compile_with_dynamic_shapes():
    model = _model(tf, "bert")
    compiled = torch.compile(model, backend="eager", fullgraph=True, dynamic=True)
    for ids in (IDS, IDS[:2, :5]):
        assert _close(compiled(ids).logits, copy.deepcopy(model)(ids).logits)


@torch.no_grad()
def test_new_weights_after_compiling():
    model, other = (tf.quantize(nn.Sequential(nn.Linear(64, 96))) for _ in range(2))
    x = torch.randn(3, 64)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    before = compiled(x)
    model.load_state_dict(other.state_dict())
    assert _close(compiled(x), other(x)) and not _close(before, other(x))


@torch.no_grad()
def test_export():
    """The graph has none of our ops, so it runs where this package is not installed. Its weights are buffers."""
    model = _model(tf, "bert")
    shapes = {"input_ids": {0: torch.export.Dim("batch"), 1: torch.export.Dim("length", max=40)}}
    program = torch.export.export(model, (), {"input_ids": IDS}, dynamic_shapes=shapes)
    assert not any("transformer_fast" in str(node.target) for node in program.graph.nodes)
    assert program.state_dict["bert.encoder.layer.0.output.dense.weight"].shape == (64, 144)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    ids = IDS[:2, :5]
    assert _close(torch.export.load(file).module()(input_ids=ids).logits, model(ids).logits)


_OLD = pytest.mark.skipif(not COMPILER_SEES_MODULES, reason="torch before 2.13 takes no module as a constant")


@pytest.mark.parametrize("strict", [False, pytest.param(True, marks=_OLD)])
@torch.no_grad()
def test_export_after_a_call(strict):
    model, x = tf.quantize(nn.Sequential(nn.Linear(64, 96))), torch.randn(3, 64)
    model(x)
    program = torch.export.export(model, (x,), strict=strict)
    assert not any("transformer_fast" in str(node.target) for node in program.graph.nodes)
    assert _close(program.module()(x), model(x))


def test_trace():
    model = _model(tf, "bert")
    traced = torch.jit.trace(model, (IDS,), strict=False)
    assert not any("transformer_fast" in node.kind() for node in traced.inlined_graph.nodes())
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    ids = IDS[:2, :5]
    assert _close(torch.jit.load(file)(ids)["logits"], model(ids).logits)


def test_the_older_onnx_exporter_is_refused(monkeypatch):
    """Its files cannot be run."""
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
    layer, x = tf.quantize(nn.Sequential(nn.Linear(64, 96)))[0], torch.randn(3, 64)
    with pytest.raises(ValueError, match=r"export\(dynamo=False\) cannot record int8 layers; export model.dequantize"):
        torch.jit.trace(layer, x)


@torch.no_grad()
def test_a_layer_that_is_traced_twice_has_one_copy_of_its_weight():
    layer = tf.quantize(nn.Sequential(nn.Linear(64, 96)))[0]
    x = torch.randn(3, 64)
    layer(x)
    traced = torch.jit.trace(lambda t: layer(t) + layer(t.flip(0)), x)
    graph = traced.inlined_graph
    constants = [n.output().toIValue() for n in graph.nodes() if n.kind() == "prim::Constant"]
    assert sum(isinstance(c, torch.Tensor) and c.shape == (96, 64) for c in constants) == 1
    assert _close(traced(x), layer(x) + layer(x.flip(0)))


@torch.no_grad()
def test_a_traced_layer_can_be_copied_saved_and_given_other_weights():
    model, x = tf.quantize(nn.Sequential(nn.Linear(64, 96))), torch.randn(3, 64)
    model(x)
    before = torch.jit.trace(model, x)
    assert torch.equal(copy.deepcopy(model)(x), model(x)) and torch.equal(
        pickle.loads(pickle.dumps(model))(x), model(x)
    )
    model.load_state_dict(tf.quantize(nn.Sequential(nn.Linear(64, 96))).state_dict())
    wanted = model(x)
    assert _close(torch.jit.trace(model, x)(x), wanted) and not _close(before(x), wanted)
