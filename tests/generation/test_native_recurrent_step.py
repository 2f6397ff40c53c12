"""The native step of recurrent decoders: HF's tokens for every kind, logits, changed weights, refusals."""

import copy
import re

import pytest
import torch
from numerics import assert_as_accurate
from recurrent_models import KINDS, batch, build
from torch import nn

import transformer_fast as tf
from transformer_fast.backends import native
from transformer_fast.generation.native_recurrent_step import NativeRecurrentStepper
from transformer_fast.generation.recurrent_step import RecurrentStepper
from transformer_fast.generation.stepper import Prompt, choose_stepper
from transformer_fast.generation.weights import kept_copies, set_weight_storage
from transformer_fast.ops.recurrent_step import RecurrentWeights

if native.load():
    pytest.skip(native.load(), allow_module_level=True)

OPTIONS = (
    {"do_sample": False}, {"num_beams": 4, "num_return_sequences": 3}, {"num_beams": 2, "do_sample": True, "top_k": 9},
    {"do_sample": True, "num_return_sequences": 3, "top_p": 0.9},
)  # fmt: skip


@pytest.fixture
def served(monkeypatch):
    """The number of rows of each native step."""
    rows, step = [], RecurrentWeights.step
    monkeypatch.setattr(
        RecurrentWeights, "step", lambda self, ids, *more: rows.append(len(ids)) or step(self, ids, *more)
    )
    return rows


def source(padding="right"):
    inputs = batch(padding)
    inputs.pop("labels")
    return inputs


def in_hugging_faces_loop(model, monkeypatch, **arguments):
    with monkeypatch.context() as patch:
        patch.setattr(type(model), "_stepper", lambda *args: None)
        return model.generate(**arguments)


@pytest.mark.parametrize("kind, cell", KINDS)
def test_tokens_are_those_of_hugging_faces_loop(kind, cell, served, monkeypatch):
    """Ragged sources, rows that finish early, reordered beams; greedy decoding, beam search, and seeded sampling."""
    model = build(kind, cell)
    model.generation_config.eos_token_id = [2, 3, 4, 7 if (kind, cell) == ("peeky", "gru") else 5]
    for i, options in enumerate(OPTIONS):
        set_weight_storage(model, copy=bool(i % 2))
        call, found = {**source("left" if i > 1 else "right"), "max_new_tokens": 14, **options}, []
        before = len(served)
        for run in (model.generate, lambda **more: in_hugging_faces_loop(model, monkeypatch, **more)):
            torch.manual_seed(4)
            found.append(run(**call))
        assert torch.equal(*found) and len(served) > before, options
    assert len(set(served)) > 2  # rows were dropped


def prompt_of(model, copies=1, length=2):
    inputs = source()
    encoded = model.get_encoder()(**inputs, return_dict=True)
    ids = torch.randint(3, 37, (4, length), generator=torch.Generator().manual_seed(7))
    return Prompt(ids, copies, 20, {"encoder_outputs": encoded, "attention_mask": inputs["attention_mask"]})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind, cell", [("additive", "lstm"), ("general", "gru"), ("peeky", "lstm"), ("none", "gru")])
@torch.no_grad()
def test_logits(kind, cell, dtype):
    """Random reorders within the rows of each source, and dropped rows, compared with whole sequences in float64. A
    short prompt, and one so long that the model's own forward runs it."""
    for length in (3, 11):
        model = build(kind, cell).to(dtype)
        wide = copy.deepcopy(model).double()
        prompt = prompt_of(model, 3, length)
        stepper = choose_stepper(model, prompt)
        assert type(stepper) is NativeRecurrentStepper
        inputs, rows = source(), torch.arange(12) // 3
        ids = prompt.input_ids[rows]

        def check(logits, rows=rows, ids=ids, inputs=inputs, model=model, wide=wide):
            truth, plain = (
                m(**{k: v[rows] for k, v in inputs.items()}, decoder_input_ids=ids).logits[:, -1] for m in (wide, model)
            )
            assert_as_accurate(logits.to(plain.dtype), truth, plain)

        check(stepper.start(), torch.arange(4), prompt.input_ids)
        for t in range(6):
            tokens = torch.randint(3, 37, (len(rows),))
            ids = torch.cat([ids, tokens[:, None]], 1)
            check(stepper.step(tokens), rows, ids)
            if t == 3:  # the last rows replace others
                kept = torch.arange(len(rows) - 3)
                kept[1], kept[4] = len(rows) - 1, len(rows) - 3
                stepper.keep(kept)
                ids, rows = ids[kept], rows[kept]
            elif t < 3:
                index = rows * 3 + torch.randint(3, (12,))
                stepper.reorder(index)
                ids = ids[index]


@pytest.mark.parametrize("copied", [True, False])
@torch.no_grad()
def test_weights_as_they_are_now(copied):
    """Every tensor of the decoder is changed between two generations, unseen by torch's version counters."""
    for kind, cell in (("additive", "lstm"), ("general", "gru")):
        model = build(kind, cell)
        set_weight_storage(model, copy=copied)

        def logits(model=model):
            stepper = NativeRecurrentStepper(model, prompt_of(model))
            return torch.cat([stepper.start().clone(), stepper.step(torch.tensor([5, 9, 3, 8])).clone()])

        before = logits()
        copies = kept_copies(model)
        assert torch.equal(logits(), before) and kept_copies(model) is copies and (copies is not None) == copied
        parameters = dict(model.model.decoder.named_parameters()) | {
            "head": model.lm_head.weight,
            "head bias": model.lm_head.bias,
        }
        assert len(parameters) > 12
        for name, parameter in parameters.items():
            parameter.detach().numpy()[...] *= 1.5
            if not parameter.any():  # biases are initialised to zero
                parameter.detach().numpy()[...] += 0.5
            after = logits()
            assert not torch.equal(after, before), name
            before = after
        fresh = copy.deepcopy(model)
        set_weight_storage(fresh, copy=copied)
        assert torch.equal(logits(fresh), before)


