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


@pytest.fixture(autouse=True)
def exact_rotation(monkeypatch):
    """HF's ModernBERT rotates in float32 in every dtype; in the float64 reference model, rotate in float64."""
    from transformers.models.modernbert import modeling_modernbert as hf

    def rotate(q, k, cos, sin, unsqueeze_dim=1):
        cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
        wide = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in (q, k))
        return tuple((t * cos + hf.rotate_half(t) * sin).to(q.dtype) for t in wide)

    monkeypatch.setattr(hf, "apply_rotary_pos_emb", rotate)


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
                parameter.add_(torch.randn_like(parameter) * 0.05)  # so that biases and norms are not 0 and 1
            theirs.to(dtype)
        truth = getattr(transformers, name)(config).double()
        ours = getattr(transformer_fast, name)(config).to(dtype)
        for other in (truth, ours):
            other.load_state_dict(theirs.state_dict())
        # If a window has only padding, eager attention averages over it; torch's attention gives zeros, like ours.
        attention = "sdpa" if name.startswith("ModernBert") else "eager"
        for model in (theirs, truth):
            model.set_attn_implementation(attention)
        return ours.eval(), theirs.eval(), truth.eval()

    return make


@pytest.fixture
def ids():
    return torch.randint(1, VOCABULARY, (BATCH, LENGTH))
