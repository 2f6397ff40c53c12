"""accelerate and restore: swapped modules compute the same, the report names what is left, and undo is exact."""

import copy
import io
import pickle

import pytest
import torch
import transformers as hf
from hf_models import SEQ2SEQ, TEXT, batch, cast, run, run_with_gradients, truth, vit
from numerics import GRADIENT, assert_as_accurate, pooled
from torch import nn

import transformer_fast
from transformer_fast.integrations.swaps import Swapped

ATTENTION = 'attn_implementation="transformer_fast"'
KINDS = {
    "bert": {ATTENTION, "layer_norm", "gelu"},
    "ernie": {ATTENTION, "layer_norm", "gelu"},
    "distilbert": {ATTENTION, "layer_norm", "gelu"},
    "albert": {ATTENTION, "layer_norm", "gelu_tanh"},
    "gpt2": {ATTENTION, "layer_norm", "gelu_tanh"},
    "gpt_neox": {ATTENTION, "layer_norm", "gelu"},
    "llama": {ATTENTION, "rms_norm", "silu"},
    "mistral": {ATTENTION, "rms_norm", "silu"},
    "gemma2": {ATTENTION, "rms_norm (1 + weight)", "gelu_tanh"},
    "t5": {ATTENTION, "rms_norm", "gelu_tanh"},
    "bart": {ATTENTION, "layer_norm", "gelu"},
    "marian": {ATTENTION, "layer_norm", "gelu"},
    "mbart": {ATTENTION, "layer_norm", "gelu"},
    "pegasus": {ATTENTION, "layer_norm", "gelu"},
    "m2m_100": {ATTENTION, "layer_norm"},
    "mt5": {ATTENTION, "rms_norm", "gelu_tanh"},
    "umt5": {ATTENTION, "rms_norm", "gelu_tanh"},
}


def _classes(model):
    return {name: type(module) for name, module in model.named_modules()}


@pytest.mark.parametrize("family", TEXT)
def test_swaps_what_there_is_and_computes_the_same(family):
    model = TEXT[family]()
    inputs = batch("left", seq2seq=family in SEQ2SEQ)
    true_out, true_grads = run_with_gradients(truth(model), inputs)
    for dtype in (torch.float32, torch.bfloat16):
        eager_out, eager_grads = run_with_gradients(cast(model, dtype), inputs)
        fast = cast(model, dtype)
        report = transformer_fast.accelerate(fast, adopt=False, verbose=False)
        assert set(report.swapped.values()) == KINDS[family] and not report.left
        out, grads = run_with_gradients(fast, inputs)
        assert_as_accurate(out, true_out, eager_out, name=f"{family} {dtype}")
        assert_as_accurate(
            pooled(grads, true_grads), pooled(true_grads, true_grads), pooled(eager_grads, true_grads), GRADIENT,
            name=f"{family} {dtype} gradients",
        )  # fmt: skip


@pytest.mark.quick
def test_undo_is_exact():
    model, inputs = TEXT["llama"](), batch("right")
    classes, keys, before = _classes(model), list(model.state_dict()), run(model, inputs)
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    report = transformer_fast.accelerate(model, adopt=False, verbose=False)
    assert list(model.state_dict()) == keys and model.config._attn_implementation == "transformer_fast"
    assert all(isinstance(module, classes[name]) for name, module in model.named_modules())
    assert {name: cls.__name__ for name, cls in _classes(model).items()} == {n: c.__name__ for n, c in classes.items()}
    assert report.undo() is model
    assert _classes(model) == classes and model.config._attn_implementation == "eager"
    assert {name: set(vars(module)) for name, module in model.named_modules()} == attributes
    assert torch.equal(run(model, inputs), before)


def test_second_call_finds_nothing_more():
    model = TEXT["bert"]()
    first = transformer_fast.accelerate(model, adopt=False, verbose=False)
    classes = _classes(model)
    second = transformer_fast.accelerate(model, adopt=False, verbose=False)
    assert first.swapped and not second.swapped and _classes(model) == classes
    second.undo()
    assert model.config._attn_implementation == "eager"
    assert not any(isinstance(module, Swapped) for module in model.modules())


def test_restore_leaves_other_models_alone():
    model = TEXT["bert"]()
    classes = _classes(model)
    assert transformer_fast.restore(model) is model and _classes(model) == classes


