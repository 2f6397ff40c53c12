"""Features of ModernBERT alone: windows on both sides, mean pooling, sparse prediction, one mask per layer kind."""

import pytest
import torch
from encoder_cases import BATCH, VOCABULARY, compare, config_for, encoder_config, labels_for, real_rows
from numerics import assert_as_accurate

import transformer_fast

pytestmark = pytest.mark.quick


def over_batches(models, call, count: int = 8):
    """The flattened outputs of each model over several batches, because a head has few scores."""
    found: list[dict] = [{} for _ in models]
    for _ in range(count):
        arguments = call()
        for merged, model in zip(found, models):
            for key, value in model(**arguments).items():
                merged.setdefault(key, []).append(value.flatten())
    return [{key: torch.cat(parts) for key, parts in merged.items()} for merged in found]


@pytest.mark.parametrize("kind", ["none", "right", "left", "holes"])
def test_mean_of_the_tokens(kind, pair, make_mask):
    name = "ModernBertForSequenceClassification"
    models = pair(name, config_for(name, classifier_pooling="mean"))

    def call():
        mask = make_mask(kind)
        ids = torch.randint(1, VOCABULARY, (BATCH, 13))
        return {"input_ids": ids, "attention_mask": mask, **labels_for(name, mask, ids.shape)}

    compare(*over_batches(models, call), None, ("logits", "loss"))


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_multiple_choice_of_padding_on_the_left(pooling, pair, make_mask):
    """The first token is pooled, not the first position."""
    models = pair("ModernBertForMultipleChoice", encoder_config("ModernBert", classifier_pooling=pooling))
    mask = make_mask("left").view(6, 2, -1)

    def call():
        return {"input_ids": torch.randint(1, VOCABULARY, (6, 2, 13)), "attention_mask": mask}

    compare(*over_batches(models, call), None, ("logits",))


def test_a_mask_that_no_mean_can_be_taken_over(ids):
    name = "ModernBertForSequenceClassification"
    model = transformer_fast.ModernBertForSequenceClassification(config_for(name, classifier_pooling="mean"))
    with pytest.raises(ValueError, match=r"attention_mask: the mean over the tokens .* wants \(batch, length\)"):
        model(ids, attention_mask=torch.ones(BATCH, 1, 13, 13, dtype=torch.bool))


def test_sparse_prediction(pair, make_mask, ids):
    """With labels, only the labelled positions have logits."""
    mask = make_mask("right")
    models = pair("ModernBertForMaskedLM", encoder_config("ModernBert", sparse_prediction=True))
    labels = labels_for("ModernBertForMaskedLM", mask, ids.shape)
    outputs = [model(ids, attention_mask=mask, **labels) for model in models]
    assert outputs[0].logits.shape == outputs[1].logits.shape == (int((labels["labels"] != -100).sum()), VOCABULARY)
    compare(*outputs, None, ("logits", "loss"))
    assert models[0](ids, attention_mask=mask).logits.shape == (*ids.shape, VOCABULARY)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_is_of_a_batch_gathered_in_parts(dtype, pair, make_mask, ids):
    """The sum of losses is divided by Trainer's num_items_in_batch; the loss is in float32."""
    mask = make_mask("right")
    models = pair("ModernBertForMaskedLM", encoder_config("ModernBert"), dtype)
    call = labels_for("ModernBertForMaskedLM", mask, ids.shape) | {"num_items_in_batch": torch.tensor(700)}
    outputs = [model(ids, attention_mask=mask, **call) for model in models]
    assert outputs[0].loss.dtype == outputs[1].loss.dtype
    compare(*({k: v.to(dtype if m is not models[2] else torch.float64) for k, v in o.items()}
              for m, o in zip(models, outputs)), mask, ("logits", "loss"))  # fmt: skip
    assert outputs[0].loss < models[0](ids, attention_mask=mask, labels=call["labels"]).loss / 2


def test_masks_by_kind_of_layer(pair, ids):
    """HF takes one mask per layer kind: its own forward runs with them, in heads too."""
    near = (torch.arange(13)[:, None] - torch.arange(13)).abs() <= 1
    masks = {"full_attention": None, "sliding_attention": near.expand(BATCH, 1, 13, 13)}
    for name in ("ModernBertModel", "ModernBertForTokenClassification", "ModernBertForQuestionAnswering"):
        models = pair(name, config_for(name))
        outputs = [model(ids, attention_mask=masks) for model in models]
        plain = models[0](ids)[0]
        with pytest.raises(AssertionError, match="largest error"):  # the masks have an effect
            assert_as_accurate(plain, outputs[2][0], outputs[1][0])
        compare(*outputs, None, tuple(outputs[1]))


def test_documents_in_a_row(pair):
    """Attention, with and without windows, does not cross the documents of cu_seq_lens_q."""
    ours, _, truth = pair("ModernBertModel", encoder_config("ModernBert"))
    parts = [torch.randint(1, VOCABULARY, (1, n)) for n in (13, 2, 9)]
    cu = torch.tensor([0, 13, 15, 24], dtype=torch.int32)
    positions = torch.cat([torch.arange(n) for n in (13, 2, 9)])[None]
    with torch.no_grad():
        together = ours(torch.cat(parts, 1), cu_seq_lens_q=cu, position_ids=positions).last_hidden_state
        apart, exact = (torch.cat([m(p).last_hidden_state for p in parts], 1) for m in (ours, truth))
    assert_as_accurate(together, exact, apart)


def test_a_layer_of_another_kind_goes_to_hugging_face(pair, make_mask, ids):
    mask = make_mask("right")
    models = pair("ModernBertModel", encoder_config("ModernBert"))
    for model in models:
        model.layers[0].attention_type = "sliding_attention"
    assert "attention_type" in models[0].explain()
    outputs = [model(ids, attention_mask=mask).last_hidden_state for model in models]
    assert_as_accurate(*(real_rows(outputs[i], mask) for i in (0, 2, 1)))
