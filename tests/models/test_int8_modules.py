"""What quantize accepts, which modules it leaves alone, and what an int8 model refuses."""

import concurrent.futures
import copy
import threading

import peft
import pytest
import torch
import transformers as hf
from torch import nn
from torch.nn.utils import prune

import transformer_fast as tf
from transformer_fast.layers.quantized import Int8Linear

_CONFIG = {
    "vocab_size": 80, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 144,
}  # fmt: skip
IDS = torch.arange(5, 26).view(3, 7)


def _bert(head: str = "ForMaskedLM", **options):
    torch.manual_seed(0)
    return getattr(tf, f"Bert{head}")(hf.BertConfig(**_CONFIG, **options)).eval()


def test_arguments():
    for options, error, message in (
        ({"skip": "cls"}, TypeError, "skip: wanted a list of names of modules, got 'cls'"),
        ({"skip": 3}, TypeError, "skip: wanted a list of names of modules, got 3"),
        ({"skip": [nn.Linear]}, TypeError, "skip: wanted names of modules, got <class"),
        ({"group": 128.0}, ValueError, "group: wanted one of 32, 64, 128, 256, got 128.0"),
        ({"precision": "INT8"}, ValueError, "precision: wanted one of int8, bf16, got 'INT8'"),
        ({"precision": "bf16", "skip": ["cls"]}, ValueError, 'skip, group: are for "int8" only'),
    ):
        with pytest.raises(error, match=message):
            tf.quantize(_bert(), **options)
    with pytest.raises(TypeError, match="groups: wanted skip and group"):
        tf.Int8Config(groups=64)
    assert tf.Int8Config(skip=None).skip == []
    with pytest.raises(ValueError, match="model: is itself a Linear, which cannot be replaced in place"):
        tf.quantize(nn.Linear(64, 64))
    with torch.device("meta"):
        model = _bert()
    with pytest.raises(ValueError, match="self.query: its weight is on the meta device"):
        tf.quantize(model)
    with pytest.warns(UserWarning, match="model: Sequential has no linear layer that can be int8"):
        tf.quantize(nn.Sequential(nn.Linear(64, 8), nn.Linear(0, 64)))
    with pytest.raises(TypeError, match="model: wanted an nn.Module, got str"):
        tf.quantized_modules("bert")
    with pytest.raises(ValueError, match="precision: wanted one of int8, bf16, got 'INT8'"):
        tf.accelerate(model := hf.BertModel(hf.BertConfig(**_CONFIG)), precision="INT8", verbose=False)
    assert type(model) is hf.BertModel


@torch.no_grad()
def test_what_is_not_plain_is_left_and_listed():
    torch.manual_seed(0)
    model = nn.ModuleDict(
        {
            "plain": nn.Linear(64, 64),
            "normed": nn.utils.parametrizations.weight_norm(nn.Linear(64, 64)),
            "pruned": prune.l1_unstructured(nn.Linear(64, 64), "weight", 0.5),
            "torch": nn.TransformerEncoderLayer(64, 4, 128, batch_first=True),
        }
    ).eval()
    x = torch.randn(2, 5, 64)
    before = {name: model[name](x) for name in ("normed", "pruned", "torch")}
    tf.quantize(model)
    assert tf.quantized_modules(model) == {
        "plain": "int8",
        "normed": "it is a ParametrizedLinear, not a plain linear layer",
        "pruned": "it has hooks, or a forward of its own",
        "torch.self_attn.out_proj": "it is a NonDynamicallyQuantizableLinear, not a plain linear layer",
        "torch.linear1": "the code of TransformerEncoderLayer reads its weight",
        "torch.linear2": "the code of TransformerEncoderLayer reads its weight",
    }
    for name, y in before.items():
        assert torch.equal(model[name](x), y)


@torch.no_grad()
def test_weights_that_other_code_reads():
    """MobileBERT's prediction head joins the weights of its layers, Mamba multiplies by one."""
    torch.manual_seed(0)
    sizes = {k: v for k, v in _CONFIG.items() if k != "num_hidden_layers"}
    bert = hf.MobileBertConfig(**sizes, num_hidden_layers=1, embedding_size=32, intra_bottleneck_size=64)
    mamba = hf.MambaConfig(vocab_size=80, hidden_size=64, num_hidden_layers=1)
    for model in (hf.MobileBertForMaskedLM(bert).eval(), hf.MambaForCausalLM(mamba).eval()):
        logits = model(IDS).logits
        low = tf.quantize(model)(IDS).logits
        assert (low - logits).std() < 0.05 * logits.std()
        found = tf.quantized_modules(model)
        assert any(why.startswith("the code of M") for why in found.left.values())
        assert len(found) > len(found.left)


