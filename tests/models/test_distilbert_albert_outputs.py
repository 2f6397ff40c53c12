"""Outputs and gradients of the encoders other than BERT equal Hugging Face's, on every row of ragged batches."""

import hf_models  # noqa: F401  registers float64_reference
import pytest
import torch
import transformers
from encoder_cases import (
    BATCH,
    VOCABULARY,
    WIDTH,
    compare,
    compare_gradients_over_batches,
    compare_over_batches,
    compare_with_checkpointing,
    config_for,
    encoder_config,
    labels_for,
    outputs_of,
    real_rows,
)
from numerics import assert_as_accurate

import transformer_fast

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
CASES = [("none", F32), ("left", F32), ("holes", F32), ("right", BF16), ("left", F16)]
SHARED = ["Model", "ForMaskedLM", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering"]
FAMILIES = ["DistilBert", "Albert", "ModernBert", "DebertaV2", "Roberta", "Electra", "MPNet"]
# Of families like BERT, only some heads that share BERT's code; tests/compat runs every class.
NAMES = [*(f"{family}{head}" for family in FAMILIES[:4] for head in SHARED), "AlbertForPreTraining",
         *(f"{family}{head}" for family in FAMILIES[4:] for head in SHARED[:3]), "ElectraForPreTraining",
         "XLMRobertaForTokenClassification", "CamembertForQuestionAnswering"]  # fmt: skip
BASE = {family: f"{family}Model" for family in FAMILIES}


@pytest.mark.parametrize("kind, dtype", CASES)
@pytest.mark.parametrize("name", NAMES)
def test_outputs(name, kind, dtype, pair, make_mask):
    compare_over_batches(pair(name, config_for(name), dtype), name, make_mask, kind)


@pytest.mark.parametrize("kind, dtype", [("right", F32), ("left", BF16)])
@pytest.mark.parametrize("name", NAMES)
def test_gradients(name, kind, dtype, pair, make_mask):
    compare_gradients_over_batches(pair(name, config_for(name), dtype), name, make_mask, kind)


@pytest.mark.parametrize("kind", ["none", "left"])
@pytest.mark.parametrize("family", FAMILIES)
def test_multiple_choice(family, kind, pair, make_mask):
    mask = make_mask(kind)
    mask = None if mask is None else mask.view(6, 2, -1)
    models = pair(f"{family}ForMultipleChoice", encoder_config(family))
    labels = torch.randint(0, 2, (6,))
    outputs = [[] for _ in models]
    for _ in range(16):  # several batches, because one has few scores
        ids = torch.randint(1, VOCABULARY, (6, 2, 13))
        for found, model in zip(outputs, models):
            found.append(model(ids, attention_mask=mask, labels=labels))
    merged = [{k: torch.cat([o[k].reshape(-1) for o in found]) for k in ("logits", "loss")} for found in outputs]
    assert outputs[0][0].logits.shape == (6, 2)
    compare(*merged, None, ("logits", "loss"))


SWITCHES = [
    ("DistilBert", {"sinusoidal_pos_embds": True}),
    ("DistilBert", {"n_heads": 6, "n_layers": 3}),
    ("DistilBert", {"dim": 30, "hidden_dim": 50}),
    ("DistilBert", {"activation": "relu"}),
    ("DistilBert", {"activation": "tanh"}),
    ("DistilBert", {"tie_word_embeddings": False}),
    ("Albert", {"num_hidden_groups": 3}),
    ("Albert", {"num_hidden_layers": 4, "num_hidden_groups": 2, "inner_group_num": 2}),
    ("Albert", {"num_hidden_layers": 5, "num_hidden_groups": 2}),
    ("Albert", {"hidden_size": 30, "embedding_size": 7, "intermediate_size": 50}),
    ("Albert", {"num_attention_heads": 6, "layer_norm_eps": 1e-3}),
    ("Albert", {"hidden_act": "gelu"}),
    ("Albert", {"hidden_act": "quick_gelu"}),
    ("Albert", {"type_vocab_size": 5}),
    ("Albert", {"tie_word_embeddings": False}),
    ("Roberta", {"hidden_act": "relu", "pad_token_id": 0}),
    ("Roberta", {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-3}),
    ("Roberta", {"type_vocab_size": 1, "num_attention_heads": 6, "tie_word_embeddings": False}),
    ("Electra", {"embedding_size": WIDTH}),
    ("Electra", {"hidden_act": "relu", "hidden_size": 30}),
    ("MPNet", {"hidden_act": "quick_gelu", "relative_attention_num_buckets": 40}),
    ("MPNet", {"num_attention_heads": 6, "tie_word_embeddings": False}),
    ("DebertaV2", {"share_att_key": False}),
    ("DebertaV2", {"pos_att_type": ["c2p"], "num_attention_heads": 6, "norm_rel_ebd": "none"}),
    ("DebertaV2", {"pos_att_type": "p2c", "share_att_key": False, "num_attention_heads": 6}),
    ("DebertaV2", {"pos_att_type": [], "num_attention_heads": 3}),
    ("DebertaV2", {"relative_attention": False}),
    ("DebertaV2", {"position_buckets": -1, "max_relative_positions": 5}),
    ("DebertaV2", {"position_buckets": 40, "max_relative_positions": 80}),
    ("DebertaV2", {"position_biased_input": False, "type_vocab_size": 0, "hidden_act": "quick_gelu"}),
    ("DebertaV2", {"conv_kernel_size": 3, "conv_act": "gelu"}),
    ("DebertaV2", {"conv_kernel_size": 5, "conv_groups": 2, "embedding_size": 24}),
    ("DebertaV2", {"legacy": False}),
    ("ModernBert", {"global_attn_every_n_layers": 1}),
    ("ModernBert", {"layer_types": ["sliding_attention", "sliding_attention", "full_attention"]}),
    ("ModernBert", {"local_attention": 2, "hidden_size": 30, "intermediate_size": 25}),
    ("ModernBert", {"local_attention": 64}),
    ("ModernBert", {"norm_bias": True, "attention_bias": True, "mlp_bias": True, "classifier_bias": True}),
    ("ModernBert", {"decoder_bias": False, "tie_word_embeddings": False, "norm_eps": 1e-3}),
    ("ModernBert", {"hidden_activation": "quick_gelu", "classifier_activation": "tanh"}),
    ("ModernBert", {"hidden_activation": "silu", "classifier_activation": "relu"}),
    ("ModernBert", {"rope_scaling": {"rope_type": "linear", "factor": 3.0}}),
    ("ModernBert", {"rope_parameters": {
        "full_attention": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 90.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 20.0},
    }, "max_position_embeddings": 8}),
]  # fmt: skip


