"""Outputs and gradients of the encoder-decoders equal Hugging Face's, on every row of ragged batches."""

import pytest
import torch
import transformers
from numerics import GRADIENT, OUTPUT, assert_as_accurate, pooled
from seq2seq_cases import (
    BATCH,
    CASES,
    END,
    GENERATORS,
    HEADS,
    SOURCE,
    TARGET,
    VOCABULARY,
    WIDTH,
    collect,
    gradients_of,
    make_inputs,
    make_labels,
    make_models,
    ragged,
    real_parts,
    seq2seq_config,
)

import transformer_fast

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
BASES = [(family, "Model") for family in HEADS]


def compare(parts, names=None):
    ours, theirs, truth = parts
    for name in names or ours:
        assert_as_accurate(ours[name], truth[name], theirs[name], OUTPUT, name)


@pytest.mark.parametrize("kind, dtype", [("right", F32), ("left", BF16), ("holes", F16)])
@pytest.mark.parametrize("variant, head", CASES)
def test_outputs(variant, head, kind, dtype, pair):
    models = make_models(pair, variant, head, dtype)
    compare(collect(models, head, kind, kind))


@pytest.mark.quick
@pytest.mark.parametrize("variant, head", BASES)
@pytest.mark.parametrize("kind, decoder_kind", [("none", None), ("right", "left"), ("holes", "holes")])
@pytest.mark.parametrize("use_cache", [False, True])
def test_masks_of_both_sides(variant, head, kind, decoder_kind, use_cache, pair):
    models = make_models(pair, variant, head)
    compare(collect(models, head, kind, decoder_kind, batches=1, use_cache=use_cache))


@pytest.mark.parametrize("kind, dtype", [("right", F32), ("holes", BF16)])
@pytest.mark.parametrize("variant, head", CASES)
def test_gradients(variant, head, kind, dtype, pair):
    models = make_models(pair, variant, head, dtype)
    draws = []
    for _ in range(3 if dtype == F32 else 1):  # several batches, because a norm's gradient has few elements
        call = make_inputs(head, kind, kind)
        call |= make_labels(head, call)
        weights = torch.randn(BATCH, SOURCE, WIDTH, dtype=torch.float64)
        draws.append([gradients_of(m, head, call, weights) for m in models])
        assert draws[-1][0].keys() == draws[-1][1].keys()
    ours, theirs, truth = ({n: torch.stack([d[i][n] for d in draws]) for n in draws[0][1]} for i in range(3))
    assert_as_accurate(*(pooled(g, truth) for g in (ours, truth, theirs)), GRADIENT)
    if dtype == F32:
        for name in theirs:
            assert_as_accurate(ours[name], truth[name], theirs[name], GRADIENT, name)


@pytest.mark.parametrize("variant, head", [*GENERATORS, ("Bart", "Model"), ("MBart", "Model")])
def test_decoder_input_ids_that_the_model_makes(variant, head, pair):
    """Made from labels, or from the encoder's tokens."""
    models = make_models(pair, variant, head)
    call = {"input_ids": torch.randint(3, VOCABULARY, (BATCH, SOURCE))}
    if head != "Model":
        call["labels"] = torch.randint(3, VOCABULARY, (BATCH, TARGET)).masked_fill(
            torch.rand(BATCH, TARGET) < 0.3, -100
        )
        call["labels"][:, 0] = 7
        if hasattr(models[1], "prepare_decoder_input_ids_from_labels"):  # transformers' M2M100 does not have it
            made, wanted = (m.prepare_decoder_input_ids_from_labels(call["labels"]) for m in models[:2])
            assert torch.equal(made, wanted)
    compare([{"out": m(**call)["last_hidden_state" if head == "Model" else "logits"]} for m in models])


@pytest.mark.quick
@pytest.mark.parametrize("use_cache", [False, True])
@pytest.mark.parametrize("variant, head", [*BASES, ("T5 v1.1", "EncoderModel"), ("Bart", "ForCausalLM")])
def test_hidden_states_and_attentions(variant, head, use_cache, pair):
    models = make_models(pair, variant, head)
    call = make_inputs(head, "left", "right")
    if head != "EncoderModel":
        call["use_cache"] = use_cache
    outputs = [m(**call, output_hidden_states=True, output_attentions=True) for m in models]
    ours, theirs, truth = outputs
    assert list(ours.keys()) == list(theirs.keys())
    for name in ours:
        if not isinstance(ours[name], tuple):
            continue
        assert len(ours[name]) == len(theirs[name])
        decoder = "decoder_input_ids" in call and not name.startswith("encoder")
        mask = call["decoder_attention_mask" if decoder else "attention_mask"].bool()
        for parts in zip(ours[name], truth[name], theirs[name]):
            rows = [(t.transpose(1, 2) if "attentions" in name else t)[mask] for t in parts]
            assert_as_accurate(*rows, OUTPUT, name)
    compare([real_parts(o, call) for o in outputs])