def test_implementation_chosen_at_loading_stays_after_restore():
    model = cast(TEXT["bert"](), torch.float32, "transformer_fast")
    report = transformer_fast.accelerate(model, adopt=False, verbose=False)
    assert "was loaded with" in report.left["attention"]
    report.undo()
    assert model.config._attn_implementation == "transformer_fast"


@pytest.mark.parametrize("copier", ["deepcopy", "pickle", "torch.save"])
def test_copies_of_an_accelerated_model(copier):
    model, inputs = TEXT["gemma2"](), batch("left")
    before = run(model, inputs)
    transformer_fast.accelerate(model, adopt=False, verbose=False)
    if copier == "deepcopy":
        other = copy.deepcopy(model)
    elif copier == "pickle":
        other = pickle.loads(pickle.dumps(model))
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    assert torch.equal(run(other, inputs), run(model, inputs))
    assert sum(isinstance(m, Swapped) for m in other.modules()) == sum(isinstance(m, Swapped) for m in model.modules())
    with torch.no_grad():
        next(other.parameters()).zero_()
    transformer_fast.restore(model)
    assert any(isinstance(m, Swapped) for m in other.modules()), "the copy is a model of its own"
    assert torch.equal(run(model, inputs), before)


def test_state_dict_goes_both_ways():
    plain, fast = TEXT["bert"](), TEXT["bert"]()
    transformer_fast.accelerate(fast, adopt=False, verbose=False)
    with torch.no_grad():
        for p in fast.parameters():
            p.add_(1)
    plain.load_state_dict(fast.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), fast.parameters()))


def test_saved_model_loads_without_a_trace(tmp_path):
    model = TEXT["t5"]()
    transformer_fast.accelerate(model, adopt=False, verbose=False)
    model.save_pretrained(tmp_path)
    assert "transformer_fast" not in (tmp_path / "config.json").read_text()
    again = hf.AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    assert type(again) is hf.T5ForConditionalGeneration and again.config._attn_implementation != "transformer_fast"
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters()))


def test_training_step_keeps_the_mode_and_learns():
    model = TEXT["gpt2"]().train()
    transformer_fast.accelerate(model, adopt=False, verbose=False)
    assert all(module.training for module in model.modules())
    inputs = batch("right")
    optimizer = torch.optim.SGD(model.parameters(), 1e-2)
    losses = []
    for _ in range(4):
        torch.manual_seed(0)
        loss = model(**inputs, labels=inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)


def test_prints_what_it_did(capsys):
    transformer_fast.accelerate(vit())
    out = capsys.readouterr().out
    assert "swapped: LayerNorm -> layer_norm (5: layers.0.layernorm_before ...)" in out
    assert "left: nothing" in out
    transformer_fast.accelerate(vit(), verbose=False)
    assert capsys.readouterr().out == ""


def test_model_without_an_attention_interface():
    config = hf.OpenAIGPTConfig(vocab_size=61, n_embd=32, n_layer=1, n_head=4)
    model = hf.OpenAIGPTModel(config).eval()
    inputs = {"input_ids": batch("none")["input_ids"]}
    eager, true = run(model, inputs), run(copy.deepcopy(model).double(), inputs)
    report = transformer_fast.accelerate(model, adopt=False, verbose=False)
    assert "OpenAIGPTModel has no attention interface" in report.left["attention"]
    assert set(report.swapped.values()) == {"layer_norm", "gelu_tanh"}
    assert_as_accurate(run(model, inputs), true, eager)


@pytest.mark.parametrize("training", [True, False])
def test_torch_encoder_layer(training):
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, activation=nn.GELU(), batch_first=True).train(training)
    x = torch.randn(2, 5, 16)
    true, eager = copy.deepcopy(layer).double()(x.double()), layer(x)
    report = transformer_fast.accelerate(layer, adopt=False, verbose=False)
    assert report.swapped == {"norm1": "layer_norm", "norm2": "layer_norm", "activation": "gelu"}
    assert "no attention interface" in report.left["self_attn"]
    assert_as_accurate(layer(x), true, eager)


class GatedRMSNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(8)), 1e-6

    def forward(self, x, gate):
        return x * gate


class AlmostRMSNorm(nn.Module):
    """The square root of mean and eps in the wrong order: right for large inputs, wrong where eps matters."""

    def __init__(self):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(8)), 1e-6

    def forward(self, x):
        return self.weight * x / (x.square().mean(-1, keepdim=True).sqrt() + self.eps)


