"""attn_implementation="transformer_fast" against Hugging Face's eager attention, family by family."""

import pytest
import torch
from hf_models import SEQ2SEQ, TEXT, batch, cast, pooled, run_with_gradients, truth
from numerics import GRADIENT, assert_as_accurate

import transformer_fast  # noqa: F401  registers the implementation

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("padding", ["right", "left", "none"])
@pytest.mark.parametrize("family", TEXT)
def test_every_row_and_gradient(family, padding):
    model = TEXT[family]()
    inputs = batch(padding, seq2seq=family in SEQ2SEQ)
    true_out, true_grads = run_with_gradients(truth(model), inputs)
    for dtype in DTYPES:
        eager_out, eager_grads = run_with_gradients(cast(model, dtype), inputs)
        out, grads = run_with_gradients(cast(model, dtype, "transformer_fast"), inputs)
        assert_as_accurate(out, true_out, eager_out, name=f"{family} {dtype}")
        assert grads.keys() == true_grads.keys()
        assert_as_accurate(
            pooled(grads, true_grads), pooled(true_grads, true_grads), pooled(eager_grads, true_grads), GRADIENT,
            name=f"{family} {dtype} gradients",
        )  # fmt: skip