@pytest.mark.parametrize("variant, head", BASES)
def test_gradients_through_attentions(variant, head, pair):
    models = make_models(pair, variant, head)
    call = make_inputs(head, "right", None)
    weights = torch.randn(BATCH, TARGET, TARGET, dtype=torch.float64)
    found = []
    for model in models:
        output = model(**call, use_cache=False, output_attentions=True)
        attentions = [a.sum(1) for a in output.decoder_attentions]
        sum((a * weights.to(a.dtype)).sum() for a in attentions).backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert_as_accurate(*(pooled(g, found[2]) for g in (found[0], found[2], found[1])), GRADIENT)


@pytest.mark.parametrize("variant, head", BASES)
def test_embeddings_encoder_outputs_and_tuples(variant, head, pair):
    models = make_models(pair, variant, head)
    call = make_inputs(head, "left", None)
    outputs = []
    for model in models:
        encoded = model.get_encoder()(call["input_ids"], attention_mask=call["attention_mask"])
        assert isinstance(model.get_encoder()(call["input_ids"], return_dict=False), tuple)
        embedded = model.get_decoder().get_input_embeddings()(call["decoder_input_ids"])
        arguments = {"attention_mask": call["attention_mask"], "decoder_inputs_embeds": embedded}
        a = model(encoder_outputs=encoded, **arguments)
        b = model(encoder_outputs=(encoded.last_hidden_state,), **arguments, return_dict=False)
        assert isinstance(b, tuple)
        embedded = model.get_encoder().get_input_embeddings()(call["input_ids"])
        c = model(inputs_embeds=embedded, **arguments)
        outputs.append({"a": a[0].flatten(), "b": b[0].flatten(), "c": c[0].flatten()})
    compare(outputs)
    assert isinstance(models[0], transformers.PreTrainedModel)


@pytest.mark.quick
@pytest.mark.parametrize("variant, head", BASES)
@pytest.mark.parametrize("shape", ["4-D bool", "4-D float per head"])
def test_full_masks(shape, variant, head, pair):
    models = (
        make_models(pair, variant, head, decoder_attention_heads=3)
        if "T5" not in variant
        else make_models(pair, variant, head)
    )
    call = make_inputs(head, "none", None)
    allowed = (torch.rand(BATCH, 1, TARGET, TARGET) < 0.7) | torch.eye(TARGET, dtype=torch.bool)
    low = torch.finfo(torch.float32).min
    plain = torch.randn(BATCH, 3, TARGET, TARGET) if "float" in shape else torch.zeros(BATCH, 1, TARGET, TARGET)
    plain = plain.masked_fill(~allowed, low)
    given = plain if "float" in shape else allowed
    for cache in (False, True):
        outputs = [
            m(
                **{**call, "decoder_attention_mask": mask.to(m.dtype) if mask.is_floating_point() else mask},
                use_cache=cache,
            )
            for m, mask in zip(models, (given, plain, plain))
        ]
        compare([{"out": o[0].flatten()} for o in outputs])


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize(
    "variant, head", [("T5 v1.1", "ForConditionalGeneration"), ("Bart", "ForConditionalGeneration")]
)
def test_gradient_checkpointing(variant, head, reentrant, pair):
    """The same gradients, also the encoder's through cross-attention; the recomputation draws the same dropout
    masks."""
    dropout = {"dropout_rate": 0.2} if variant != "Bart" else {"dropout": 0.2, "attention_dropout": 0.1}
    ours = make_models(pair, variant, head, **dropout)[0]
    double = type(ours)(ours.config).double()
    double.load_state_dict(ours.state_dict())
    call = make_inputs(head, "right", "right")
    call |= make_labels(head, call)
    found = []
    for model, checkpointing in ((double, False), (ours, False), (ours, True)):
        model.train().zero_grad()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        torch.manual_seed(1)
        model(**call).loss.backward()
        found.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert_as_accurate(found[2], found[0], found[1], GRADIENT)


