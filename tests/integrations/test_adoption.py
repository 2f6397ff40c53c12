"""accelerate gives Hugging Face's models this package's classes in place, at any depth, and restores them."""

import copy
import pickle
import types

import peft
import pytest
import torch
import transformers as hf
from decoder_cases import config_for
from encoder_cases import encoder_config
from hf_models import ENCODERS, SEQ2SEQ, TEXT, batch, run
from torch import nn

import transformer_fast
from transformer_fast.integrations.adoption import class_for

MODELS = {**TEXT, **{f: lambda f=f: getattr(hf, f"{f}Model")(encoder_config(f)).eval()
                      for f in ("XLMRoberta", "Electra", "MPNet", "ModernBert", "DebertaV2")},
          **{f: lambda f=f: getattr(hf, f"{f}ForCausalLM")(config_for(f)).eval() for f in ("Phi", "OPT", "GPTNeo")},
          }  # fmt: skip
OURS = [name for name in MODELS if class_for(type(MODELS[name]()))]


def classes_of(model):
    return {name: type(module) for name, module in model.named_modules()}


def test_report_on_a_model_that_became_ours_as_a_whole():
    report = transformer_fast.accelerate(MODELS["bert"](), verbose=False)
    assert "  swapped: BertModel -> transformer_fast.BertModel" in str(report).splitlines()


def test_explain_says_where_there_are_no_kernels(monkeypatch):
    model = transformer_fast.BertModel(MODELS["bert"]().config)
    assert "kernels" not in transformer_fast.explain(model)
    monkeypatch.setattr("transformer_fast.backends.native.load", lambda: "there was no compiler")
    last = "  kernels: none, the fast path runs in plain PyTorch: there was no compiler"
    for text in (model.explain(), transformer_fast.explain(types.SimpleNamespace(model=model))):
        assert text.splitlines()[-1] == last


@pytest.mark.parametrize("what, came", [(hf.BertModel, "the class BertModel"), (3, "int")])
def test_explain_of_what_is_no_model(what, came):
    with pytest.raises(TypeError, match=f"wanted a model .* or a Call, got {came}"):
        transformer_fast.explain(what)


@pytest.mark.parametrize("family", OURS)
def test_becomes_ours_and_goes_back(family):
    model = MODELS[family]()
    inputs = batch("left", seq2seq=family in SEQ2SEQ)
    before, state = classes_of(model), {k: t.data_ptr() for k, t in model.state_dict().items()}
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    wanted = run(model, inputs)
    report = transformer_fast.accelerate(model, verbose=False)
    ours = getattr(transformer_fast, type(model).__name__)
    assert type(model) is ours and report.swapped == {"": f"transformer_fast.{ours.__name__}"} and not report.left
    assert {k: t.data_ptr() for k, t in model.state_dict().items()} == state
    assert "the fast path" in transformer_fast.explain(model) and model.why_hf_loop() == ""
    found = run(model, inputs)
    torch.testing.assert_close(found, wanted)
    imported = ours(copy.deepcopy(model.config)).eval()
    imported.load_state_dict(model.state_dict())
    assert torch.equal(run(imported, inputs), found)  # the same code runs
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(run(other, inputs), found) and "the fast path" in transformer_fast.explain(other)
    assert report.undo() is model and classes_of(model) == before
    assert {name: set(vars(module)) for name, module in model.named_modules()} == attributes
    assert torch.equal(run(model, inputs), wanted)


@pytest.mark.parametrize("family", ["gpt2", "bart", "t5", "llama"])
def test_generates_by_the_engine(family, monkeypatch):
    from transformer_fast.generation import mixin

    model = TEXT[family]()
    inputs = batch("left", seq2seq=False)
    wanted = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    transformer_fast.accelerate(model, verbose=False)
    used = []
    choose = mixin.choose_stepper
    monkeypatch.setattr(mixin, "choose_stepper", lambda *a: used.append(1) or choose(*a))
    assert torch.equal(model.generate(**inputs, max_new_tokens=6, do_sample=False), wanted) and used


class Classifier(nn.Module):
    """A user's model with one of Hugging Face's inside."""

    def __init__(self):
        super().__init__()
        self.encoder = ENCODERS["bert"]()
        self.head = nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 3))

    def forward(self, **inputs):
        return self.head(self.encoder(**inputs).last_hidden_state[:, 0])


