import functools

import pytest
import torch
from encoder_cases import BATCH, LENGTH, VOCABULARY, encoder_config


def _mask(kind: str) -> torch.Tensor | None:
    if kind == "none":
        return None
    mask = torch.ones(BATCH, LENGTH, dtype=torch.long)
    for row in range(BATCH):
        real = (LENGTH, 1, 9, 4, 11, 7)[row % 6]
        if kind == "right":
            mask[row, real:] = 0
        elif kind == "left":
            mask[row, : LENGTH - real] = 0
        elif kind == "holes":
            mask[row, 1:] = (torch.rand(LENGTH - 1) < real / LENGTH).long()
    return mask


@pytest.fixture
def make_mask():
    return _mask


@pytest.fixture
def bert_config():
    return functools.partial(encoder_config, "Bert")


@pytest.fixture
def pair():
    """(ours, HF's in the same dtype, HF's in float64 with plain attention), the same random weights."""
    import transformers

    import transformer_fast

    def make(name: str, config, dtype=torch.float32):
        theirs = getattr(transformers, name)(config)
        with torch.no_grad():
            for parameter in theirs.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.05)  # biases and norms are not left at 0 and 1
            theirs.to(dtype)
        truth = getattr(transformers, name)(config).double()
        ours = getattr(transformer_fast, name)(config).to(dtype)
        for other in (truth, ours):
            other.load_state_dict(theirs.state_dict())
        for model in (theirs, truth):
            model.set_attn_implementation("eager")
        return ours.eval(), theirs.eval(), truth.eval()

    return make


@pytest.fixture
def ids():
    return torch.randint(1, VOCABULARY, (BATCH, LENGTH))
