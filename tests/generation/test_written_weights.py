"""Generation uses the current weights, whatever has written to them."""

import copy
import ctypes
import os
import threading

import peft
import pytest
import torch
from generating_models import models, prompts, seq2seq_models

from transformer_fast.backends import contents
from transformer_fast.generation import set_weight_storage
from transformer_fast.generation.weights import kept_copies

pytestmark = pytest.mark.quick


def wrote(model):
    """A weight of which decoding has a copy."""
    return model.step_description().layers[1].up.weight


def optimizer(kind, **options):
    def step(model):
        how = kind(model.parameters(), **options)
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        for _ in range(3):
            how.step()

    return step


def under_no_grad(write):
    def run(model):
        with torch.no_grad():
            write(wrote(model))

    return run


def through_data(model):
    wrote(model).data.mul_(-1)


def through_numpy(model):
    wrote(model).detach().view(torch.int32).numpy()[:] ^= -(2**31)  # the sign


def through_an_address(model):
    w = wrote(model)
    ctypes.memset(w.data_ptr(), 0, w.nbytes // 2)


def other_data(model):
    w = wrote(model)
    w.data = -w.data


def load(assign):
    def run(model):
        model.load_state_dict({k: -v for k, v in model.state_dict().items()}, assign=assign)

    return run


def exponential_average(model):
    """As in trainers: every parameter moves a little towards that of another model."""
    other = copy.deepcopy(model)
    for p in other.parameters():
        p.data.mul_(-1)
    with torch.no_grad():
        for p, q in zip(model.parameters(), other.parameters()):
            p.lerp_(q, 0.9)


def in_inference_mode(model):
    with torch.inference_mode():
        wrote(model).mul_(-1)


def storage_of_another_size(model):
    """As sharding does: a parameter's memory is freed and gathered again."""
    w = wrote(model).detach()
    if not w.untyped_storage().resizable():  # a mapped file
        return through_data(model)
    held = -w.clone()
    w.untyped_storage().resize_(0)
    w.untyped_storage().resize_(held.nbytes)
    return w.copy_(held)


def another_module(model):
    slots = model.step_description().layers[1]
    new = copy.deepcopy(slots.up)
    new.weight.data.mul_(-1)
    for parent in model.modules():
        for name, child in parent.named_children():
            if child is slots.up:
                setattr(parent, name, new)


def broadcast(model):
    """By torch's process group with this one process. Collectives do not increase version counters."""
    import torch.distributed as dist

    w = wrote(model).detach()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        whole = [torch.empty_like(w)]
        dist.all_gather(whole, -w)
        w.view(-1).view(torch.uint8).copy_(whole[0].view(-1).view(torch.uint8))
        dist.broadcast(w, 0)
    finally:
        dist.destroy_process_group()


def another_process(model):
    """A worker process that shares the weights, as in Hogwild training."""
    model.share_memory()
    w = wrote(model).detach().numpy()
    child = os.fork()
    if not child:
        w *= -1
        os._exit(0)
    os.waitpid(child, 0)


WRITERS = {
    "fused AdamW": optimizer(torch.optim.AdamW, lr=0.3, fused=True),
    "foreach AdamW": optimizer(torch.optim.AdamW, lr=0.3, foreach=True),
    "fused SGD": optimizer(torch.optim.SGD, lr=0.5, fused=True),
    "single Adam": optimizer(torch.optim.Adam, lr=0.3, foreach=False, fused=False),
    "data": through_data,
    "numpy": through_numpy,
    "address": through_an_address,
    "other data": other_data,
    "in place": under_no_grad(lambda w: w.mul_(-1)),
    "set_": under_no_grad(lambda w: w.set_(-w.clone())),
    "swap": under_no_grad(lambda w: w.copy_(w.flip(0))),
    "foreach": under_no_grad(lambda w: torch._foreach_mul_([w], -1)),
    "loaded": load(False),
    "assigned": load(True),
    "average": exponential_average,
    "inference mode": in_inference_mode,
    "storage": storage_of_another_size,
    "module": another_module,
    "broadcast": broadcast,
    "process": another_process,
    "dtype and back": lambda m: m.bfloat16().float(),
}


@pytest.fixture(params=["mapped", "own memory", "int8"])
def kind(request, monkeypatch):
    monkeypatch.setattr(contents, "_STILL", -(10**12))  # treat new files as old ones
    return request.param


def built(kind, folder, family="gpt2"):
    theirs, ours = models(n_embd=64) if family == "gpt2" else seq2seq_models(family, 0)
    if kind == "mapped":
        theirs.save_pretrained(folder)
        return type(ours).from_pretrained(folder).eval()
    set_weight_storage(ours, torch.int8 if kind == "int8" else torch.float32)
    return ours


def logits_of(model):
    """Logits of the first decoding step and the next one, which depend on every weight."""
    from transformer_fast.generation.native_step import NativeStepper
    from transformer_fast.generation.stepper import Prompt

    torch.manual_seed(3)
    ids, mask = prompts(2, 6, "left")
    with torch.no_grad():
        prompt = Prompt(ids, 1, 12, {"attention_mask": mask})
        assert not NativeStepper.why_not(model, prompt)
        stepper = NativeStepper(model, prompt)
        return torch.cat([stepper.start().clone(), stepper.step(torch.tensor([5, 9])).clone()])


@pytest.mark.parametrize("writer", WRITERS)
def test_every_writer_is_seen(kind, writer, tmp_path):
    model = built(kind, tmp_path)
    before = logits_of(model)
    copies = kept_copies(model)
    assert torch.equal(logits_of(model), before) and kept_copies(model) is copies
    WRITERS[writer](model)
    after = logits_of(model)
    fresh = copy.deepcopy(model)  # without copies
    if kept_copies(model) is not None:
        set_weight_storage(fresh, kept_copies(model).storage)
    else:
        set_weight_storage(fresh, copy=False)
    assert not torch.equal(after, before) and torch.equal(logits_of(fresh), after)


@pytest.mark.parametrize("family", ["bart", "t5"])
def test_generate_after_a_fused_step_is_that_of_the_new_weights(kind, family, tmp_path):
    model = built(kind, tmp_path, family)
    ids, mask = prompts(2, 6, "right")
    options = {"attention_mask": mask, "max_new_tokens": 10, "do_sample": False, "num_beams": 2}
    before = model.generate(ids, **options)
    WRITERS["fused AdamW"](model)
    after = model.generate(ids, **options)
    fresh = copy.deepcopy(model)
    if kept_copies(model) is not None:
        set_weight_storage(fresh, kept_copies(model).storage)
    assert not torch.equal(after, before) and torch.equal(fresh.generate(ids, **options), after)


def test_merged_and_unmerged_adapters(kind, tmp_path):
    model = built(kind, tmp_path)
    ids, mask = prompts(2, 6, "left")
    options = {"attention_mask": mask, "max_new_tokens": 10, "do_sample": False}
    plain = model.generate(ids, **options)
    config = peft.LoraConfig(r=4, target_modules=["c_fc"], fan_in_fan_out=True, init_lora_weights=False)
    adapted = peft.get_peft_model(model, config).eval()
    for _, p in adapted.named_parameters():
        if p.requires_grad:
            p.data.mul_(20)
    with_adapter = adapted.generate(input_ids=ids, **options)
    assert not torch.equal(with_adapter, plain)
    adapted.merge_adapter()
    merged = adapted.generate(input_ids=ids, **options)
    adapted.unmerge_adapter()
    assert torch.equal(adapted.generate(input_ids=ids, **options), with_adapter)
    whole = adapted.merge_and_unload()
    found = whole.generate(ids, **options)
    fresh = copy.deepcopy(whole)
    if kind == "int8":  # layers with an adapter are called, the others are in int8
        set_weight_storage(fresh, torch.int8)
    assert torch.equal(found, fresh.generate(ids, **options) if kind == "int8" else merged)


def test_what_is_not_a_weight_is_not_remembered(tmp_path):
    """Scales, eps and biases are read in each generation, while the weight copies are reused."""
    model = built("own memory", tmp_path)
    before = logits_of(model)
    copies = kept_copies(model)
    block = model.transformer.h[0]
    for change in (
        lambda: setattr(block.ln_1, "eps", 3.0), lambda: block.mlp.c_fc.bias.data.add_(2.0),
        lambda: block.ln_2.weight.data.neg_(), lambda: model.transformer.wpe.weight.data.neg_(),
    ):  # fmt: skip
        change()
        after = logits_of(model)
        assert not torch.equal(after, before) and kept_copies(model) is copies
        before = after


def test_threads_generate_while_another_writes(tmp_path):
    """No generation fails, no write is lost, and afterwards generation uses the current weights."""
    model = built("mapped", tmp_path)
    stop, failures = threading.Event(), []

    def generate():
        while not stop.is_set():
            try:
                logits_of(model)
            except Exception as error:  # reported below, in the test's thread
                failures.append(error)
                return

    threads = [threading.Thread(target=generate) for _ in range(2)]
    for thread in threads:
        thread.start()
    for _ in range(6):
        new = {name: torch.randn_like(value) for name, value in model.state_dict().items()}
        new["lm_head.weight"] = new["transformer.wte.weight"]
        model.load_state_dict(new)
    stop.set()
    for thread in threads:
        thread.join()
    assert not failures
    assert all(torch.equal(value, new[name]) for name, value in model.state_dict().items())
    after = logits_of(model)
    fresh = copy.deepcopy(model)
    set_weight_storage(fresh, copy=kept_copies(model) is not None)  # which of the two depends on timing
    assert torch.equal(after, logits_of(fresh))
