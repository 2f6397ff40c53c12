"""LoRA with Hugging Face's target names: the same outputs and adapter gradients as on Hugging Face's models."""

import copy

import peft
import pytest
import torch
import transformers
from numerics import GRADIENT, assert_as_accurate

import transformer_fast as tf

SMALL = {"vocab_size": 99, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
CASES = {
    "bert": ("BertForTokenClassification", SMALL, ["query", "value"]),
    "gpt2": ("GPT2LMHeadModel", {"vocab_size": 99, "n_embd": 48, "n_layer": 2, "n_head": 4}, ["c_attn"]),
    "t5": (
        "T5ForConditionalGeneration",
        {"vocab_size": 99, "d_model": 48, "d_kv": 12, "d_ff": 96, "num_layers": 2, "num_heads": 4,
         "decoder_start_token_id": 0},
        ["q", "v", "wo"],
    ),
}  # fmt: skip


def adapted(model, targets, adapter):
    lora = peft.LoraConfig(r=4, target_modules=targets, lora_dropout=0.0, fan_in_fan_out=targets == ["c_attn"])
    model = peft.get_peft_model(model, lora)
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for name, p in parameters.items():
            if name not in adapter:
                adapter[name] = 0.1 * torch.randn(p.shape, dtype=torch.float64)
            p.copy_(adapter[name])
    return model.train(), parameters


def run(model, parameters, name, ids, mask):
    labels = ids % 2 if name == "bert" else ids
    output = model(input_ids=ids, attention_mask=mask, labels=labels)
    # Not only the loss: it is a mean over many tokens, and its gradients are small relative to their rounding errors.
    real = mask.bool() if output.logits.dim() == 3 else slice(None)
    (output.loss + output.logits[real].square().mean()).backward()
    # All gradients of the adapter together: the largest error of a matrix with four rows is too random.
    return output.logits[real].detach(), torch.cat([p.grad.flatten() for p in parameters.values()])


@pytest.mark.parametrize("name", CASES)
def test_lora(name):
    kind, config, targets = CASES[name]
    cls = getattr(transformers, kind)
    torch.manual_seed(0)
    config = cls.config_class(**config)
    for key in [k for k in config.to_dict() if "drop" in k or k.endswith("pdrop")]:
        if isinstance(getattr(config, key), float):
            setattr(config, key, 0.0)
    theirs = cls(config)
    ours = getattr(tf, kind)(copy.deepcopy(config))
    ours.load_state_dict(theirs.state_dict())
    truth = copy.deepcopy(theirs).double()
    lengths = torch.randint(5, 25, (12,))
    lengths[0] = 24
    mask = (torch.arange(24) < lengths[:, None]).long()
    ids = torch.randint(1, 99, (12, 24))
    adapter: dict = {}
    found = [run(*adapted(m, targets, adapter), name, ids, mask) for m in (ours, theirs, truth)]
    assert_as_accurate(found[0][0], found[2][0], found[1][0])
    assert_as_accurate(found[0][1], found[2][1], found[1][1], GRADIENT)