@pytest.mark.quick
@pytest.mark.parametrize("family, changes", SWITCHES, ids=str)
def test_configuration_switches(family, changes, pair, make_mask, ids):
    mask = make_mask("right")
    models = pair(f"{family}ForMaskedLM", encoder_config(family, **changes))
    labels = labels_for(f"{family}ForMaskedLM", mask, ids.shape)
    outputs = [m(ids, attention_mask=mask, output_hidden_states=True, **labels) for m in models]
    compare(*outputs, mask, ("logits", "loss"))
    ours, theirs, _ = outputs
    assert len(ours.hidden_states) == len(theirs.hidden_states)
    compare(*({"states": torch.stack(o.hidden_states, 2)} for o in outputs), mask, ("states",))


@pytest.mark.parametrize("problem", ["regression", "multi_label_classification", None])
@pytest.mark.parametrize("family", FAMILIES)
def test_classification_problems(family, problem, pair, make_mask):
    mask = make_mask("right")
    models = pair(f"{family}ForSequenceClassification", encoder_config(family, num_labels=3, problem_type=problem))
    outputs = [[] for _ in models]
    for _ in range(8):
        ids, labels = torch.randint(1, VOCABULARY, (BATCH, 13)), torch.rand(BATCH, 3)
        for found, model in zip(outputs, models):
            found.append(model(ids, attention_mask=mask, labels=labels.to(model.dtype)))
    merged = [{k: torch.cat([o[k].reshape(-1) for o in found]) for k in ("logits", "loss")} for found in outputs]
    compare(*merged, None, ("logits", "loss"))
    assert models[0].config.problem_type == models[1].config.problem_type


