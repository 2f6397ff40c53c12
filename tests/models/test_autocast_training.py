"""Fine-tuning under bfloat16 autocast: the losses follow those of float64 as closely as Hugging Face's do."""

import pytest
import torch
from encoder_cases import BATCH, LENGTH, VOCABULARY
from numerics import GRADIENT, assert_as_accurate

STEPS = 12


def losses(model, batches, autocast: bool) -> torch.Tensor:
    """(STEPS,) losses of fine-tuning with AdamW, without dropout."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    found = []
    for batch in batches:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(**batch).loss
        assert loss.isfinite()
        loss.backward()
        optimizer.step()
        found.append(loss.detach().double())
    return torch.stack(found)


@pytest.mark.parametrize("family", ["Bert", "GPT2"])
def test_losses_under_autocast_follow_float64(family, pair, bert_config, make_mask):
    if family == "Bert":
        name, config = "BertForSequenceClassification", bert_config(hidden_dropout_prob=0.0)
    else:
        from transformers import GPT2Config

        name = "GPT2LMHeadModel"
        config = GPT2Config(vocab_size=VOCABULARY, n_positions=32, n_embd=32, n_layer=2, n_head=4, bos_token_id=0)
    ours, theirs, truth = pair(name, config)
    ids = torch.randint(1, VOCABULARY, (STEPS, BATCH, LENGTH))
    mask = make_mask("right")
    labels = ids % 2 if family == "Bert" else ids.masked_fill(mask == 0, -100)
    batches = [
        {"input_ids": ids[i], "attention_mask": mask, "labels": labels[i, :, 0] if family == "Bert" else labels[i]}
        for i in range(STEPS)
    ]
    found, plain, exact = (losses(m, batches, m is not truth) for m in (ours, theirs, truth))
    assert_as_accurate(found.float(), exact, plain.float(), GRADIENT)
