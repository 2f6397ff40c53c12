"""The AWD-LSTM: its papers' formulas, its dropouts, its state, checkpoints and ULMFiT's classifier."""

import copy
from unittest import mock

import pytest
import torch
from numerics import GRADIENT, assert_as_accurate, pooled

import transformer_fast as tf
from transformer_fast.models import awd_lstm

LENGTHS = (7, 3, 1, 5)
NO_DROPOUT = {
    f"{name}_dropout": 0.0 for name in ("embedding", "input", "weight", "hidden", "output", "classifier")
}  # fmt: skip


def build(head=tf.AWDLSTMForCausalLM, **settings):
    torch.manual_seed(1)
    defaults = {"vocab_size": 31, "embedding_size": 12, "cell_size": 20, "num_layers": 3, "initializer_range": 0.8}
    model = head(tf.AWDLSTMConfig(**{**defaults, **settings})).eval()
    with torch.no_grad():
        for layer in model.base_model.layers:  # so that states differ between tokens
            layer.weight_ih.mul_(4), layer.weight_hh.mul_(2)
    return model


def batch(padding="right"):
    g = torch.Generator().manual_seed(3)
    ids = torch.randint(1, 31, (len(LENGTHS), max(LENGTHS)), generator=g)
    position, length = torch.arange(max(LENGTHS)), torch.tensor(LENGTHS)[:, None]
    mask = (position < length) if padding == "right" else (position >= max(LENGTHS) - length)
    return {"input_ids": ids * mask, "attention_mask": mask.long()}


def written_out(model, ids):
    """Logits (S, V) of one sentence, step by step (Merity et al., 2018, section 2)."""
    x = list(model.model.embed_tokens.weight[ids])
    for layer in model.model.layers:
        h, c = x[0].new_zeros(layer.output_size), x[0].new_zeros(layer.cell_size)
        out = []
        for vector in x:
            i, f, g, o = (layer.weight_ih @ vector + layer.weight_hh @ h + layer.bias).chunk(4)
            c = i.sigmoid() * g.tanh() + f.sigmoid() * c
            h = o.sigmoid() * c.tanh()
            out.append(h)
        x = out
    return torch.stack(x) @ model.lm_head.weight.t() + model.lm_head.bias


@pytest.mark.parametrize("padding", ["left", "right"])
def test_is_the_papers(padding):
    model, inputs = build(), batch(padding)
    tokens = inputs["attention_mask"].bool()
    cotangent = torch.randn(sum(LENGTHS), 31)
    results = {}
    for name, m in (("truth", copy.deepcopy(model).double()), ("plain", model), ("ours", model)):
        if name == "ours":
            logits = m(**inputs).logits[tokens]
        else:
            logits = torch.cat([written_out(m, row[mask]) for row, mask in zip(inputs["input_ids"], tokens)])
        names, parameters = zip(*m.named_parameters())
        grads = torch.autograd.grad((logits * cotangent.to(logits.dtype)).sum(), parameters)
        results[name] = logits.detach(), dict(zip(names, grads))
    (truth, truth_grads), (plain, plain_grads), (ours, our_grads) = (results[n] for n in ("truth", "plain", "ours"))
    assert_as_accurate(ours, truth, plain)
    assert_as_accurate(*(pooled(g, truth_grads) for g in (our_grads, truth_grads, plain_grads)), GRADIENT)
    assert model.model(**inputs).last_hidden_state[~tokens].eq(0).all()


@pytest.mark.quick
def test_loss_is_of_the_next_token():
    model, inputs = build(), batch()
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    out = model(**inputs, labels=labels)
    wanted = torch.nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(out.loss, wanted)
    with pytest.raises(ValueError, match=r"labels: wanted shape \(4, 7\), got \(4, 6\)"):
        model(**inputs, labels=labels[:, 1:])


@pytest.mark.quick
def test_regularisation_in_training_alone():
    inputs = batch()
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    losses = {}
    for alpha, beta in ((0.0, 0.0), (2.0, 0.0), (0.0, 3.0)):
        model = build(**NO_DROPOUT, activation_regularization=alpha, temporal_regularization=beta).train()
        losses[alpha, beta] = model(**inputs, labels=labels).loss
        torch.testing.assert_close(model.eval()(**inputs, labels=labels).loss, losses[0.0, 0.0])
    states = [h[:n] for h, n in zip(model.model(**inputs).last_hidden_state, LENGTHS)]
    activation = 2.0 * torch.cat(states).square().mean()
    temporal = 3.0 * torch.cat([h[1:] - h[:-1] for h in states]).square().mean()
    torch.testing.assert_close(losses[2.0, 0.0] - losses[0.0, 0.0], activation)
    torch.testing.assert_close(losses[0.0, 3.0] - losses[0.0, 0.0], temporal)


# ---- each dropout separately -----------------------------------------------------------------------------
def states(name, layer, ids, p=0.5):
    model = build(tf.AWDLSTMModel, **{**NO_DROPOUT, f"{name}_dropout": p}).train()
    torch.manual_seed(7)
    return model(ids, output_hidden_states=True).hidden_states[layer], model


@pytest.mark.quick
def test_words_are_dropped_everywhere():
    ids = torch.arange(1, 31).repeat(2, 2)  # each word four times
    x, model = states("embedding", 0, ids)
    whole = model.embed_tokens(ids)
    kept = x.ne(0).any(-1)
    assert torch.equal(x[kept], 2 * whole[kept]) and x[~kept].eq(0).all()
    assert 0.2 < kept.float().mean() < 0.8
    for word in range(1, 31):
        assert len(kept[ids == word].unique()) == 1