@pytest.mark.quick
@pytest.mark.parametrize("kind", ["none", "left", "holes"])
@pytest.mark.parametrize("name", ["DistilBertModel", "AlbertModel", "DistilBertForSequenceClassification",
                                  "ModernBertModel", "ModernBertForSequenceClassification", "RobertaModel",
                                  "ElectraModel", "MPNetModel", "MPNetForSequenceClassification",
                                  "DebertaV2Model", "DebertaV2ForSequenceClassification"])  # fmt: skip
def test_hidden_states_and_attentions(name, kind, pair, make_mask, ids):
    mask = make_mask(kind)
    models = pair(name, config_for(name))
    if name.startswith("ModernBert"):  # its eager softmax is in float32, also in float64 models
        models[1].set_attn_implementation("eager")
        models[2].set_attn_implementation("float64_reference")
    outputs = [m(ids, attention_mask=mask, output_hidden_states=True, output_attentions=True) for m in models]
    ours, theirs, truth = outputs
    assert list(ours.keys()) == list(theirs.keys())
    assert len(ours.hidden_states) == len(theirs.hidden_states) and len(ours.attentions) == len(theirs.attentions)
    for a, b, c in zip(ours.hidden_states, truth.hidden_states, theirs.hidden_states):
        assert_as_accurate(*(real_rows(t, mask) for t in (a, b, c)), name="hidden state")
    for a, b, c in zip(ours.attentions, truth.attentions, theirs.attentions):
        assert_as_accurate(*(real_rows(t.transpose(1, 2), mask) for t in (a, b, c)), name="attentions")
    if name.endswith("Model"):
        assert ours.hidden_states[-1] is ours.last_hidden_state


@pytest.mark.quick
@pytest.mark.parametrize("family", FAMILIES)
def test_padding_gives_zeros_and_is_never_picked(family, pair, make_mask, ids):
    mask = make_mask("right")
    padding = ~mask.bool()
    logits = pair(f"{family}ForMaskedLM", encoder_config(family))[0](ids, attention_mask=mask).logits
    assert logits[padding].eq(0).all() and logits[~padding].abs().sum(-1).gt(0).all()
    answer = pair(f"{family}ForQuestionAnswering", encoder_config(family, num_labels=2))[0](ids, attention_mask=mask)
    assert mask[torch.arange(BATCH), answer.start_logits.argmax(1)].all()


@pytest.mark.quick
@pytest.mark.parametrize("family", FAMILIES)
def test_inputs_embeds_positions_and_tuples(family, pair, make_mask, ids):
    mask = make_mask("left")
    models = pair(BASE[family], encoder_config(family))
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    outputs = []
    for model in models:
        embedded = model.get_input_embeddings()(ids)
        outputs.append(model(inputs_embeds=embedded, attention_mask=mask, position_ids=positions))
    compare(*outputs, mask, outputs_of(BASE[family]))
    output = models[0](ids, return_dict=False)
    assert isinstance(output, tuple) and len(output) == len(outputs_of(BASE[family]))
    assert isinstance(models[0], getattr(transformers, BASE[family]))
    pooled = transformer_fast.AlbertModel(encoder_config("Albert"), add_pooling_layer=False)
    assert list(pooled(ids).keys()) == ["last_hidden_state"]


