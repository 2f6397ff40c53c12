"""BERT's outputs and gradients equal Hugging Face's, on every row of ragged batches."""

import pytest
import torch
import transformers
from encoder_cases import HEADS as SHARED_HEADS
from encoder_cases import (
    compare,
    compare_gradients_over_batches,
    compare_over_batches,
    compare_with_checkpointing,
    config_for,
    labels_for,
    real_rows,
)
from numerics import GRADIENT, assert_as_accurate
from torch.utils._python_dispatch import TorchDispatchMode

import transformer_fast

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
CASES = [("none", F32), ("right", F32), ("left", F32), ("holes", F32), ("right", BF16), ("left", F16), ("holes", BF16)]
TRAINING_CASES = [("right", F32), ("left", BF16), ("holes", F16)]
HEADS = {f"Bert{head}": outputs for head, outputs in SHARED_HEADS.items()}


@pytest.mark.parametrize("kind, dtype", CASES)
@pytest.mark.parametrize("name", HEADS)
def test_outputs(name, kind, dtype, pair, make_mask):
    compare_over_batches(pair(name, config_for(name), dtype), name, make_mask, kind)


@pytest.mark.quick
@pytest.mark.parametrize("kind", ["right", "left"])
@pytest.mark.parametrize("name", ["BertModel", "BertForMaskedLM"])
def test_padding_gives_zeros(name, kind, bert_config, pair, make_mask, ids):
    mask = make_mask(kind)
    model = pair(name, bert_config())[0]
    output = model(ids, attention_mask=mask)[0]
    padding = ~mask.bool()
    if name == "BertModel":
        padding[:, 0] = False  # the pooler reads it
    assert output[padding].eq(0).all() and output[mask.bool()].abs().sum(-1).gt(0).all()


@pytest.mark.parametrize("kind, dtype", TRAINING_CASES)
@pytest.mark.parametrize("name", HEADS)
def test_gradients(name, kind, dtype, pair, make_mask):
    compare_gradients_over_batches(pair(name, config_for(name), dtype), name, make_mask, kind)


@pytest.mark.parametrize("kind", ["none", "right", "left"])
def test_multiple_choice(kind, bert_config, pair, make_mask):
    mask = make_mask(kind)
    mask = None if mask is None else mask.view(6, 2, -1)
    models = pair("BertForMultipleChoice", bert_config())
    labels = torch.randint(0, 2, (6,))
    outputs = [[] for _ in models]
    for _ in range(40):  # several batches, because one has few scores and a single loss
        ids = torch.randint(1, 99, (6, 2, 13))
        for found, model in zip(outputs, models):
            found.append(model(ids, attention_mask=mask, labels=labels))
    merged = [{k: torch.cat([o[k].reshape(-1) for o in found]) for k in ("logits", "loss")} for found in outputs]
    assert outputs[0][0].logits.shape == (6, 2)
    compare(*merged, None, ("logits", "loss"))


@pytest.mark.parametrize("problem", ["regression", "multi_label_classification", None])
def test_classification_problems(problem, bert_config, pair, make_mask, ids):
    mask = make_mask("right")
    models = pair("BertForSequenceClassification", bert_config(num_labels=3, problem_type=problem))
    labels = torch.rand(12, 3)
    outputs = [m(ids, attention_mask=mask, labels=labels.to(m.dtype)) for m in models]
    compare(*outputs, None, ("logits", "loss"))
    assert models[0].config.problem_type == models[1].config.problem_type


@pytest.mark.parametrize("name", ["BertForMaskedLM", "BertForTokenClassification"])
def test_labels_on_padding_count_as_they_do_there(name, bert_config, pair, make_mask, ids):
    mask = make_mask("right")
    models = pair(name, bert_config())
    labels = torch.randint(0, 4, ids.shape)
    compare(*(m(ids, attention_mask=mask, labels=labels) for m in models), mask, ("logits", "loss"))


def test_question_answering_never_picks_padding(bert_config, pair, make_mask, ids):
    mask = make_mask("right")
    ours, theirs, _ = pair("BertForQuestionAnswering", bert_config(num_labels=2))
    start = ours(ids, attention_mask=mask).start_logits
    assert mask[torch.arange(12), start.argmax(1)].all()
    assert start.isfinite().all()
    expected = theirs(ids, attention_mask=mask).start_logits.masked_fill(mask == 0, -1e9)
    assert torch.equal(start.argmax(1), expected.argmax(1))