class UncentredLayerNorm(nn.LayerNorm):
    def forward(self, x):
        return super().forward(x) + 1


class OwnRMSNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.rand(8)), 1e-3

    def forward(self, hidden_states):
        variance = hidden_states.float().pow(2).mean(-1, keepdim=True)
        return self.weight * (hidden_states * torch.rsqrt(variance + self.variance_epsilon)).to(hidden_states.dtype)


def _patched():
    norm = nn.LayerNorm(8)
    norm.forward = lambda x: x
    return norm


def _parametrized():
    norm = nn.LayerNorm(8)
    nn.utils.parametrize.register_parametrization(norm, "weight", nn.Identity())
    return norm


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (GatedRMSNorm(), "takes 2 inputs"),
        (AlmostRMSNorm(), "neither layer norm nor RMS norm"),
        (UncentredLayerNorm(8), "neither layer norm nor RMS norm"),
        (nn.BatchNorm1d(8), "no kernel for this norm"),
        (nn.GroupNorm(2, 8), "no kernel for this norm"),
        (hf.activations.QuickGELUActivation(), "none of gelu, gelu_tanh, silu"),
        (hf.activations.ClippedGELUActivation(-1, 1), "none of gelu, gelu_tanh, silu"),
        (nn.SiLU(inplace=True), "works in place"),
        (_patched(), "replaced on the instance"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_left_with_a_reason(module, reason):
    model = nn.Sequential(module)
    report = transformer_fast.accelerate(model, adopt=False, verbose=False)
    assert not report.swapped and reason in report.left["0"]
    assert model[0] is module and not isinstance(module, Swapped)


def test_parametrized_norm_is_left():
    model = nn.Sequential(_parametrized())
    report = transformer_fast.accelerate(model, adopt=False, verbose=False)
    assert not any(isinstance(m, Swapped) for m in model.modules()), report


@pytest.mark.parametrize(
    ("module", "kind"),
    [
        (OwnRMSNorm(), "rms_norm"),
        (nn.RMSNorm(8), "rms_norm"),
        (nn.RMSNorm(8, elementwise_affine=False), "rms_norm"),
        (nn.LayerNorm(8, bias=False), "layer_norm"),
        (nn.LayerNorm(8, elementwise_affine=False), "layer_norm"),
        (nn.LayerNorm((3, 8)), "layer_norm"),
        (nn.GELU(), "gelu"),
        (nn.GELU(approximate="tanh"), "gelu_tanh"),
        (nn.SiLU(), "silu"),
        (hf.activations.FastGELUActivation(), "gelu_tanh"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_modules_of_torch_and_own(module, kind):
    x = torch.randn(5, 3, 8)
    true, eager = copy.deepcopy(module).double()(x.double()), module(x)
    model = nn.Sequential(module)
    assert transformer_fast.accelerate(model, adopt=False, verbose=False).swapped == {"0": kind}
    assert_as_accurate(model(x), true.double(), eager)


def test_mixed_dtypes_keep_the_models_own_rule():
    norm = hf.models.t5.modeling_t5.T5LayerNorm(8).bfloat16()
    x = torch.randn(3, 8)
    before = norm(x)
    transformer_fast.accelerate(norm, adopt=False, verbose=False)
    assert norm(x).dtype == before.dtype and torch.equal(norm(x), before)


def test_hooks_still_run():
    model, seen = nn.Sequential(nn.LayerNorm(8)), []
    model[0].register_forward_hook(lambda module, args, out: seen.append(out.shape))
    transformer_fast.accelerate(model, adopt=False, verbose=False)
    model(torch.randn(2, 8))
    assert seen == [(2, 8)]


def test_our_own_models_are_left():
    model = transformer_fast.BertModel(TEXT["bert"]().config)
    classes = _classes(model)
    report = transformer_fast.accelerate(model, adopt=False, verbose=False)
    assert not report.swapped and "already" in report.left["modules of transformer_fast"]
    assert _classes(model) == classes


def test_wants_a_module():
    for function in (transformer_fast.accelerate, transformer_fast.restore):
        with pytest.raises(TypeError, match="model: wanted a torch.nn.Module.*, got str"):
            function("bert-base-uncased")