@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "DebertaV2"])  # HF's embeddings have no inputs_embeds
def test_full_masks(family, pair, ids):
    models = pair(BASE[family], encoder_config(family))
    allowed = (torch.rand(BATCH, 1, 13, 13) < 0.7) | torch.eye(13, dtype=torch.bool)
    plain = torch.zeros(BATCH, 1, 13, 13).masked_fill(~allowed, torch.finfo(torch.float32).min)
    ours = models[0](ids, attention_mask=allowed)
    theirs, truth = (m(ids, attention_mask=plain.to(m.dtype)) for m in models[1:])
    compare(ours, theirs, truth, None, outputs_of(BASE[family]))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_checkpointing(family, reentrant, pair, make_mask, ids):
    """The same loss and gradients, dropout included: the recomputation draws the same masks."""
    mask = make_mask("right")
    rates = {"dropout": 0.2, "attention_dropout": 0.2}
    if family != "DistilBert":
        rates = {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.2}
    if family == "ModernBert":
        rates = {"embedding_dropout": 0.2, "attention_dropout": 0.2, "mlp_dropout": 0.2}
    config = encoder_config(family, **rates)
    name = f"{family}ForMaskedLM"
    ours, _, truth = pair(name, config)
    double = getattr(transformer_fast, name)(config).double()
    double.load_state_dict(truth.state_dict())
    labels = labels_for(name, mask, ids.shape)
    compare_with_checkpointing(ours, double, reentrant, {"input_ids": ids, "attention_mask": mask, **labels})


@pytest.mark.parametrize("fullgraph", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_compile(family, fullgraph, pair, make_mask, ids):
    ours, theirs, truth = pair(BASE[family], encoder_config(family))
    mask = None if fullgraph else make_mask("right")
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=fullgraph)
    with torch.no_grad():
        compare(*(m(ids, attention_mask=mask) for m in (compiled, theirs, truth)), mask, outputs_of(BASE[family]))


@pytest.mark.parametrize("family", FAMILIES)
def test_autocast(family, pair, make_mask, ids):
    mask = make_mask("right")
    ours, theirs, truth = pair(BASE[family], encoder_config(family))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        a, b = (real_rows(m(ids, attention_mask=mask).last_hidden_state, mask) for m in (ours, theirs))
    assert a.dtype == b.dtype
    assert_as_accurate(a, real_rows(truth(ids, attention_mask=mask).last_hidden_state, mask), b)


@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_and_hooks_are_called(family, pair, make_mask, ids):
    """A projection that is not a plain Linear is called as a module; a hook on a layer fires in every call."""
    mask = make_mask("right")
    models = pair(BASE[family], encoder_config(family))
    seen = []
    for model in models:
        if family == "Albert":
            layer = model.encoder.albert_layer_groups[0].albert_layers[0]
            query, norm = layer.attention.query, layer.full_layer_layer_norm
        elif family == "ModernBert":
            layer = model.layers[0]
            query, norm = layer.attn.Wqkv, layer.mlp_norm
        elif family == "DistilBert":
            layer = model.transformer.layer[0]
            query, norm = layer.attention.q_lin, layer.output_layer_norm
        else:
            layer = model.encoder.layer[0]
            names = {"MPNet": "attention.attn.q", "DebertaV2": "attention.self.query_proj"}
            query = layer.get_submodule(names.get(family, "attention.self.query"))
            norm = layer.output.LayerNorm
        query.register_forward_hook(lambda module, args, y: 2 * y)
        norm.register_forward_hook(lambda module, args, y: y + 0.5)
        layer.register_forward_hook(lambda *a: seen.append(1))
    compare(*(m(ids, attention_mask=mask) for m in models), mask, outputs_of(BASE[family]))
    assert len(seen) == 3 * (3 if family == "Albert" else 1)


