"""generate() with the step that a GPU captures as a graph returns the tokens of HF's loop, on static tensors."""

import pytest
import torch
from generating_models import METHODS, SEQ2SEQ, models, prompts, seq2seq_models
from numerics import assert_as_accurate
from transformers import OpenAIGPTConfig

import transformer_fast as tf
from transformer_fast.generation.graph_step import GraphStepper
from transformer_fast.generation.model_step import ModelStepper
from transformer_fast.generation.stepper import Prompt

pytestmark = pytest.mark.usefixtures("served")


def check(theirs, ours, device, served, side="right", **kwargs):
    ids, mask = (t.to(device) for t in prompts(3, 9, side))
    found = []
    for model in (theirs.to(device), ours.to(device)):
        torch.manual_seed(1)
        options = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False} | kwargs
        found.append(model.generate(ids, **options))
    assert torch.equal(*found) and len(served) == 1


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("method", METHODS)
def test_same_tokens_as_hugging_face(method, side, device, served):
    check(*models(3, scale_attn_by_inverse_layer_idx=True), device, served, side, **METHODS[method])


@pytest.mark.parametrize("method", ["greedy", "n-best"])
@pytest.mark.parametrize("family", SEQ2SEQ)
def test_encoder_decoders(family, method, device, served):
    check(*seq2seq_models(family, 1), device, served, **METHODS[method])


def test_post_norm_decoder(device, served):
    config = OpenAIGPTConfig(vocab_size=53, n_positions=40, n_embd=32, n_layer=2, n_head=4, initializer_range=0.4)
    ours = tf.OpenAIGPTLMHeadModel(config).eval().to(device)
    ids = prompts(2, 5, "left")[0].to(device)
    found = ours.generate(ids, max_new_tokens=9, do_sample=False)
    for _ in range(9):  # with the model's own forward, without a cache
        ids = torch.cat([ids, ours(ids).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(found, ids) and len(served) == 1


def test_a_cache_that_grows(device, served, monkeypatch):
    monkeypatch.setattr(GraphStepper, "growth", 4)
    check(*models(), device, served, "left", max_new_tokens=20, num_beams=2)
    assert served[0]._cache.store.shape[4] > 9 + 4


@pytest.mark.parametrize("family", ["gpt2", "bart"])
def test_logits_and_cache_of_steps(family, device):
    """Compared step by step with the model's forward, float32 against float64, while rows are reordered and dropped."""
    build = (lambda: models()[1]) if family == "gpt2" else (lambda: seq2seq_models(family)[1])
    ids, mask = (t.to(device) for t in prompts(3, 7, "left"))
    steppers = []
    for kind, dtype in ((GraphStepper, torch.float32), (ModelStepper, torch.float64), (ModelStepper, torch.float32)):
        model = build().to(device, dtype).eval()
        if family == "gpt2":
            inputs = {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
            start = ids
        else:
            with torch.no_grad():
                states = model.get_encoder()(ids, attention_mask=mask)
            start, inputs = ids[:, :2], {"attention_mask": mask, "encoder_outputs": states}
        steppers.append(kind(model, Prompt(start, 2, 30, inputs)))
    reached = []
    with torch.no_grad():
        logits = [s.start() for s in steppers]
        logits = [t.repeat_interleave(2, 0) for t in logits]
        for step in range(6):
            assert_as_accurate(*logits, name=f"step {step}")
            tokens = logits[1].argmax(-1)
            if step == 2:
                for s in steppers:
                    s.reorder(torch.tensor([1, 0, 2, 2, 5, 4], device=device))
            if step == 4:
                tokens = tokens[:4]
                for s in steppers:
                    s.keep(torch.tensor([0, 5, 2, 3], device=device))
            if step == 3:
                for (k, v), *others in zip(*(s.key_values() for s in steppers)):
                    real = torch.ones(k.shape[0], k.shape[2], dtype=torch.bool, device=device)
                    if family == "gpt2":
                        real[:, :7] = mask.bool().repeat_interleave(2, 0)
                    for i, ours in enumerate((k, v)):
                        rows = [t.transpose(1, 2)[real] for t in (ours, *(pair[i] for pair in others))]
                        assert_as_accurate(*rows)
                        reached.append(i)
            logits = [s.step(tokens) for s in steppers]
    assert len(reached) == 4


def test_past_the_positions(device):
    with pytest.raises(ValueError, match="max_new_tokens: position 64 is past the model's 64 positions"):
        ids = torch.arange(3, 9)[None].to(device)
        models()[1].to(device).generate(ids, max_new_tokens=80, do_sample=False, eos_token_id=None)


def test_refusals(monkeypatch):
    theirs, ours = models()
    prompt = Prompt(torch.ones(2, 3, dtype=torch.long))
    with torch.no_grad():
        assert not GraphStepper.why_not(ours, prompt)
        assert "does not describe" in GraphStepper.why_not(theirs, prompt)
        assert "token_type_ids" in GraphStepper.why_not(ours, Prompt(prompt.input_ids, 1, 0, {"token_type_ids": 1}))
        hook = ours.register_forward_hook(lambda *a: None)
        assert "hooks" in GraphStepper.why_not(ours, prompt)
        hook.remove()
        t5 = seq2seq_models("t5")[1]
        holes = {
            "decoder_attention_mask": torch.tensor([[0, 1, 1], [1, 1, 1]]),
            "encoder_outputs": (torch.ones(2, 4, 32),),
        }
        assert "relative positions" in GraphStepper.why_not(t5, Prompt(prompt.input_ids, 1, 0, holes))
        monkeypatch.setattr(GraphStepper, "anywhere", False)
        assert "no CUDA graphs" in GraphStepper.why_not(ours, prompt)
    assert "gradients" in GraphStepper.why_not(ours, prompt) or "no CUDA" in GraphStepper.why_not(ours, prompt)