@pytest.mark.quick
@pytest.mark.parametrize("name, layer", [("input", 0), ("hidden", 1), ("output", -1)])
def test_one_mask_for_a_sequence(name, layer):
    ids = torch.randint(1, 31, (3, 9))
    x, model = states(name, layer, ids)
    plain = model.eval()(ids, output_hidden_states=True).hidden_states[layer]
    kept = x.ne(0)
    assert torch.equal(kept, kept[:, :1].expand_as(kept)) and not torch.equal(kept[0], kept[1])
    torch.testing.assert_close(x, 2 * plain * kept)


@pytest.mark.quick
def test_weights_are_dropped():
    ids = torch.randint(1, 31, (2, 6))
    x, model = states("weight", 1, ids)
    plain = model.eval()(ids, output_hidden_states=True).hidden_states[1]
    torch.testing.assert_close(x[:, 0], plain[:, 0])  # the first step has no state for the weights
    assert not torch.isclose(x[:, 1:], plain[:, 1:]).any(-1).all()
    y, model = states("weight", 1, ids)
    assert torch.equal(x, y)  # one seed, one mask
    y.sum().backward()
    dropped = model.layers[0].weight_hh.grad.eq(0).float().mean()
    assert 0.35 < dropped < 0.65  # dropped weights have no gradient


def test_layers_computed_again(monkeypatch):
    """Gradient checkpointing gives the same gradients, also with dropout."""
    found = []
    for again in (False, True):
        model = build(num_layers=2).train()
        if again:
            model.gradient_checkpointing_enable()
        counted = mock.Mock(side_effect=awd_lstm.lstm)
        monkeypatch.setattr(awd_lstm, "lstm", counted)
        torch.manual_seed(0)
        model(**batch(), labels=batch()["input_ids"]).loss.backward()
        monkeypatch.undo()
        assert counted.call_count == (4 if again else 2)
        found.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(*found)


# ---- the state -------------------------------------------------------------------------------------------
@pytest.mark.quick
def test_goes_on_from_a_state():
    model, ids = build(), torch.randint(1, 31, (3, 8))
    whole = model(ids).logits
    first = model(ids[:, :5])
    second = model(ids[:, 5:], past_key_values=first.past_key_values)
    torch.testing.assert_close(torch.cat((first.logits, second.logits), 1), whole)
    assert second.past_key_values.get_seq_length() == 8
    assert not first.past_key_values.detach().layers[0][0].requires_grad
    assert model(ids, use_cache=False).past_key_values is None
    with pytest.raises(ValueError, match="past_key_values: wanted a state of 2 sequences, got one of 3"):
        model(ids[:2], past_key_values=first.past_key_values)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"do_sample": True, "top_k": 5}], ids=str)
def test_generates_the_same_with_and_without_a_state(options):
    model, inputs = build(), batch("left")
    found = []
    for use_cache in (True, False):
        torch.manual_seed(0)
        found.append(model.generate(**inputs, max_new_tokens=6, use_cache=use_cache, **options))
    assert torch.equal(*found) and len(found[0][:, 7:].unique()) > 2


# ---- checkpoints and the classifier --------------------------------------------------------------------------
def test_from_language_model_to_classifier(tmp_path):
    model, inputs = build(), batch()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.save_pretrained(tmp_path)
    again = tf.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again) is tf.AWDLSTMForCausalLM and again.lm_head.weight is again.model.embed_tokens.weight
    assert all(torch.equal(t, again.state_dict()[n]) for n, t in model.state_dict().items())
    assert type(tf.AutoModel.from_pretrained(tmp_path)) is tf.AWDLSTMModel
    head = tf.AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=3)
    assert type(head) is tf.AWDLSTMForSequenceClassification
    assert all(torch.equal(t, head.model.state_dict()[n]) for n, t in model.model.state_dict().items())
    read = head.model(**inputs).last_hidden_state
    x = tf.concat_pooling(read, inputs["attention_mask"])
    x = torch.relu(head.hidden(head.norms[0](x)))
    out = head(**inputs, labels=torch.tensor([0, 1, 2, 1]))
    torch.testing.assert_close(out.logits, head.classifier(head.norms[1](x)))
    head.train()(**inputs, labels=torch.tensor([0, 1, 2, 1])).loss.backward()
    assert all(p.grad is not None for p in head.parameters())


@pytest.mark.parametrize(
    "call, error, message",
    [
        ({"input_ids": torch.full((1, 3), 31)}, ValueError, r"input_ids: wanted values in \[0, 31\)"),
        ({"input_ids": torch.ones(1, 3)}, TypeError, "input_ids: wanted an int32 or int64 tensor"),
        ({"input_ids": torch.ones(1, 0, dtype=torch.long)}, ValueError, "input_ids: wanted at least one token"),
        ({}, ValueError, "wanted exactly one of them, got neither"),
        ({"input_ids": torch.ones(1, 3, dtype=torch.long), "attention_mask": torch.ones(1, 2)}, ValueError,
         r"attention_mask: wanted shape \(batch, length\) = \(1, 3\), got \(1, 2\)"),
    ],
)  # fmt: skip
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        build()(**call)


def test_bad_settings_and_empty_rows():
    with pytest.raises(ValueError, match=r"weight_dropout: wanted a number in \[0, 1\), got 1.0"):
        tf.AWDLSTMConfig(weight_dropout=1.0)
    model, inputs = build(tf.AWDLSTMModel), batch()
    inputs["attention_mask"][2] = 0
    out = model(**inputs).last_hidden_state
    assert out[2].eq(0).all() and torch.equal(out[0], model(**batch()).last_hidden_state[0])