@pytest.mark.parametrize(
    "family, call, message",
    [
        ("DistilBert", {}, "exactly one of them, got neither"),
        ("Albert", {"inputs_embeds": torch.ones(2, 3, WIDTH)}, r"inputs_embeds: wanted \(batch, length, 24\)"),
        ("DistilBert", {"input_ids": torch.full((1, 3), 99)}, r"input_ids: wanted values in \[0, 99\)"),
        ("Albert", {"input_ids": torch.ones(1, 33, dtype=torch.long)}, "max_position_embeddings = 32"),
        (
            "DebertaV2",
            {"input_ids": torch.ones(2, 3, dtype=torch.long), "attention_mask": torch.ones(2, 1, 3, 3)},
            r"attention_mask: wanted shape \(2, 3\), got \(2, 1, 3, 3\)",
        ),
        ("ModernBert", {"inputs_embeds": torch.ones(2, 3, 7)}, rf"inputs_embeds: wanted \(batch, length, {WIDTH}\)"),
        ("ModernBert", {"input_ids": torch.full((1, 3), 99)}, r"input_ids: wanted values in \[0, 99\)"),
        (
            "ModernBert",
            {"input_ids": torch.ones(2, 3, dtype=torch.long), "position_ids": torch.ones(2, 4, dtype=torch.long)},
            r"position_ids: wanted shape \(2, 3\)",
        ),
        (
            "Albert",
            {"input_ids": torch.ones(1, 3, dtype=torch.long), "token_type_ids": torch.tensor([[0, 1, 2]])},
            "token_type_ids: wanted values",
        ),
        ("Roberta", {"input_ids": torch.full((1, 31), 5)}, r"positions of input_ids: .*\[0, 32\).*truncate.*got 2..32"),
        ("MPNet", {"inputs_embeds": torch.ones(1, 31, WIDTH)}, r"positions of inputs_embeds: .*got 2..32"),
        ("Electra", {"inputs_embeds": torch.ones(2, 3, WIDTH)}, r"inputs_embeds: wanted \(batch, length, 24\)"),
    ],
)
def test_bad_input(family, call, message):
    model = getattr(transformer_fast, BASE[family])(encoder_config(family))
    with pytest.raises(ValueError, match=message):
        model(**call)


@pytest.mark.quick
@pytest.mark.parametrize("kind", ["first", "last", "mean", "cls_index"])
def test_kinds_of_summary(kind, pair, make_mask):
    """ELECTRA's multiple choice reads the first positions, the last ones or all, including padding."""
    mask = make_mask("right").view(6, 2, -1)
    models = pair("ElectraForMultipleChoice", encoder_config("Electra", summary_type=kind))
    found = [[] for _ in models]
    for _ in range(8):
        choices = torch.randint(1, VOCABULARY, (6, 2, 13))
        for logits, model in zip(found, models):
            logits.append(model(choices, attention_mask=mask).logits.flatten())
    ours, theirs, truth = (torch.cat(f) for f in found)
    assert_as_accurate(ours, truth, theirs)


@pytest.mark.quick
@pytest.mark.parametrize("family", ["Roberta", "Electra", "MPNet"])
def test_padding_among_the_tokens(family, pair, ids):
    """Without a mask padding tokens are ordinary tokens, but the positions of RoBERTa and MPNet do not count them."""
    ids[:, 3:5], ids[::2, :2] = 1, 1
    models = pair(BASE[family], encoder_config(family, pad_token_id=1))
    compare(*(m(ids) for m in models), None, outputs_of(BASE[family]))


@pytest.mark.quick
def test_a_tuple_without_a_pooler(ids):
    """HF's MPNet has None in the place of the pooler's output."""
    models = [package.MPNetModel(encoder_config("MPNet"), False) for package in (transformer_fast, transformers)]
    for options in ({}, {"output_hidden_states": True}):
        seen, wanted = (m(ids, return_dict=False, **options) for m in models)
        assert [type(x) for x in seen] == [type(x) for x in wanted] and seen[1] is None


@pytest.mark.quick
def test_fewer_buckets_than_distances_are_counted_in(ids):
    model = transformer_fast.MPNetModel(encoder_config("MPNet", relative_attention_num_buckets=24))
    with pytest.raises(ValueError, match="relative_attention_num_buckets: wanted at least 32.*got 24"):
        model(ids)