def test_inside_a_module_of_the_user():
    model, inputs = Classifier().eval(), batch("right")
    wanted = model(**inputs)
    report = transformer_fast.accelerate(model, verbose=False)
    assert report.swapped == {"encoder": "transformer_fast.BertModel", "head.0": "layer_norm"}
    torch.testing.assert_close(model(**inputs), wanted)
    model(**inputs).sum().backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if "pooler" not in name)
    report.undo()
    assert type(model.encoder) is hf.BertModel and type(model.head[0]) is nn.LayerNorm


def test_inside_a_pipeline_and_peft():
    model, inputs = TEXT["gpt2"](), batch("none")
    adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["c_attn"], r=2,
                                                         init_lora_weights=False, fan_in_fan_out=True))  # fmt: skip
    wanted = adapted(**inputs).logits
    assert transformer_fast.accelerate(adapted, verbose=False).swapped == {
        "base_model.model": "transformer_fast.GPT2LMHeadModel"
    }
    torch.testing.assert_close(adapted(**inputs).logits, wanted)

    class Holder:
        def __init__(self, model):
            self.model = model

    holder = Holder(TEXT["bert"]())
    transformer_fast.accelerate(holder, verbose=False)
    assert type(holder.model) is transformer_fast.BertModel


@pytest.mark.parametrize("name", ["Albert", "Bert", "Camembert", "MPNet", "Roberta", "XLMRoberta"])
def test_made_without_its_pooler(name):
    kind = getattr(hf, f"{name}Model")
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
             "vocab_size": 99, "pad_token_id": 0, "max_position_embeddings": 64}  # fmt: skip
    model = kind(kind.config_class(**small), add_pooling_layer=False).eval()
    ids = torch.randint(1, 99, (2, 7))
    wanted = model(ids).last_hidden_state
    assert not transformer_fast.accelerate(model, verbose=False).left
    assert type(model) is getattr(transformer_fast, f"{name}Model")
    torch.testing.assert_close(model(ids).last_hidden_state, wanted)


def replaced(model):
    model.encoder.layer[0].intermediate.intermediate_act_fn = nn.Tanh()


def hooked(model):
    model.encoder.layer[1].attention.register_forward_hook(lambda *a: None)


def wrapped(model):
    model.pooler.forward = lambda states: states[:, 0]


REASONS = {
    "replaced": (replaced, "intermediate_act_fn is a torch Tanh in place of a GELUActivation"),
    "hooked": (hooked, r"encoder\.layer\.1\.attention has a forward hook"),
    "wrapped": (wrapped, "pooler has a forward of its own"),
}


@pytest.mark.parametrize("name", REASONS)
def test_what_is_somebody_s_own_is_left_with_its_reason(name):
    import re

    change, reason = REASONS[name]
    model, inputs = TEXT["bert"](), batch("none")
    change(model)
    wanted = run(model, inputs)
    report = transformer_fast.accelerate(model, verbose=False)
    assert type(model) is hf.BertModel and re.search(reason, report.left[""]) and report.swapped  # only swapped
    torch.testing.assert_close(run(model, inputs), wanted)
    report.undo()
    assert torch.equal(run(model, inputs), wanted)


def test_a_subclass_is_left():
    class Own(hf.BertModel):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs)

    model = Own(TEXT["bert"]().config)
    report = transformer_fast.accelerate(model, verbose=False)
    assert type(model) is Own and "subclass" in report.left[""]


def test_second_call_and_no_adoption():
    model = TEXT["bert"]()
    transformer_fast.accelerate(model, verbose=False)
    again = transformer_fast.accelerate(model, verbose=False)
    assert not again.swapped and "run on its kernels already" in str(again.left)
    other = TEXT["bert"]()
    transformer_fast.accelerate(other, adopt=False, verbose=False)
    assert type(other) is hf.BertModel


def test_precision():
    from transformer_fast.backends import native

    if native.load():
        pytest.skip(native.load())
    model = TEXT["bert"]()
    inputs = batch("right")
    wanted = run(model, inputs)
    with torch.no_grad():
        transformer_fast.accelerate(model, precision="int8", verbose=False)
        found = run(model, inputs)
    cosine = torch.nn.functional.cosine_similarity(found, wanted, dim=-1)
    assert cosine.min() > 0.99 and not torch.equal(found, wanted)
    with pytest.raises(ValueError, match="precision: no part of Linear"):
        transformer_fast.accelerate(nn.Linear(2, 2), precision="int8")
    with pytest.raises(ValueError, match="int3"):
        transformer_fast.accelerate(TEXT["bert"](), precision="int3")


def test_bad_input():
    with pytest.raises(TypeError, match="model: wanted a torch.nn.Module or an object with a `model`, got str"):
        transformer_fast.accelerate("bert")
