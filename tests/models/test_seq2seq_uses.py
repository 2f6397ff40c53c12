"""Uses of encoder-decoders: translation, summarisation, training."""

import pytest
import torch
from numerics import assert_as_accurate
from seq2seq_cases import GENERATORS, PAD, VARIANTS, VOCABULARY, generate, make_inputs, make_models, seq2seq_config

import transformer_fast
from transformer_fast.models import _layer


@pytest.mark.quick
@pytest.mark.parametrize("kind", ["none", "left", "right"])
@pytest.mark.parametrize(
    "options",
    [{}, {"use_cache": False}, {"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2, "length_penalty": 0.3},
     {"cache_implementation": "static"}],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("variant, head", GENERATORS)
def test_generate(variant, head, options, kind, pair):
    ours, theirs, _ = make_models(pair, variant, head)
    theirs.set_attn_implementation("sdpa")
    a, b = (generate(m, kind, **options) for m in (ours, theirs))
    assert torch.equal(a, b) and a.shape[1] > 2


@pytest.mark.parametrize("variant, head", GENERATORS)
def test_generate_goes_on_from_given_tokens(variant, head, pair):
    """decoder_input_ids with padding on the left, and repeated calls with the cache of the previous one."""
    ours, theirs, truth = make_models(pair, variant, head)
    start = torch.randint(3, VOCABULARY, (4, 3))
    mask = torch.ones_like(start)
    mask[1, :2] = 0
    options = {"decoder_input_ids": start, "decoder_attention_mask": mask}
    assert torch.equal(*(generate(m, **options) for m in (ours, theirs)))
    call = {k: v[:4] for k, v in make_inputs(head, "right").items() if isinstance(v, torch.Tensor)}
    outputs = []
    for model in (ours, theirs, truth):
        first = model(**call)
        more = call | {"decoder_input_ids": start, "past_key_values": first.past_key_values}
        outputs.append(model(**more).logits)
    assert_as_accurate(outputs[0], outputs[2], outputs[1])


@pytest.mark.parametrize("variant", ["Bart", "Marian", "MBart", "Pegasus"])
def test_the_decoder_alone(variant, pair):
    """As a language model, and with encoder states from another model."""
    ours, theirs, truth = make_models(pair, variant, "ForCausalLM")
    ids = torch.randint(3, VOCABULARY, (4, 6))
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    for options in ({}, {"num_beams": 2}):
        a, b = (
            m.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False, **options) for m in (ours, theirs)
        )
        assert torch.equal(a, b)
    states, seen = torch.randn(4, 5, 48), torch.ones(4, 5)
    seen[2, 3:] = 0
    outputs = [
        m(
            ids,
            attention_mask=mask,
            encoder_hidden_states=states.to(m.dtype),
            encoder_attention_mask=seen,
            use_cache=False,
        )
        for m in (ours, truth, theirs)
    ]
    assert_as_accurate(*(o.logits[mask.bool()] for o in outputs))
    kept = ours(ids, attention_mask=mask, logits_to_keep=2).logits
    assert torch.equal(kept, ours(ids, attention_mask=mask).logits[:, -2:])


def test_trainer(pair, tmp_path):
    """Three steps of HF's Seq2SeqTrainer have the same result as with HF's model."""
    from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments

    ours, theirs, _ = make_models(pair, "T5", "ForConditionalGeneration")
    data = []
    for length in (5, 12, 3, 9, 7, 12):
        ids = torch.full((12,), PAD)
        ids[:length] = torch.randint(3, VOCABULARY, (length,))
        labels = ids.roll(2)[:7].clone()
        labels[-(length % 4) :] = -100
        data.append({"input_ids": ids, "attention_mask": (ids != PAD).long(), "labels": labels, "unused": "text"})
    losses = []
    for name, model in (("ours", ours), ("theirs", theirs)):
        arguments = Seq2SeqTrainingArguments(
            str(tmp_path / name), max_steps=3, per_device_train_batch_size=2, learning_rate=1e-3, report_to=[],
            save_strategy="no", logging_steps=1, seed=3, use_cpu=True, disable_tqdm=True,
        )  # fmt: skip
        trainer = Seq2SeqTrainer(model, arguments, train_dataset=data)
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert len(losses[0]) == 3 and losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_relative_bias_is_never_a_matrix():
    """T5's memory grows linearly with the sequence length: no call makes scores (S, S)."""
    model = transformer_fast.T5EncoderModel(seq2seq_config("T5")).eval()
    length = 600
    ids = torch.randint(3, VOCABULARY, (1, length))
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            for t in torch.utils._pytree.tree_leaves(out):
                if isinstance(t, torch.Tensor):
                    largest = max(largest, t.numel())
            return out

    with torch.no_grad(), Watch():
        model(ids)
    assert length * 48 <= largest < length * length


def test_layers_see_unpadded_rows(monkeypatch):
    """Padding is dropped in the encoder and in the decoder."""
    model = transformer_fast.BartModel(seq2seq_config("Bart")).eval()
    shapes, run = [], _layer.Layer._fused

    def watched(layer, *args, **kwargs):
        out = run(layer, *args, **kwargs)
        shapes.append(tuple(out.shape))
        return out

    monkeypatch.setattr(_layer.Layer, "_fused", watched)
    call = make_inputs("Model", "right", "left")
    output = model(**call, use_cache=False)
    totals = [int(call[name].sum()) for name in ("attention_mask", "decoder_attention_mask")]
    assert shapes == [(totals[0], 48)] * 2 + [(totals[1], 48)] * 2
    assert output.last_hidden_state[call["decoder_attention_mask"] == 0].eq(0).all()


@pytest.mark.parametrize("variant, head", GENERATORS)
def test_export(variant, head, pair):
    """torch.export with dynamic batch size and lengths; run with other sizes than in the export."""
    model, plain, truth = make_models(pair, variant, head)
    size = {name: torch.export.Dim(name, min=2, max=32) for name in ("batch", "source", "target")}
    source, target = {0: size["batch"], 1: size["source"]}, {0: size["batch"], 1: size["target"]}
    shapes = {"input_ids": source, "attention_mask": source, "decoder_input_ids": target, "use_cache": None}

    def inputs(batch: int, length: int, steps: int) -> dict:
        mask = torch.ones(batch, length, dtype=torch.int64)
        mask[1, length // 2 :] = 0
        ids = torch.randint(3, VOCABULARY, (batch, length))
        return {"input_ids": ids, "attention_mask": mask, "use_cache": False,
                "decoder_input_ids": torch.randint(3, VOCABULARY, (batch, steps))}  # fmt: skip

    with torch.no_grad():
        exported = torch.export.export(model, (), inputs(3, 9, 6), dynamic_shapes=shapes).module()
        call = inputs(5, 13, 4)
        assert_as_accurate(*(m(**call).logits for m in (exported, truth, plain)))


@pytest.mark.parametrize("variant, head", GENERATORS)
def test_on_the_meta_device(variant, head):
    """Shapes without weights, as tools that place models on devices ask for them."""
    config = seq2seq_config(variant)
    with torch.device("meta"):
        model = getattr(transformer_fast, VARIANTS[variant][0] + head)(config)
        ids = torch.ones(2, 5, dtype=torch.long)
    out = model(input_ids=ids, labels=ids)
    assert out.logits.shape == (2, 5, config.vocab_size) and out.loss.is_meta
