"""Pre-norm layers: the last residual sum of a layer and the first norm of the next are one op, but only if nothing
reads the state between them."""

import decoder_cases
import pytest
import torch
from numerics import GRADIENT, OUTPUT, assert_as_accurate, pooled
from torch.utils._python_dispatch import TorchDispatchMode


class Sums(TorchDispatchMode):
    """Counts additions that are separate ops."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten.add.Tensor
        return function(*args, **(kwargs or {}))


def sums(model, ids):
    with torch.no_grad(), Sums() as mode:
        model(input_ids=ids, use_cache=False)
    return mode.count


def test_one_sum_is_left_where_nothing_stands_between_layers():
    ours, theirs, _ = decoder_cases.models("Llama", "Model")
    ids = decoder_cases.batch("none")[0][:2]
    assert sums(ours, ids) == 2  # the positions, and the last layer's sum
    hooks = [model.layers[1].register_forward_hook(lambda m, a, out: out * 2) for model in (ours, theirs)]
    with torch.no_grad():
        found = [m(input_ids=ids).last_hidden_state for m in (ours, theirs)]
    torch.testing.assert_close(*found)
    for hook in hooks:
        hook.remove()
    ours.train()
    ours.gradient_checkpointing_enable()
    assert sums(ours, ids) == 4  # a checkpointed layer returns only its sum


@pytest.mark.parametrize("family", ["Gemma2", "GPTNeoX"])
def test_outputs_and_gradients(family):
    """In training, with the norm computed inside the previous layer, and with different dtypes."""
    models = decoder_cases.models(family, "ForCausalLM", torch.bfloat16)
    ids = decoder_cases.batch("none")[0]
    logits, grads = [], []
    for model in models:
        model.train()
        output = model(input_ids=ids, labels=ids)
        output.loss.backward()
        logits.append(output.logits.detach())
        grads.append({name: p.grad.double() for name, p in model.named_parameters()})
    ours, theirs, truth = logits
    assert_as_accurate(ours, truth, theirs, OUTPUT, "logits")
    ours, theirs, truth = grads
    parts = [pooled(ours, truth).bfloat16(), pooled(truth, truth), pooled(theirs, truth).bfloat16()]
    assert_as_accurate(*parts, GRADIENT, "gradients")
