"""GPT's and GPT-2's outputs and gradients equal Hugging Face's, on every row of ragged batches."""

import copy

import pytest
import torch
import transformers
from encoder_cases import by_module, compare_with_checkpointing
from numerics import GRADIENT, OUTPUT, assert_as_accurate

import transformer_fast

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
CASES = [("none", F32), ("right", F32), ("left", F32), ("holes", F32), ("right", BF16), ("left", F16), ("holes", BF16)]
TRAINING_CASES = [("right", F32), ("left", BF16), ("holes", F16)]
pytestmark = pytest.mark.usefixtures("one_thread")
HEADS = {
    "GPT2Model": ("last_hidden_state",),
    "GPT2LMHeadModel": ("logits", "loss"),
    "GPT2ForSequenceClassification": ("logits", "loss"),
    "GPT2ForTokenClassification": ("logits", "loss"),
    "GPT2ForQuestionAnswering": ("start_logits", "end_logits", "loss"),
    "OpenAIGPTModel": ("last_hidden_state",),
    "OpenAIGPTLMHeadModel": ("logits", "loss"),
    "OpenAIGPTForSequenceClassification": ("logits", "loss"),
}
FAMILIES = {"gpt2": "GPT2LMHeadModel", "openai-gpt": "OpenAIGPTLMHeadModel"}
SWITCHES = {
    "scores not scaled": {"scale_attn_weights": False},
    "scaled by layer": {"scale_attn_by_inverse_layer_idx": True},
    "scaled by layer alone": {"scale_attn_weights": False, "scale_attn_by_inverse_layer_idx": True},
    "float32 scores": {"reorder_and_upcast_attn": True},
    "inner width": {"n_inner": 37},
    "odd heads": {"n_embd": 45, "n_head": 5},
    "relu": {"activation_function": "relu"},
    "no fused kernel": {"activation_function": "quick_gelu"},
    "untied": {"tie_word_embeddings": False},
    "eps": {"layer_norm_epsilon": 1e-2},
}


def config_for(name: str, **changes):
    values = {
        "vocab_size": 99, "n_positions": 32, "n_embd": 48, "n_layer": 2, "n_head": 3, "resid_pdrop": 0.0,
        "embd_pdrop": 0.0, "attn_pdrop": 0.0, "summary_first_dropout": 0.0, "classifier_dropout": 0.0,
        "initializer_range": 0.15, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "num_labels": 4,
    }  # fmt: skip
    if name.endswith("QuestionAnswering"):
        values["num_labels"] = 2
    kind = transformers.GPT2Config if name.startswith("GPT2") else transformers.OpenAIGPTConfig
    return kind(**(values | changes))


def inputs_for(kind: str, make_mask) -> tuple[torch.Tensor, torch.Tensor | None]:
    mask = make_mask(kind)
    ids = torch.randint(1, 99, (12, 13))
    return (ids if mask is None else ids * mask), mask


def labels_for(name: str, kind: str, mask: torch.Tensor | None, ids) -> dict:
    batch, length = ids.shape
    real = torch.ones(ids.shape, dtype=torch.bool) if mask is None else mask.bool()
    if name.endswith("SequenceClassification"):
        return {"labels": torch.randint(0, 4, (batch,))}
    if name.endswith("QuestionAnswering"):
        # Queries without a key: Hugging Face's attention implementations differ, and the loss includes them.
        if kind == "left":
            return {}
        return {"start_positions": torch.randint(0, 4, (batch,)), "end_positions": torch.randint(0, length, (batch,))}
    if name.endswith("Model") and "LMHead" not in name:
        return {}
    classes = 4 if name.endswith("TokenClassification") else 99
    labels = torch.randint(0, classes, ids.shape).masked_fill(~real | (torch.rand(ids.shape) < 0.3), -100)
    if classes == 99:
        labels[:, 1:].masked_fill_(~real[:, :-1], -100)  # the previous position is padding
    return {"labels": labels}