@pytest.mark.quick
@pytest.mark.parametrize("kind", ["none", "right", "left", "holes"])
@pytest.mark.parametrize("name", ["BertModel", "BertForSequenceClassification"])
def test_hidden_states_and_attentions(name, kind, bert_config, pair, make_mask, ids):
    mask = make_mask(kind)
    models = pair(name, bert_config())
    outputs = [m(ids, attention_mask=mask, output_hidden_states=True, output_attentions=True) for m in models]
    ours, theirs, truth = outputs
    assert list(ours.keys()) == list(theirs.keys())
    assert len(ours.hidden_states) == 3 and len(ours.attentions) == 2
    for i in range(3):
        assert_as_accurate(*(real_rows(o.hidden_states[i], mask) for o in (ours, truth, theirs)))
    for i in range(2):
        parts = (real_rows(o.attentions[i].transpose(1, 2), mask) for o in (ours, truth, theirs))
        assert_as_accurate(*parts, name=f"attentions {i}")
    compare(*outputs, mask, list(ours.keys())[:1])
    if name == "BertModel":
        assert ours.hidden_states[-1] is ours.last_hidden_state


def test_chosen_hidden_states(bert_config, pair, make_mask, ids):
    ours, theirs, _ = pair("BertModel", bert_config())
    for chosen in (1, [0, -1], -2):
        a, b = (m(ids, output_hidden_states=chosen).hidden_states for m in (ours, theirs))
        assert [t is None for t in a] == [t is None for t in b]


def test_gradient_through_attentions(bert_config, pair, make_mask, ids):
    mask = make_mask("right")
    found = []
    real = mask.double()[:, None, :, None] * mask.double()[:, None, None]
    weights = torch.randn(12, 3, 13, 13, dtype=torch.float64) * real
    for model in pair("BertModel", bert_config()):
        attentions = model(ids, attention_mask=mask, output_attentions=True).attentions
        sum((a * weights.to(a.dtype)).sum() for a in attentions).backward()
        found.append(model.encoder.layer[0].attention.self.query.weight.grad)
    assert_as_accurate(found[0], found[2], found[1], GRADIENT)


@pytest.mark.quick
def test_inputs_embeds_positions_and_tuples(bert_config, pair, make_mask, ids):
    mask = make_mask("left")
    models = pair("BertModel", bert_config())
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    outputs = []
    for model in models:
        embedded = model.get_input_embeddings()(ids)
        outputs.append(model(inputs_embeds=embedded, attention_mask=mask, position_ids=positions))
    compare(*outputs, mask, HEADS["BertModel"])
    output = models[0](ids, return_dict=False)
    assert isinstance(output, tuple) and len(output) == 2
    assert isinstance(models[0], transformers.BertModel)


@pytest.mark.parametrize("shape", ["3-D", "4-D bool", "4-D float per head"])
def test_full_masks(shape, bert_config, pair, ids):
    models = pair("BertModel", bert_config())
    allowed = (torch.rand(12, 1, 13, 13) < 0.7) | torch.eye(13, dtype=torch.bool)
    if shape == "4-D float per head":
        given = torch.randn(12, 3, 13, 13).masked_fill(~allowed, torch.finfo(torch.float32).min)
        plain = given
    else:
        plain = torch.zeros(12, 1, 13, 13).masked_fill(~allowed, torch.finfo(torch.float32).min)
        given = allowed[:, 0] if shape == "3-D" else allowed
    ours = models[0](ids, attention_mask=given)
    theirs, truth = (m(ids, attention_mask=plain.to(m.dtype)) for m in models[1:])
    compare(ours, theirs, truth, None, HEADS["BertModel"])


def test_activations_without_a_fused_kernel(bert_config, pair, make_mask, ids):
    for activation in ("gelu_new", "quick_gelu", "tanh"):
        models = pair("BertForMaskedLM", bert_config(hidden_act=activation))
        compare(*(m(ids, attention_mask=make_mask("right")) for m in models), make_mask("right"), ("logits",))


def test_an_empty_row_and_an_empty_batch(bert_config, pair, ids):
    ours, _, _ = pair("BertModel", bert_config())
    ours.set_attn_implementation("sdpa")  # with eager attention transformers' forward runs, see test_empty_rows.py
    mask = torch.ones_like(ids)
    mask[2] = 0
    output = ours(ids, attention_mask=mask)
    assert output.last_hidden_state.isfinite().all() and output.last_hidden_state[2, 1:].eq(0).all()
    assert ours(ids[:0]).last_hidden_state.shape == (0, 13, 48)


