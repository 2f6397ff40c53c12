"""The step that a GPU captures, for decoders with rotary positions, shared key heads, windows, softcaps and head norms.
It must return Hugging Face's tokens, never synchronise, and keep its tensors at fixed addresses."""

import decoder_cases
import pytest
import torch
from numerics import assert_as_accurate
from torch.utils._python_dispatch import TorchDispatchMode

from transformer_fast.generation.graph_step import GraphStepper
from transformer_fast.generation.model_step import ModelStepper
from transformer_fast.generation.stepper import Prompt

FEW = 4  # prompts
BEAMS = {"num_beams": 3, "num_return_sequences": 2}


@pytest.mark.parametrize(
    "family, method",
    [*((family, {}) for family in decoder_cases.FAMILIES), ("Gemma2", BEAMS), ("Qwen3", BEAMS)],
    ids=lambda v: v if isinstance(v, str) else "beams" if v else "greedy",
)
def test_same_tokens_as_hugging_face(family, method, device, served, monkeypatch):
    monkeypatch.setattr(GraphStepper, "growth", 5)  # so that the cache and the rotary tables grow
    ours, theirs, _ = decoder_cases.models(family, "ForCausalLM")
    ids, mask = (t[:FEW].to(device) for t in decoder_cases.batch("left"))
    options = {"attention_mask": mask, "max_new_tokens": 13, "do_sample": False, "disable_compile": True, **method}
    found = [m.to(device).generate(ids, **options) for m in (ours, theirs)]
    assert torch.equal(*found) and len(served) == 1


def prompt_of(ids, mask, copies=1):
    inputs = {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    return Prompt(ids, copies, 40, inputs)


@pytest.mark.parametrize("family", ["Gemma2", "Qwen3"])
def test_logits_of_steps(family, device):
    """Compared with the model's own forward, float32 against float64, while rows are reordered and dropped."""
    ours, _, _ = decoder_cases.models(family, "ForCausalLM")
    ids, mask = (t[:3].to(device) for t in decoder_cases.batch("left"))
    steppers = []
    for kind, dtype in ((GraphStepper, torch.float32), (ModelStepper, torch.float64), (ModelStepper, torch.float32)):
        model = decoder_cases.models(family, "ForCausalLM")[0]
        model.load_state_dict(ours.state_dict())
        steppers.append(kind(model.to(device, dtype), prompt_of(ids, mask, 2)))
    with torch.no_grad():
        logits = [s.start().repeat_interleave(2, 0) for s in steppers]
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
            logits = [s.step(tokens) for s in steppers]


class Devices(TorchDispatchMode):
    """Records the devices of the tensors of every call."""

    def __init__(self):
        super().__init__()
        self.calls, self.found = [], set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        results = out if isinstance(out, (tuple, list)) else (out,)
        self.found |= {t.device.type for t in (*args, *results) if isinstance(t, torch.Tensor)}
        self.calls.append(str(function))
        return out


@pytest.mark.parametrize("family", ["Gemma2", "Qwen3", "GPTNeoX", "OPT"])
def test_a_step_waits_for_nothing(family, monkeypatch):
    """Runs on tensors without values, so that reading one raises an error, as it does during a capture. The tensors
    that steps read and write keep their addresses."""
    monkeypatch.setattr(GraphStepper, "anywhere", True)
    ours, _, _ = decoder_cases.models(family, "ForCausalLM")
    ids, mask = (t[:FEW] for t in decoder_cases.batch("left"))
    with torch.no_grad():
        stepper = GraphStepper(ours, prompt_of(ids, mask))
        stepper.start()
        places = []
        for _ in range(3):
            stepper.step(torch.full((FEW,), 5))
            kept = [stepper._cache.store, stepper._lengths, stepper._tokens, stepper._positions, stepper._logits]
            kept += stepper._call.rotary or []
            places.append([t.data_ptr() for t in kept])
        assert places[0] == places[1] == places[2]
        ours.to("meta")
        cache, stepper._lengths = stepper._cache, stepper._lengths.to("meta")
        cache.store, cache.lengths = cache.store.to("meta"), stepper._lengths
        for name in ("_tokens", "_positions", "_logits"):
            setattr(stepper, name, getattr(stepper, name).to("meta"))
        stepper._angles = tuple(t.to("meta") for t in stepper._angles)
        stepper._place_angles()
        for module in (stepper._final_norm, *(m for w in stepper._layers for m in w)):
            if isinstance(module, torch.nn.Module):
                module.to("meta")
        with Devices() as devices:
            stepper._run()
    assert devices.found == {"meta"}
    attention = "kv_cache_attention" if family == "OPT" else "rotary_cache_append"
    assert sum(attention in call for call in devices.calls) == 3
    # Residual sums are fused with the next norm. Separate additions: lengths, positions, one sublayer of GPT-NeoX.
    assert sum("aten.add.Tensor" in call for call in devices.calls) == {"GPTNeoX": 4, "OPT": 2}.get(family, 1)


def test_windows_and_padding(monkeypatch):
    """Windows count padding between two tokens, so padding can only be left out if there is none between tokens."""
    monkeypatch.setattr(GraphStepper, "anywhere", True)
    ours, _, _ = decoder_cases.models("Mistral", "ForCausalLM")
    ids = torch.ones(2, 3, dtype=torch.long)
    with torch.no_grad():
        for mask, served in (([0, 1, 1], True), ([1, 1, 0], False), ([1, 0, 1], False)):
            reason = GraphStepper.why_not(ours, prompt_of(ids, torch.tensor([mask, [1, 1, 1]])))
            assert (reason == "") == served and (served or "windows count the padding" in reason)