def real_rows(t: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    return t[mask.bool()] if mask is not None and t.dim() >= 2 and t.shape[:2] == mask.shape else t


def compare(ours, theirs, truth, mask, names):
    for name in names:
        if name not in theirs:
            continue
        parts = [real_rows(output[name], mask) for output in (ours, truth, theirs)]
        if name == "loss":  # the error of a single number is random: compare it together with the logits
            parts = [torch.cat((p.view(-1), real_rows(o[names[0]], mask).flatten()))
                     for p, o in zip(parts, (ours, truth, theirs))]  # fmt: skip
        assert_as_accurate(*parts, OUTPUT, name)


@pytest.mark.quick
@pytest.mark.parametrize("kind, dtype", CASES)
@pytest.mark.parametrize("name", HEADS)
def test_outputs(name, kind, dtype, pair, make_mask):
    models = pair(name, config_for(name), dtype)
    collected = [{} for _ in models]
    for _ in range(3):  # several batches, because one has few scores
        ids, mask = inputs_for(kind, make_mask)
        call = labels_for(name, kind, mask, ids) | {"token_type_ids": torch.randint(0, 99, ids.shape)}
        with torch.no_grad():
            outputs = [m(ids, attention_mask=mask, **call) for m in models]
        assert list(outputs[0].keys()) == list(outputs[1].keys())
        for found, output in zip(collected, outputs):
            for key in HEADS[name]:
                if key in output:
                    found.setdefault(key, []).append(real_rows(output[key], mask).flatten())
    compare(*({k: torch.cat(v) for k, v in found.items()} for found in collected), None, HEADS[name])


@pytest.mark.parametrize("kind, dtype", TRAINING_CASES)
@pytest.mark.parametrize("name", HEADS)
def test_gradients(name, kind, dtype, pair, make_mask):
    ids, mask = inputs_for(kind, make_mask)
    models = pair(name, config_for(name), dtype)
    call = labels_for(name, kind, mask, ids)
    weights = torch.randn(*ids.shape, 2, dtype=torch.float64)

    def gradients(model):
        model.train()  # dropout is 0 in the configuration
        output = model(ids, attention_mask=mask, **call)
        loss = output.get("loss")
        if loss is None:
            first = output[0] if output[0].dim() == 3 else torch.stack((output[0], output[1]), -1)
            loss = (first[..., :2] * weights.to(first.dtype))[mask.bool()].sum()
        loss.backward()
        return by_module(model)

    ours, theirs, truth = (gradients(m) for m in models)
    assert ours.keys() == theirs.keys()
    for parameter in theirs:
        assert_as_accurate(ours[parameter], truth[parameter], theirs[parameter], GRADIENT, parameter)


@pytest.mark.parametrize("switch", SWITCHES)
def test_switches_of_the_configuration(switch, pair, make_mask):
    """Every configuration switch, with the gradients that it changes."""
    models = pair("GPT2LMHeadModel", config_for("GPT2LMHeadModel", **SWITCHES[switch]))
    for layer in models[2].transformer.h:
        layer.attn.reorder_and_upcast_attn = False  # the reference must not compute in float32
    ids, mask = inputs_for("right", make_mask)
    labels = labels_for("GPT2LMHeadModel", "right", mask, ids)
    outputs = [m(ids, attention_mask=mask, **labels) for m in models]
    compare(*outputs, mask, ("logits", "loss"))
    for output in outputs:
        output.loss.backward()
    ours, theirs, truth = (by_module(m) for m in models)
    assert ours.keys() == theirs.keys() and ("lm_head" in ours) == (switch == "untied")
    for name in theirs:
        assert_as_accurate(ours[name], truth[name], theirs[name], GRADIENT, name)


@pytest.mark.parametrize("afn", ["relu", "silu", "swish", "gelu"])
def test_activations_of_gpt(afn, pair, make_mask):
    ids, mask = inputs_for("right", make_mask)
    models = pair("OpenAIGPTModel", config_for("OpenAIGPTModel", afn=afn))
    compare(*(m(ids, attention_mask=mask) for m in models), mask, ("last_hidden_state",))


@pytest.mark.parametrize("summary", ["cls_index", "last", "first", "mean"])
@pytest.mark.parametrize("name", ["GPT2DoubleHeadsModel", "OpenAIGPTDoubleHeadsModel"])
def test_double_heads(name, summary, pair, make_mask):
    models = pair(name, config_for(name, summary_type=summary, summary_activation="tanh"))
    outputs, gradients = [[] for _ in models], []
    for _ in range(3):
        ids, mask = inputs_for("right", make_mask)
        shape = (6, 2, 13)
        at = (mask.sum(1) - 1).view(6, 2)
        labels = labels_for("GPT2LMHeadModel", "right", mask, ids)["labels"]
        given = {"input_ids": ids.view(shape), "attention_mask": mask, "labels": labels.view(shape)}
        # With several choices, Hugging Face's other summary types take choices for positions.
        if summary == "cls_index":
            given |= {"mc_token_ids": at, "mc_labels": torch.randint(0, 2, (6,))}
        else:
            given |= {"input_ids": ids, "labels": labels, "mc_labels": torch.randint(0, 12, (1,))}
        for found, model in zip(outputs, models):
            found.append(model(**given))
    ours, theirs, truth = [o[-1] for o in outputs]
    assert list(ours.keys()) == list(theirs.keys())
    for key in ("mc_logits", "loss", "mc_loss"):
        assert ours[key].shape == theirs[key].shape
    real = mask.view(ours.logits.shape[:-1]).bool()
    assert_as_accurate(*(o.logits[real] for o in (ours, truth, theirs)))
    few = [torch.cat([o[k].flatten() for o in found for k in ("mc_logits", "loss", "mc_loss")]) for found in outputs]
    assert_as_accurate(few[0], few[2], few[1])
    for model, found in zip(models, outputs):
        sum(o.loss + o.mc_loss for o in found).backward()
        gradients.append(by_module(model))
    for part in gradients[1]:
        assert_as_accurate(*(gradients[i][part] for i in (0, 2, 1)), GRADIENT, part)


@pytest.mark.parametrize("name", ["GPT2LMHeadModel", "OpenAIGPTLMHeadModel"])
def test_choices_of_a_language_model(name):
    """ids (B, choices, S), as in HF's models; of these only GPT-2 takes a 3-D mask."""
    config = getattr(transformers, "GPT2Config" if "2" in name else "OpenAIGPTConfig")(
        vocab_size=90, n_embd=32, n_layer=2, n_head=2, n_positions=20, bos_token_id=1, eos_token_id=2,
        attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0,
    )  # fmt: skip
    theirs, ours = getattr(transformers, name)(config), getattr(transformer_fast, name)(config)
    ours.load_state_dict(theirs.state_dict())
    truth = copy.deepcopy(theirs).double()
    ids, labels = torch.randint(3, 90, (2, 3, 9)), torch.randint(3, 90, (2, 3, 9))
    labels[0, 1, 3:] = -100
    calls = [{"labels": labels}, {"token_type_ids": ids}]
    if name == "GPT2LMHeadModel":
        mask = torch.ones_like(ids)
        mask[1, :, 6:] = 0
        calls.append({"attention_mask": mask})
    for call in calls:
        found, exact, plain = (m(ids, **call) for m in (ours, truth, theirs))
        assert found.logits.shape == plain.logits.shape == (2, 3, 9, 90)
        kept = call.get("attention_mask", torch.ones_like(ids)) != 0
        assert_as_accurate(found.logits[kept], exact.logits[kept], plain.logits[kept])
        if "labels" in call:
            flat = ours(ids.view(6, 9), labels=labels.view(6, 9))
            assert torch.equal(found.loss, flat.loss) and torch.equal(found.logits.flatten(0, 1), flat.logits)


@pytest.mark.parametrize("kind", ["none", "right", "left", "holes"])
@pytest.mark.parametrize("name", ["GPT2Model", "OpenAIGPTModel", "GPT2ForTokenClassification"])
def test_hidden_states_and_attentions(name, kind, pair, make_mask):
    ids, mask = inputs_for(kind, make_mask)
    models = pair(name, config_for(name))
    outputs = [m(ids, attention_mask=mask, output_hidden_states=True, output_attentions=True) for m in models]
    ours, theirs, truth = outputs
    assert list(ours.keys()) == list(theirs.keys())
    assert len(ours.hidden_states) == 3 and len(ours.attentions) == 2
    for i in range(3):
        assert_as_accurate(*(real_rows(o.hidden_states[i], mask) for o in (ours, truth, theirs)))
    for i in range(2):
        parts = (real_rows(o.attentions[i].transpose(1, 2), mask) for o in (ours, truth, theirs))
        assert_as_accurate(*parts, name=f"attentions {i}")


@pytest.mark.quick
@pytest.mark.parametrize("name", ["GPT2Model", "OpenAIGPTModel"])
def test_padding_is_zeros(name, pair, make_mask):
    ids, mask = inputs_for("right", make_mask)
    output = pair(name, config_for(name))[0](ids, attention_mask=mask)[0]
    assert output[mask == 0].eq(0).all() and output[mask == 1].abs().sum(-1).gt(0).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_inputs_embeds_positions_and_tuples(family, pair, make_mask):
    name = FAMILIES[family]
    models = pair(name, config_for(name))
    ids, mask = inputs_for("left", make_mask)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    outputs = []
    for model in models:
        embedded = model.get_input_embeddings()(ids)
        outputs.append(model(inputs_embeds=embedded, attention_mask=mask, position_ids=positions))
    compare(*outputs, mask, ("logits",))
    output = models[0](ids, return_dict=False, use_cache=False)
    assert isinstance(output, tuple) and len(output) == 1
    assert isinstance(models[0], getattr(transformers, name))


def test_full_masks(pair):
    models = pair("GPT2Model", config_for("GPT2Model"))
    ids = torch.randint(1, 99, (12, 13))
    allowed = (torch.rand(12, 1, 13, 13) < 0.7) | torch.eye(13, dtype=torch.bool)
    plain = torch.zeros(12, 1, 13, 13).masked_fill(~allowed, torch.finfo(F32).min)
    for given in (allowed, plain):
        ours = models[0](ids, attention_mask=given)
        theirs, truth = (m(ids, attention_mask=plain.to(m.dtype)) for m in models[1:])
        compare(ours, theirs, truth, None, ("last_hidden_state",))


@pytest.mark.parametrize("kind", ["none", "right", "left"])
def test_cross_attention(kind, pair, make_mask):
    ids, mask = inputs_for(kind, make_mask)
    models = pair("GPT2LMHeadModel", config_for("GPT2LMHeadModel", add_cross_attention=True))
    states, seen = torch.randn(12, 7, 48), torch.ones(12, 7)
    seen[1, 3:] = 0
    labels = labels_for("GPT2LMHeadModel", kind, mask, ids)
    outputs = [
        m(ids, attention_mask=mask, encoder_hidden_states=states.to(m.dtype), encoder_attention_mask=seen,
          output_attentions=True, **labels)
        for m in models
    ]  # fmt: skip
    ours, theirs, truth = outputs
    assert list(ours.keys()) == list(theirs.keys())
    compare(*outputs, mask, ("logits", "loss"))
    for i in range(2):
        parts = (real_rows(o.cross_attentions[i].transpose(1, 2), mask) for o in (ours, truth, theirs))
        assert_as_accurate(*parts, name="cross attentions")
    for output in outputs:
        output.loss.backward()
    ours, theirs, truth = (by_module(m) for m in models)
    for name in theirs:
        assert_as_accurate(ours[name], truth[name], theirs[name], GRADIENT, name)


@pytest.mark.parametrize("keep", [1, 3, torch.tensor([0, 5]), torch.tensor([[2, 1]] * 12)], ids=str)
@pytest.mark.parametrize("kind", ["none", "left"])
def test_logits_to_keep(keep, kind, pair, make_mask):
    models = pair("GPT2LMHeadModel", config_for("GPT2LMHeadModel"))
    ids, mask = inputs_for(kind, make_mask)
    ours, theirs, truth = (m(ids, attention_mask=mask, logits_to_keep=keep).logits for m in models)
    if mask is None:
        real = torch.ones(ours.shape[:2], dtype=torch.bool)
    elif isinstance(keep, int):
        real = mask[:, -keep:].bool()
    else:
        real = mask.take_along_dim(keep.expand(12, -1), 1).bool()
    assert ours.shape == theirs.shape
    assert_as_accurate(*(t[real] for t in (ours, truth, theirs)))


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("kind", ["none", "left", "right"])
def test_a_cache_goes_on_where_it_ended(cache, kind, pair, make_mask):
    """Five columns, then five, then three: the logits of one call with all thirteen."""
    models = pair("GPT2LMHeadModel", config_for("GPT2LMHeadModel"))
    ids, mask = inputs_for(kind, make_mask)
    results = []
    for model in models:
        past = transformers.DynamicCache(config=model.config)
        if cache == "static":
            past = transformers.StaticCache(config=model.config, max_cache_len=16)
        parts = []
        for start, end in ((0, 5), (5, 10), (10, 13)):
            seen = None if mask is None else mask[:, :end]
            output = model(ids[:, start:end], attention_mask=seen, past_key_values=past, use_cache=True)
            parts.append(output.logits)
        assert output.past_key_values is past and int(past.get_seq_length()) == 13
        results.append(real_rows(torch.cat(parts, 1), mask))
    assert_as_accurate(results[0], results[2], results[1])


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant, pair, make_mask):
    ids, mask = inputs_for("right", make_mask)
    config = config_for("GPT2LMHeadModel", resid_pdrop=0.2, attn_pdrop=0.2)
    ours, _, truth = pair("GPT2LMHeadModel", config)
    double = transformer_fast.GPT2LMHeadModel(config).double()
    double.load_state_dict(truth.state_dict())
    labels = labels_for("GPT2LMHeadModel", "right", mask, ids)
    compare_with_checkpointing(ours, double, reentrant, {"input_ids": ids, "attention_mask": mask, **labels})