@torch.no_grad()
def test_storages(served):
    """Narrow copies work as in the decoding step of transformers: they are kept, and results stay close."""
    model = build("additive")
    exact = NativeRecurrentStepper(model, prompt_of(model)).start().clone()
    for storage in (torch.bfloat16, torch.int8):
        set_weight_storage(model, storage)
        stored = NativeRecurrentStepper(model, prompt_of(model)).start()
        assert kept_copies(model).storage == storage
        assert 0 < (stored - exact).abs().max() < 0.1 * exact.abs().max()
    assert served


def test_a_checkpoints_weights_give_their_place_to_copies(tmp_path, served):
    """Mapped weights of from_pretrained are copied by default, and are saved unchanged afterwards."""
    built = build("additive")
    built.save_pretrained(tmp_path / "a")
    model = tf.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "a").eval()
    call = {**source(), "max_new_tokens": 8, "do_sample": False}
    assert torch.equal(model.generate(**call), built.generate(**call)) and served
    assert kept_copies(built) is None
    model.save_pretrained(tmp_path / "b")
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()


class OwnLinear(nn.Linear):
    pass


class OwnStep(tf.AttentionRNNForConditionalGeneration):
    def recurrent_step(self, *args):
        return super().recurrent_step(*args)


class OwnForward(tf.AttentionRNNForConditionalGeneration):
    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)


def _hook(model):
    model.model.decoder.rnn.register_forward_hook(lambda *args: None)


def _hook_on_the_model(model):
    model.register_forward_hook(lambda *args: None)


def _own_linear(model):
    head = model.lm_head
    model.lm_head = OwnLinear(head.in_features, head.out_features)
    model.lm_head.load_state_dict(head.state_dict())
    model.eval()


def _renormalise(model):
    model.model.decoder.embed_tokens.max_norm = 100.0  # has no effect


def _own_step(model):
    model.__class__ = OwnStep


def _own_forward(model):
    model.__class__ = OwnForward


def _parametrize(model):
    nn.utils.parametrizations.weight_norm(model.model.decoder.readout)
    model.eval()


ELSEWHERE = {
    "a hook": (_hook, "module by module, as rnn has hooks"),
    "a linear layer of somebody's": (_own_linear, "module by module, as the head is a OwnLinear"),
    "an embedding that is renormalised": (_renormalise, "module by module, as the embedding renormalises its rows"),
    "a step of its own": (_own_step, "module by module, as the model has a recurrent_step of its own"),
    "a weight that is computed": (_parametrize, "module by module, as the readout is a ParametrizedLinear"),
    "a hook on the model": (_hook_on_the_model, "transformers' own loop, as AttentionRNN.* has a forward hook"),
    "a forward of its own": (_own_forward, "transformers' own loop, as OwnForward has a forward of its own"),
}


@pytest.mark.parametrize("name", ELSEWHERE)
def test_what_it_does_not_serve_goes_elsewhere(name, served, monkeypatch):
    change, said = ELSEWHERE[name]
    model = build("additive")
    assert tf.explain(model).endswith("generate: this package's engine, one native call per token")
    change(model)
    modules = []
    step = RecurrentStepper.step
    monkeypatch.setattr(RecurrentStepper, "step", lambda self, t: modules.append(len(t)) or step(self, t))
    call = {**source(), "max_new_tokens": 6, "do_sample": False}
    found = model.generate(**call)
    assert not served and bool(modules) == ("module by module" in said)
    assert torch.equal(found, in_hugging_faces_loop(model, monkeypatch, **call))
    assert re.search(said, tf.explain(model))


def test_other_reasons():
    model = build("additive")
    prompt = prompt_of(model)
    with torch.no_grad():
        assert not NativeRecurrentStepper.why_not(model, prompt)
        assert "training mode" in NativeRecurrentStepper.why_not(build("additive").train(), prompt)
        assert "float16" in NativeRecurrentStepper.why_not(build("additive").half(), prompt)
        strange = Prompt(prompt.input_ids, 1, 9, {**prompt.inputs, "inputs_embeds": torch.zeros(1)})
        assert "inputs_embeds" in NativeRecurrentStepper.why_not(model, strange)
    assert "gradients" in NativeRecurrentStepper.why_not(model, prompt)


@torch.no_grad()
def test_bad_input():
    model = build("additive")
    prompt = prompt_of(model)
    prompt.input_ids[1, 0] = 37
    with pytest.raises(ValueError, match=r"decoder_input_ids.*\[0, 37\)"):
        NativeRecurrentStepper(model, prompt).start()
    prompt = prompt_of(model)
    prompt.inputs["attention_mask"] = torch.tensor([[1, 1, 0]] * 4)
    with pytest.raises(ValueError, match=r"attention_mask.*\(4, 7\).*\(4, 3\)"):
        NativeRecurrentStepper(model, prompt).start()
    stepper = NativeRecurrentStepper(model, prompt_of(model))
    stepper.start()
    with pytest.raises(RuntimeError, match="99 is not one of 37 tokens"):
        stepper.step(torch.tensor([3, 4, 99, 5]))
