"""Features of DeBERTa alone: groups of sequences by length, padding that is read, its loss rule, the convolution."""

import pytest
import torch
from encoder_cases import BATCH, VOCABULARY, by_module, compare, config_for, encoder_config, labels_for, real_rows
from numerics import GRADIENT, OUTPUT, assert_as_accurate

import transformer_fast

pytestmark = pytest.mark.quick
LENGTHS = (40, 17, 1, 16, 33, 5, 32, 2)


def ragged(kind: str = "right") -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, mask) whose sequences belong to several groups."""
    mask = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
    if kind == "holes":
        mask &= (torch.rand(mask.shape) < 0.7) | (torch.arange(max(LENGTHS)) == 0)
    return torch.randint(1, VOCABULARY, mask.shape), mask.long()


@pytest.mark.parametrize("changes", [{}, {"conv_kernel_size": 3}], ids=str)
@pytest.mark.parametrize("kind", ["right", "holes"])
def test_sequences_of_many_lengths(kind, changes, pair):
    """Outputs, and gradients of every parameter, including the embeddings of distances."""
    models = pair("DebertaV2Model", encoder_config("DebertaV2", max_position_embeddings=48, **changes))
    ids, mask = ragged(kind)
    weights = torch.randn(*ids.shape, 48, dtype=torch.float64)
    outputs, gradients = [], []
    for model in models:
        states = model(ids, attention_mask=mask).last_hidden_state
        (states * weights.to(states.dtype))[mask.bool()].sum().backward()
        outputs.append(real_rows(states.detach(), mask))
        gradients.append(by_module(model))
    assert_as_accurate(outputs[0], outputs[2], outputs[1], OUTPUT)
    assert gradients[0].keys() == gradients[1].keys() and "encoder.rel_embeddings" in gradients[0]
    for name, wanted in gradients[2].items():
        assert_as_accurate(gradients[0][name], wanted, gradients[1][name], GRADIENT, name)


@pytest.mark.parametrize("changes", [{}, {"conv_kernel_size": 3}, {"relative_attention": False}], ids=str)
def test_padding_that_is_read(changes, pair, make_mask, ids):
    """A label on padding, and a first position that is padding: in HF, padded queries average over all positions."""
    mask = make_mask("left")
    models = pair("DebertaV2ForTokenClassification", config_for("DebertaV2ForTokenClassification", **changes))
    labels = torch.randint(0, 4, ids.shape)
    outputs = [model(ids, attention_mask=mask, labels=labels) for model in models]
    compare(*outputs, None, ("logits", "loss"))
    with transformer_fast.compute_padding(True):
        outputs[0] = models[0](ids, attention_mask=mask)
    compare(*outputs, None, ("logits",))
    assert models[0](ids, attention_mask=torch.zeros_like(mask)).logits.shape == (*ids.shape, 4)


@pytest.mark.parametrize("kind", ["one label", "some below 0", "all below 0", "shares"])
def test_losses_of_no_problem_type(kind, pair, make_mask, ids):
    count = 1 if kind == "one label" else 3
    models = pair("DebertaV2ForSequenceClassification", encoder_config("DebertaV2", num_labels=count))
    labels = {
        "one label": torch.rand(BATCH), "some below 0": torch.arange(BATCH) % 4 - 1,
        "all below 0": torch.full((BATCH,), -1), "shares": torch.rand(BATCH, 3),
    }[kind]  # fmt: skip
    outputs = [m(ids, attention_mask=make_mask("right"), labels=labels.to(m.dtype) if kind in ("one label", "shares")
                 else labels) for m in models]  # fmt: skip
    for output in outputs[2:]:
        output["loss"], output["logits"] = output.loss.double(), output.logits.double()
    assert outputs[0].logits.shape == outputs[1].logits.shape and outputs[0].loss.dtype == outputs[1].loss.dtype
    compare(*outputs, None, ("logits", "loss"))
    assert models[0].config.problem_type is None


def test_one_layer_and_a_convolution(pair, make_mask, ids):
    """The first layer is also the last: the convolution reads neighbours of the positions that the head reads."""
    name = "DebertaV2ForSequenceClassification"
    models = pair(name, config_for(name, num_hidden_layers=1, conv_kernel_size=3, pooler_hidden_act="tanh"))
    mask = make_mask("right")
    found = [[] for _ in models]
    for _ in range(8):  # several batches, because a head has few scores
        ids = torch.randint(1, VOCABULARY, ids.shape)
        for logits, model in zip(found, models):
            logits.append(model(ids, attention_mask=mask).logits.flatten())
    ours, theirs, truth = (torch.cat(f) for f in found)
    assert_as_accurate(ours, truth, theirs)


def test_documents_in_a_row(pair):
    ours, _, truth = pair("DebertaV2Model", encoder_config("DebertaV2", position_biased_input=False))
    parts = [torch.randint(1, VOCABULARY, (1, n)) for n in (13, 2, 9)]
    cu = torch.tensor([0, 13, 15, 24], dtype=torch.int32)
    with torch.no_grad():
        together = ours(torch.cat(parts, 1), cu_seq_lens_q=cu).last_hidden_state
        apart, exact = (torch.cat([m(p).last_hidden_state for p in parts], 1) for m in (ours, truth))
    assert_as_accurate(together, exact, apart)
    convolved = transformer_fast.DebertaV2Model(encoder_config("DebertaV2", conv_kernel_size=3))
    with pytest.raises(ValueError, match="cu_seq_lens_q, seq_idx: wanted None, as the convolution"):
        convolved(torch.cat(parts, 1), cu_seq_lens_q=cu)


def test_labels_of_words_go_as_hugging_face_s(pair, make_mask, ids):
    """The head whose scores come from the embedding table has gradients to it."""
    models = pair("DebertaV2ForMaskedLM", encoder_config("DebertaV2", legacy=False))
    mask = make_mask("right")
    call = labels_for("DebertaV2ForMaskedLM", mask, ids.shape)
    for model in models:
        model(ids, attention_mask=mask, **call).loss.backward()
    ours, theirs, truth = (by_module(m) for m in models)
    assert ours.keys() == theirs.keys()
    for name in ("lm_predictions.lm_head", "deberta.embeddings.word_embeddings"):
        assert_as_accurate(ours[name], truth[name], theirs[name], GRADIENT, name)


def test_padding_whose_lengths_cannot_be_read(pair, make_mask, ids):
    """Inside torch.func.grad every position is computed."""
    ours, _, _ = pair("DebertaV2ForTokenClassification", config_for("DebertaV2ForTokenClassification"))
    call = {"attention_mask": make_mask("right"), "labels": torch.randint(0, 4, ids.shape)}
    weights = {name: p.detach().double() for name, p in ours.double().named_parameters()}

    def loss(weights):
        return torch.func.functional_call(ours, weights, (ids,), call).loss

    gradients = torch.func.grad(loss)(weights)
    ours(ids, **call).loss.backward()
    for name, p in ours.named_parameters():
        torch.testing.assert_close(gradients[name], p.grad)