def test_adapters_and_hooks_are_called(bert_config, pair, make_mask, ids):
    """A projection that is not a plain Linear is called as a module, also if it is one of the three fused ones."""
    mask = make_mask("right")
    models = pair("BertForSequenceClassification", bert_config())
    seen = []

    class Adapter(torch.nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base = base

        def forward(self, x):
            return self.base(x) * 2

    for model in models:
        for layer in model.bert.encoder.layer:
            layer.attention.self.query = Adapter(layer.attention.self.query)
            layer.intermediate.dense = Adapter(layer.intermediate.dense)
            layer.output.LayerNorm.register_forward_hook(lambda module, args, y: y + 0.5)
        model.bert.encoder.layer[-1].attention.self.value.register_forward_hook(lambda *a: seen.append(1))
    compare(*(m(ids, attention_mask=mask) for m in models), None, ("logits",))
    assert len(seen) == 3


def test_dropout_modules_decide(bert_config, pair, ids):
    """Dropout is read from the modules in each call: trainers set p, and freeze single modules with eval()."""
    ours = pair("BertModel", bert_config(hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.5))[0].train()
    assert not torch.equal(ours(ids)[0], ours(ids)[0])
    for module in ours.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    assert torch.equal(ours(ids)[0], ours(ids)[0])


@pytest.mark.quick
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant, bert_config, pair, make_mask, ids):
    """The same loss and gradients, dropout included: the recomputation draws the same masks, in every dtype."""
    mask = make_mask("right")
    config = bert_config(hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.2)
    ours, _, truth = pair("BertForMaskedLM", config)
    double = transformer_fast.BertForMaskedLM(config).double()
    double.load_state_dict(truth.state_dict())
    labels = labels_for("BertForMaskedLM", mask, ids.shape)
    compare_with_checkpointing(ours, double, reentrant, {"input_ids": ids, "attention_mask": mask, **labels})


def test_autocast(bert_config, pair, make_mask, ids):
    mask = make_mask("right")
    ours, theirs, truth = pair("BertForSequenceClassification", bert_config())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        a, b = (m(ids, attention_mask=mask).logits for m in (ours, theirs))
    assert a.dtype == b.dtype
    assert_as_accurate(a, truth(ids, attention_mask=mask).logits, b)


def test_autocast_widens_no_activations(bert_config, pair, ids):
    """The wide activations of a feed-forward block stay in bfloat16 between its products."""
    config = bert_config()
    assert config.intermediate_size != config.hidden_size
    model = pair("BertModel", config)[0].train()
    converted = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if func is torch.ops.aten._to_copy.default and out.dim() == 3 and out.shape[-1] == config.intermediate_size:
                converted.append(out.dtype)
            return out

    with torch.autocast("cpu", dtype=torch.bfloat16), Watch():
        loss = model(ids).last_hidden_state.sum()
    with Watch():
        loss.backward()
    assert not converted


@pytest.mark.parametrize("fullgraph", [True, False])
def test_compile(fullgraph, bert_config, pair, make_mask, ids):
    ours, theirs, truth = pair("BertModel", bert_config())
    mask = None if fullgraph else make_mask("right")
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=fullgraph)
    with torch.no_grad():
        compare(*(m(ids, attention_mask=mask) for m in (compiled, theirs, truth)), mask, HEADS["BertModel"])


@pytest.mark.parametrize(
    "call, message",
    [
        ({}, "exactly one of them, got neither"),
        ({"input_ids": torch.ones(2, 3, dtype=torch.long), "inputs_embeds": torch.ones(2, 3, 48)}, "got both"),
        ({"input_ids": torch.ones(3, dtype=torch.long)}, r"input_ids: wanted shape \(batch, length\)"),
        ({"input_ids": torch.full((1, 3), 99)}, r"input_ids: wanted values in \[0, 99\)"),
        ({"input_ids": torch.full((1, 3), -1)}, "input_ids: wanted values"),
        ({"input_ids": torch.ones(1, 33, dtype=torch.long)}, "max_position_embeddings = 32"),
        (
            {"input_ids": torch.ones(1, 3, dtype=torch.long), "position_ids": torch.tensor([[0, 1, 32]])},
            "position_ids: wanted values",
        ),
        (
            {"input_ids": torch.ones(1, 3, dtype=torch.long), "token_type_ids": torch.tensor([[0, 1, 2]])},
            "token_type_ids: wanted values",
        ),
        (
            {"input_ids": torch.ones(1, 3, dtype=torch.long), "attention_mask": torch.ones(1, 2)},
            r"attention_mask: wanted shape \(batch, length\) = \(1, 3\), got \(1, 2\)",
        ),
        (
            {"input_ids": torch.ones(1, 3, dtype=torch.long), "attention_mask": torch.ones(3)},
            "attention_mask: wanted 2, 3 or 4 dimensions",
        ),
    ],
)
def test_bad_input(call, message, bert_config):
    model = transformer_fast.BertModel(bert_config())
    with pytest.raises(ValueError, match=message):
        model(**call)


@pytest.mark.parametrize("name", ["BertForMaskedLM", "BertForTokenClassification", "BertForPreTraining"])
def test_labels_of_another_shape(name, bert_config):
    model = getattr(transformer_fast, name)(bert_config())
    with pytest.raises(ValueError, match=r"labels: wanted shape \(2, 5\), got \(2, 4\)"):
        model(torch.ones(2, 5, dtype=torch.long), labels=torch.ones(2, 4, dtype=torch.long))


def test_unknown_problem_type(bert_config):
    model = transformer_fast.BertForSequenceClassification(bert_config())
    model.config.problem_type = "ranking"
    with pytest.raises(ValueError, match="config.problem_type: wanted 'regression'.*got 'ranking'"):
        model(torch.ones(2, 5, dtype=torch.long), labels=torch.ones(2, dtype=torch.long))