def test_loss_over_accumulated_batches(pair, make_mask):
    """Trainer's num_items_in_batch, and labels that are already shifted."""
    models = pair("GPT2LMHeadModel", config_for("GPT2LMHeadModel"))
    ids, mask = inputs_for("right", make_mask)
    labels = labels_for("GPT2LMHeadModel", "right", mask, ids)["labels"]
    shifted = torch.nn.functional.pad(labels, (0, 1), value=-100)[:, 1:].contiguous()
    for extra in ({"num_items_in_batch": 57}, {"num_items_in_batch": torch.tensor(57)}, {"shift_labels": shifted}):
        compare(*(m(ids, attention_mask=mask, labels=labels, **extra) for m in models), mask, ("logits", "loss"))


@pytest.mark.parametrize("problem", ["regression", "multi_label_classification", None])
def test_classification_problems(problem, pair, make_mask):
    ids, mask = inputs_for("left", make_mask)
    config = config_for("GPT2ForSequenceClassification", num_labels=3, problem_type=problem)
    models = pair("GPT2ForSequenceClassification", config)
    labels = torch.rand(12, 3)
    outputs = [m(ids, attention_mask=mask, labels=labels.to(m.dtype)) for m in models]
    compare(*outputs, None, ("logits", "loss"))
    assert models[0].config.problem_type == models[1].config.problem_type