@pytest.mark.parametrize("variant", ["Bart", "Marian", "MBart", "M2M100"])
def test_layers_are_dropped_as_hugging_face_drops_them(variant, pair):
    settings = {"encoder_layerdrop": 0.5, "decoder_layerdrop": 0.4, "encoder_layers": 4, "decoder_layers": 4}
    models = [m.train() for m in make_models(pair, variant, "Model", **settings)]
    call = make_inputs("Model", "none", None)
    lengths = set()
    for seed in range(4):
        outputs = []
        for model in models:
            torch.manual_seed(seed)
            outputs.append(model(**call, use_cache=False, output_hidden_states=True))
        # If all layers were dropped, Hugging Face returns no hidden states.
        kept = [len(o.encoder_hidden_states) for o in outputs]
        assert kept[0] == max(kept[1], 1)
        lengths.add(kept[0])
        compare([{"out": o[0].flatten()} for o in outputs])
    assert len(lengths) > 1


def test_dropout_is_in_force_in_training_alone():
    for variant, settings in (("Bart", {"dropout": 0.5}), ("T5", {"dropout_rate": 0.5})):
        name = "BartModel" if variant == "Bart" else "T5Model"
        model = getattr(transformer_fast, name)(seq2seq_config(variant, **settings))
        call = make_inputs("Model", "right", "right")
        model.train()
        assert not torch.equal(model(**call)[0], model(**call)[0])
        model.eval()
        assert torch.equal(model(**call)[0], model(**call)[0])


@pytest.mark.parametrize("variant, head", BASES)
def test_autocast_and_compile(variant, head, pair):
    ours, theirs, truth = make_models(pair, variant, head)
    call = make_inputs(head, "right", None)
    with torch.no_grad():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            a, b = (m(**call)[0] for m in (ours, theirs))
        assert a.dtype == b.dtype
        assert_as_accurate(a, truth(**call)[0], b)
        if variant in ("T5", "UMT5", "M2M100"):
            compiled = torch.compile(ours, backend="aot_eager")
            compare([{"out": m(**call, use_cache=False)[0]} for m in (compiled, theirs, truth)])


@pytest.mark.quick
@pytest.mark.parametrize(
    "changes, message",
    [
        ({"decoder_input_ids": None, "labels": None}, "decoder_input_ids, decoder_inputs_embeds: wanted exactly one"),
        ({"decoder_input_ids": torch.full((BATCH, 3), VOCABULARY)}, r"decoder_input_ids: wanted values in \[0, 99\)"),
        ({"input_ids": torch.full((BATCH, 3), -1), "attention_mask": None}, "input_ids: wanted values"),
        ({"decoder_input_ids": torch.ones(BATCH, 3)}, "decoder_input_ids: wanted an int32 or int64"),
        ({"attention_mask": torch.ones(BATCH, 3)}, r"attention_mask: wanted shape \(batch, length\)"),
        ({"labels": torch.ones(BATCH, 3, dtype=torch.long)}, r"labels: wanted shape \(12, 9\), got \(12, 3\)"),
    ],
)
@pytest.mark.parametrize("name", ["T5ForConditionalGeneration", "MarianMTModel"])
def test_bad_input(name, changes, message):
    model = getattr(transformer_fast, name)(seq2seq_config(name[:2] if name[0] == "T" else "Marian"))
    call = make_inputs("ForConditionalGeneration", "none", None)
    with pytest.raises((TypeError, ValueError), match=message):
        model(**(call | changes))


def test_bad_sequences():
    model = transformer_fast.BartForSequenceClassification(seq2seq_config("Bart"))
    call = make_inputs("ForSequenceClassification", "none", None)
    call["input_ids"][0, :2] = END
    with pytest.raises(ValueError, match=r"equally many end-of-sequence tokens .*got 1\.\.3"):
        model(**call)
    with pytest.raises(ValueError, match="33 positions exceed config.max_position_embeddings = 32"):
        model.model(torch.ones(1, 33, dtype=torch.long))
    with pytest.raises(NotImplementedError, match="inputs_embeds: .* looks for end tokens; wanted input_ids"):
        model(inputs_embeds=torch.randn(2, 5, model.config.d_model))


def test_an_empty_batch_and_an_empty_row(pair):
    for variant, head in BASES:
        ours = make_models(pair, variant, head)[0]
        ids, decoder = torch.ones(2, 5, dtype=torch.long), torch.ones(2, 3, dtype=torch.long)
        mask = torch.ones_like(ids)
        mask[1] = 0
        assert ours(ids, mask, decoder)[0].isfinite().all()
        assert ours(ids[:0], mask[:0], decoder[:0])[0].shape == (0, 3, WIDTH)


def test_masks_have_the_kinds_they_say():
    assert ragged("right", SOURCE)[:, 0].all() and ragged("left", SOURCE)[:, -1].all()
    assert not ragged("holes", SOURCE).bool().all() and ragged("none", SOURCE) is None