@torch.no_grad()
def test_adapters_are_left_and_can_be_merged():
    model = peft.get_peft_model(
        _bert(), peft.LoraConfig(r=64, target_modules=["query"], init_lora_weights=False)
    ).eval()
    states = model(IDS).logits
    tf.quantize(model)
    found = tf.quantized_modules(model)
    assert {name for name in found.left if ".query." not in name} == set()
    assert sum("merge the adapter" in why for why in found.left.values()) == 6
    low = model(IDS).logits
    assert 0 < (low - states).std() < 0.05 * states.std()
    merged = model.merge_and_unload()
    assert (merged(IDS).logits - low).std() < 0.02 * states.std()
    assert type(merged.bert.encoder.layer[0].attention.self.query) is nn.Linear


@torch.no_grad()
def test_models_of_transformers_with_conv1d():
    """Whether or not this package's family of the model has been imported."""
    config = hf.GPT2Config(vocab_size=80, n_embd=64, n_layer=1, n_head=4)
    model = hf.GPT2LMHeadModel(config).eval()
    logits = model(IDS).logits
    low = tf.quantize(model)(IDS).logits
    assert not tf.quantized_modules(model).left
    assert (low - logits).std() < 0.05 * logits.std()


@torch.no_grad()
def test_what_an_int8_model_refuses():
    model = tf.quantize(_bert())
    with pytest.raises(ValueError, match="cannot be trained"):
        model.train()
    assert not any(m.training for m in model.modules())
    with pytest.raises(ValueError, match="new_num_tokens: the int8 output layer has 80 outputs .* got 90"):
        model.resize_token_embeddings(90)
    assert model.get_input_embeddings().weight.shape[0] == model.resize_token_embeddings(80).weight.shape[0] == 80
    base = tf.quantize(_bert("Model"))
    assert base.resize_token_embeddings(90).weight.shape[0] == 90
    assert base(IDS + 60).last_hidden_state.isfinite().all()


@torch.no_grad()
def test_float64():
    """In plain PyTorch, also after the weights have been laid out for the kernels."""
    model = tf.quantize(_bert())
    logits = model(IDS).logits
    found = model.double()(IDS).logits
    assert found.dtype == torch.float64 and (found - logits).std() < 0.02 * logits.std()


def test_a_head_trains_on_an_int8_base():
    model = tf.quantize(_bert("ForSequenceClassification", num_labels=3))
    model.classifier.requires_grad_(True)
    optimizer = torch.optim.SGD(model.classifier.parameters(), lr=0.5)
    losses = []
    for _ in range(20):
        loss = model(IDS, labels=torch.tensor([0, 1, 2])).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_explain():
    text = tf.explain(tf.quantize(_bert("ForSequenceClassification", num_labels=3)))
    assert "int8: 12 of 14 linear layers; not bert.pooler.dense (it reads one position of each sequence)" in text
    assert "int8" not in tf.explain(_bert())
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 8))
    assert "int8: 1 of 2 linear layers; not 1 (it has 8 outputs, under 64)" in tf.explain(tf.quantize(model))


@torch.no_grad()
def test_accelerate_twice():
    model = hf.BertModel(hf.BertConfig(**_CONFIG)).eval()
    tf.accelerate(model, precision="int8", verbose=False)
    states = model(IDS).last_hidden_state
    tf.accelerate(model, precision="int8", verbose=False)
    assert any(isinstance(m, Int8Linear) for m in model.modules())
    assert torch.equal(model(IDS).last_hidden_state, states)


def test_the_first_call_from_several_threads():
    layer = Int8Linear.of(torch.randn(256, 512), None)
    x = torch.randn(3, 512)
    wanted = copy.deepcopy(layer)(x)
    gate = threading.Barrier(4)

    def run(_):
        gate.wait()
        return layer(x)

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        assert all(torch.equal(found, wanted) for found in pool.map(run, range(4)))
    # A thread that saw no panels before another one made them:
    assert layer._in_int8() is layer.int8_weight()
    assert torch.equal(layer(x), wanted)


def test_memory_and_state_dict_do_not_change_with_the_first_call():
    model = tf.quantize(tf.BertModel(hf.BertConfig(hidden_size=128, num_hidden_layers=1, num_attention_heads=2,
                                                   intermediate_size=256, vocab_size=50)).eval())  # fmt: skip
    before, state = model.get_memory_footprint(), {k: v.clone() for k, v in model.state_dict().items()}
    model(torch.tensor([[1, 2, 3]]))
    assert model.get_memory_footprint() >= before
    after = model.state_dict()
    assert list(after) == list(state) and all(torch.equal(after[k], state[k]) for k in state)
    again = copy.deepcopy(model)
    assert again.get_memory_footprint() == model.get_memory_footprint()
    assert torch.equal(again(torch.tensor([[1, 2, 3]]))[0], model(torch.tensor([[1, 2, 3]]))[0])


@pytest.mark.parametrize("strict", [True, False])
def test_weights_in_floating_point_do_not_become_int8(strict):
    layer = Int8Linear.of(torch.randn(8, 64), torch.zeros(8))
    with pytest.raises(RuntimeError, match=r"weight: wanted int8, as this layer is quantised, got torch.float32"):
        layer.load_state_dict(nn.Linear(64, 8).state_dict(), strict=strict)