def test_autocast_and_compile(pair, make_mask):
    ids, mask = inputs_for("right", make_mask)
    ours, theirs, truth = pair("GPT2LMHeadModel", config_for("GPT2LMHeadModel"))
    with torch.no_grad():
        wanted = truth(ids, attention_mask=mask).logits[mask.bool()]
        with torch.autocast("cpu", dtype=BF16):
            a, b = (m(ids, attention_mask=mask).logits for m in (ours, theirs))
        assert a.dtype == b.dtype
        assert_as_accurate(a[mask.bool()], wanted, b[mask.bool()])
        compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
        found = compiled(ids, use_cache=False).logits
        assert_as_accurate(found, truth(ids).logits, theirs(ids).logits)


def test_adapters_are_called(pair, make_mask):
    """A projection that is not a plain Conv1D is called as a module."""
    models = pair("GPT2LMHeadModel", config_for("GPT2LMHeadModel"))
    ids, mask = inputs_for("right", make_mask)

    class Adapter(torch.nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base = base

        def forward(self, x):
            return self.base(x) * 2

    for model in models:
        for layer in model.transformer.h:
            layer.attn.c_attn = Adapter(layer.attn.c_attn)
            layer.mlp.c_proj.register_forward_hook(lambda module, args, y: y + 0.5)
    compare(*(m(ids, attention_mask=mask) for m in models), mask, ("logits",))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "call, message",
    [
        ({}, "exactly one of them, got neither"),
        ({"input_ids": torch.full((1, 3), 99)}, r"input_ids: wanted values in \[0, 99\)"),
        ({"input_ids": torch.ones(1, 33, dtype=torch.long)}, "config.n_positions = 32"),
        (
            {"input_ids": torch.ones(1, 3, dtype=torch.long), "position_ids": torch.tensor([[0, 1, 32]])},
            "position_ids: wanted values",
        ),
        (
            {"input_ids": torch.ones(1, 3, dtype=torch.long), "attention_mask": torch.ones(1, 2)},
            r"attention_mask: wanted shape",
        ),
        (
            {"input_ids": torch.ones(2, 3, dtype=torch.long), "labels": torch.ones(2, 4, dtype=torch.long)},
            r"labels: wanted shape \(2, 3\), got \(2, 4\)",
        ),
    ],
)
def test_bad_input(call, message, family):
    model = getattr(transformer_fast, FAMILIES[family])(config_for(FAMILIES[family]))
    with pytest.raises(ValueError, match=message):
        model(**call)


def test_a_batch_without_padding_token_is_refused():
    config = config_for("GPT2ForSequenceClassification", pad_token_id=None)
    model = transformer_fast.GPT2ForSequenceClassification(config)
    assert model(torch.ones(1, 3, dtype=torch.long)).logits.shape == (1, 4)
    with pytest.raises(ValueError, match="if no padding token is defined"):
        model(torch.ones(2, 3, dtype=torch.long))
