"""The 2017 Transformer: compared with torch.nn.Transformer; checkpoints, generation, training."""

import copy

import pytest
import torch
import transformers as hf
from numerics import GRADIENT, OUTPUT, assert_as_accurate, pooled

import transformer_fast as tf
from transformer_fast.backends import native
from transformer_fast.generation.native_step import NativeStepper
from transformer_fast.layers import sinusoids

LENGTHS = (9, 4, 1, 7)
SMALL = {
    "vocab_size": 43, "d_model": 32, "encoder_layers": 2, "decoder_layers": 3, "num_attention_heads": 4, "ffn_dim": 48,
}  # fmt: skip


def build(**settings):
    """A model with weights large enough for attention to matter."""
    torch.manual_seed(1)
    model = tf.TransformerForConditionalGeneration(tf.TransformerConfig(**{**SMALL, **settings})).eval()
    g = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=g) * (0.2 if p.dim() > 1 else 0.1))
    return model


def batch(padding="right", lengths=LENGTHS, targets=6, seed=3):
    g = torch.Generator().manual_seed(seed)
    longest = max(lengths)
    ids = torch.randint(3, 43, (len(lengths), longest), generator=g)
    position, length = torch.arange(longest), torch.tensor(lengths)[:, None]
    mask = (position < length) if padding == "right" else (position >= longest - length)
    labels = torch.randint(3, 37, (len(lengths), targets), generator=g)
    labels[1, -2:] = -100
    return {"input_ids": ids * mask, "attention_mask": mask.long(), "labels": labels}


def torch_logits(model, module, inputs):
    """Logits from torch.nn.Transformer, with the model's embeddings and masks."""
    config, base = model.config, model.model
    source, mask = inputs["input_ids"], inputs["attention_mask"].bool()
    target = model.prepare_decoder_input_ids_from_labels(inputs["labels"])
    dtype = model.lm_head.weight.dtype
    positions = (mask.long().cumsum(1) - 1).clamp(min=0)
    x, y = (
        embedding(ids) * config.d_model**0.5 + sinusoids(p, config.d_model, dtype)
        for embedding, ids, p in (
            (base.encoder.embed_tokens, source, positions),
            (base.decoder.embed_tokens, target, torch.arange(target.shape[1]).expand_as(target)),
        )
    )
    causal = torch.ones(y.shape[1], y.shape[1], dtype=torch.bool).triu(1)
    out = module(x, y, tgt_mask=causal, src_key_padding_mask=~mask, memory_key_padding_mask=~mask)
    return model.lm_head(out)


def gradients(loss, model, module=None):
    """Gradients of our parameters by name. Those of `module` are renamed by loading them into a copy of the model."""
    if module is None:
        names, parameters = zip(*model.named_parameters())
        return dict(zip(names, torch.autograd.grad(loss, parameters)))
    loss.backward()
    holder = copy.deepcopy(model)
    for p in module.parameters():
        p.data = p.grad
    holder.model.load_torch(module)
    outside = {n: p.grad for n, p in model.named_parameters() if "embed_tokens" in n or "lm_head" in n}
    return {n: outside.get(n, p.data) for n, p in holder.named_parameters()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("norm_position", ["post", "pre"])
@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("share", [True, False])
def test_is_torchs_transformer(norm_position, padding, share, dtype):
    """Outputs and gradients of every weight, over four ragged batches: in one alone, a few signs before relu decide."""
    settings = {} if share else {"vocab_size": 37, "encoder_vocab_size": 43}
    model = build(norm_position=norm_position, final_norm=True, **settings).to(dtype)
    g, logits, grads = torch.Generator().manual_seed(5), {}, {}
    for seed in range(3, 7):
        inputs, found = batch(padding, seed=seed), {}
        cotangent = torch.randn(*inputs["labels"].shape, model.config.vocab_size, generator=g)
        for name, m in (("ours", model), ("plain", copy.deepcopy(model)), ("truth", copy.deepcopy(model).double())):
            module = None if name == "ours" else m.model.to_torch()
            y = m(**inputs).logits if module is None else torch_logits(m, module, inputs)
            logits.setdefault(name, []).append(y.detach())
            found[name] = gradients((y * cotangent.to(y)).sum(), m, module)
        for name in found:
            grads.setdefault(name, []).append(pooled(found[name], found["truth"]))
    for kind, results, factor in (("logits", logits, OUTPUT), ("gradients", grads, GRADIENT)):
        ours, truth, plain = (torch.cat(results[name]) for name in ("ours", "truth", "plain"))
        assert_as_accurate(ours, truth, plain, factor, kind)


@pytest.mark.quick
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_weights_to_and_from_torch(norm_first, activation):
    torch.manual_seed(0)
    module = torch.nn.Transformer(
        32, 4, 2, 3, 48, 0.2, activation, batch_first=True, norm_first=norm_first, layer_norm_eps=1e-6
    )
    model = tf.TransformerModel.from_torch(module, vocab_size=43)
    config = model.config
    assert (config.norm_position, config.final_norm) == ("pre" if norm_first else "post", True)
    assert (config.attention_dropout, config.activation_dropout, config.layer_norm_eps) == (0.2, 0.2, 1e-6)
    back = model.to_torch()
    assert back.state_dict().keys() == module.state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(back.state_dict().values(), module.state_dict().values()))
    assert back.encoder.layers[0].norm1.eps == 1e-6 and back.encoder.layers[0].norm_first == norm_first


@pytest.mark.quick
def test_torch_transformers_that_have_no_configuration():
    small = (16, 2, 1, 1, 8)
    cases = {
        "biases": lambda: tf.TransformerModel.from_torch(torch.nn.Transformer(*small, bias=False), vocab_size=9),
        "relu or gelu": lambda: tf.TransformerModel.from_torch(
            torch.nn.Transformer(*small, activation=torch.tanh), vocab_size=9
        ),
        "final_norm": lambda: build().model.to_torch(),
        "layers": lambda: build(final_norm=True).model.load_torch(torch.nn.Transformer(*small)),
        "shape": lambda: build(final_norm=True).model.load_torch(torch.nn.Transformer(16, 2, 2, 3, 8)),
    }
    for message, call in cases.items():
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.quick
def test_sinusoids_are_the_papers():
    table = sinusoids(torch.tensor([0, 1, 50]), 6, torch.float64)
    for row, p in zip(table, (0, 1, 50)):
        for i in range(3):
            angle = torch.tensor(p / 10000 ** (2 * i / 6), dtype=torch.float64)
            torch.testing.assert_close(row[2 * i : 2 * i + 2], torch.stack((angle.sin(), angle.cos())))


@pytest.mark.quick
def test_schedule_is_the_papers():
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.Adam([parameter], 1.0, (0.9, 0.98), 1e-9)
    schedule = tf.noam_schedule(optimizer, 512, warmup=10)
    rates = []
    for _ in range(40):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    wanted = [512**-0.5 * min(s**-0.5, s * 10**-1.5) for s in range(1, 41)]
    assert rates == pytest.approx(wanted) and max(rates) == rates[9]
    with pytest.raises(ValueError, match="warmup.*0"):
        tf.noam_schedule(optimizer, 512, 0)


@pytest.mark.quick
@pytest.mark.parametrize("norm_position", ["post", "pre"])
@pytest.mark.parametrize("share", [True, False])
def test_saved_and_loaded_bit_for_bit(norm_position, share, tmp_path):
    settings = {} if share else {"vocab_size": 37, "encoder_vocab_size": 43}
    model, inputs = build(norm_position=norm_position, **settings), batch()
    wanted = model(**inputs).logits
    model.save_pretrained(tmp_path)
    for auto in (tf.AutoModelForSeq2SeqLM, hf.AutoModelForSeq2SeqLM, tf.TransformerForConditionalGeneration):
        loaded = auto.from_pretrained(tmp_path)
        assert type(loaded) is tf.TransformerForConditionalGeneration
        assert all(torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), model.state_dict().values()))
        assert loaded.lm_head.weight is loaded.model.decoder.embed_tokens.weight
        assert (loaded.lm_head.weight is loaded.model.encoder.embed_tokens.weight) == share
        torch.testing.assert_close(loaded(**inputs).logits, wanted)
    base = tf.AutoModel.from_pretrained(tmp_path)
    assert type(base) is tf.TransformerModel
    assert (base.decoder.embed_tokens.weight is base.encoder.embed_tokens.weight) == share
    untied = tf.TransformerForConditionalGeneration(
        tf.TransformerConfig(**SMALL, norm_position=norm_position, tie_word_embeddings=False)
    )
    assert untied.lm_head.weight is not untied.model.decoder.embed_tokens.weight
    assert len({id(p) for p in untied.parameters()}) == len({id(p) for p in model.parameters()}) + (2 if share else 1)


@pytest.mark.quick
@pytest.mark.parametrize("norm_position", ["post", "pre"])
@pytest.mark.parametrize("padding", ["left", "right"])
def test_generates_the_same_with_and_without_a_cache(norm_position, padding):
    model, inputs = build(norm_position=norm_position), batch(padding)
    inputs.pop("labels")
    for options in (
        {},
        {"num_beams": 3, "num_return_sequences": 2, "length_penalty": 0.6},
        {"do_sample": True, "top_k": 7, "temperature": 0.8},
    ):
        found = []
        for use_cache in (True, False):
            torch.manual_seed(2)
            found.append(model.generate(**inputs, max_new_tokens=9, use_cache=use_cache, **options))
        assert torch.equal(*found), options


@pytest.mark.quick
def test_greedy_takes_the_largest_score():
    model, inputs = build(), batch()
    inputs.pop("labels")
    ids = model.generate(**inputs, max_new_tokens=7)
    best = model(**inputs, decoder_input_ids=ids[:, :-1]).logits.argmax(-1)
    ended = (ids[:, 1:] == 2).cumsum(1) - (ids[:, 1:] == 2).long() > 0
    assert torch.equal(best.masked_fill(ended, 0), ids[:, 1:])


def test_beams_find_what_they_score():
    model, inputs = build(), batch()
    inputs.pop("labels")
    found = model.generate(
        **inputs, max_new_tokens=6, num_beams=4, num_return_sequences=4, length_penalty=0.0, output_scores=True,
        return_dict_in_generate=True,
    )  # fmt: skip
    ids, rows = found.sequences, {k: v.repeat_interleave(4, 0) for k, v in inputs.items()}
    log_p = model(**rows, decoder_input_ids=ids[:, :-1]).logits.log_softmax(-1)
    chosen = log_p.gather(2, ids[:, 1:, None]).squeeze(2)
    ended = (ids[:, 1:] == 2).cumsum(1) - (ids[:, 1:] == 2).long() > 0
    torch.testing.assert_close(chosen.masked_fill(ended, 0).sum(1), found.sequences_scores)


@pytest.mark.quick
def test_padding_changes_nothing():
    model, right, left = build(), batch("right"), batch("left")
    for row, n in enumerate(LENGTHS):
        left["input_ids"][row, 9 - n :] = right["input_ids"][row, :n]
    a, b = (model(**inputs) for inputs in (right, left))
    torch.testing.assert_close(a.logits, b.logits)
    for row, n in enumerate(LENGTHS):
        alone = model(right["input_ids"][row : row + 1, :n], labels=right["labels"][row : row + 1])
        torch.testing.assert_close(a.logits[row], alone.logits[0])
        torch.testing.assert_close(a.encoder_last_hidden_state[row, :n], b.encoder_last_hidden_state[row, 9 - n :])
        assert a.encoder_last_hidden_state[row, n:].eq(0).all()


def test_padded_targets():
    """decoder_attention_mask: padding is neither attended to nor computed."""
    model, inputs = build(norm_position="pre"), batch()
    target = inputs.pop("labels").clamp(min=3)
    mask = torch.arange(6) < torch.tensor([6, 4, 2, 5])[:, None]
    for use_cache in (False, True):
        out = model(
            **inputs, decoder_input_ids=target * mask, decoder_attention_mask=mask.long(), use_cache=use_cache
        ).logits
        for row in range(4):
            one = {k: v[row : row + 1] for k, v in inputs.items()}
            alone = model(**one, decoder_input_ids=target[row, mask[row]][None]).logits[0]
            torch.testing.assert_close(out[row, mask[row]], alone)


@pytest.mark.quick
@pytest.mark.parametrize("norm_position", ["post", "pre"])
def test_one_native_call_a_token(norm_position, monkeypatch):
    """With the native library, generation uses it; with a hook in the model it uses the model's forward. Tokens
    agree."""
    steps = []
    for name in ("step", "choose", "rank"):
        real = getattr(NativeStepper, name)
        counted = lambda self, *given, real=real: steps.append(1) or real(self, *given)  # noqa: E731
        monkeypatch.setattr(NativeStepper, name, counted)
    model, inputs = build(norm_position=norm_position), batch()
    inputs.pop("labels")
    assert model.step_description().why_not() == native.load()
    found = [model.generate(**inputs, max_new_tokens=9, num_beams=beams) for beams in (1, 3)]
    assert bool(steps) == (not native.load())
    model.lm_head.register_forward_hook(lambda *_: None)
    assert native.load() or "hooks" in model.step_description().why_not()
    steps.clear()
    for beams, wanted in zip((1, 3), found):
        assert torch.equal(model.generate(**inputs, max_new_tokens=9, num_beams=beams), wanted)
    assert not steps


@pytest.mark.quick
def test_attentions_and_hidden_states():
    model, inputs = build(), batch()
    out = model(**inputs, output_attentions=True, output_hidden_states=True)
    plain = model(**inputs)
    torch.testing.assert_close(out.logits, plain.logits)
    assert len(out.encoder_attentions) == 2 and len(out.decoder_attentions) == len(out.cross_attentions) == 3
    assert out.cross_attentions[0].shape == (4, 4, 6, 9) and len(out.decoder_hidden_states) == 4
    for weights in (*out.cross_attentions, *out.decoder_attentions):
        torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))
    for row, n in enumerate(LENGTHS):
        assert out.cross_attentions[1][row, :, :, n:].eq(0).all()
    assert out.decoder_attentions[0].triu(1).eq(0).all()
    torch.testing.assert_close(out.encoder_hidden_states[-1], out.encoder_last_hidden_state)


@pytest.mark.quick
def test_loss():
    model, inputs = build(label_smoothing=0.1), batch()
    logits = model(**inputs).logits
    wanted = torch.nn.functional.cross_entropy(logits.flatten(0, 1), inputs["labels"].flatten(), label_smoothing=0.1)
    torch.testing.assert_close(model(**inputs).loss, wanted)
    torch.testing.assert_close(model(**inputs, num_items_in_batch=11).loss, wanted * 22 / 11)
    assert isinstance(model(**inputs, return_dict=False), tuple)
    last = model(**inputs | {"labels": None}, decoder_input_ids=inputs["labels"].clamp(min=3), logits_to_keep=1).logits
    assert last.shape == (4, 1, 43)


def test_checkpointing_gives_the_same_gradients():
    model, inputs = build(dropout=0.1).train(), batch()
    found = []
    for switch in (model.gradient_checkpointing_disable, model.gradient_checkpointing_enable):
        switch()
        torch.manual_seed(4)
        found.append(torch.autograd.grad(model(**inputs).loss, list(model.parameters())))
    for a, b in zip(*found):
        torch.testing.assert_close(a, b)


def test_learns_to_reverse():
    torch.manual_seed(0)
    config = tf.TransformerConfig(
        vocab_size=12, d_model=32, encoder_layers=1, decoder_layers=1, num_attention_heads=4, ffn_dim=64, dropout=0.0,
        label_smoothing=0.0,
    )  # fmt: skip
    model = tf.TransformerForConditionalGeneration(config).train()
    optimizer = torch.optim.Adam(model.parameters(), 0.4, (0.9, 0.98), 1e-9)
    schedule = tf.noam_schedule(optimizer, 32, 40)
    losses = []
    for _ in range(120):
        ids = torch.randint(3, 12, (32, 4))
        loss = model(ids, labels=torch.cat((ids.flip(1), torch.full((32, 1), 2)), 1)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.item())
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])


@pytest.mark.parametrize("norm_position", ["post", "pre"])
def test_dropout_is_live(norm_position):
    model, inputs = build(norm_position=norm_position, dropout=0.3).train(), batch()
    torch.manual_seed(1)
    first, second = model(**inputs).logits, model(**inputs).logits
    torch.manual_seed(1)
    assert not torch.equal(first, second) and torch.equal(first, model(**inputs).logits)


INPUTS = batch()
CONFIG = tf.TransformerConfig
BAD = {
    "norm": (lambda: CONFIG(norm_position="middle"), ValueError, "norm_position.*'post'.*'middle'"),
    "heads": (lambda: CONFIG(d_model=30, num_attention_heads=4), ValueError, "num_attention_heads.*30.*4"),
    "odd": (lambda: CONFIG(d_model=9, num_attention_heads=3), ValueError, "d_model.*even.*9"),
    "activation": (lambda: CONFIG(activation_function="step"), ValueError, "activation_function.*relu.*'step'"),
    "sharing": (
        lambda: CONFIG(encoder_vocab_size=5, share_embeddings=True), ValueError, "share_embeddings.*one vocabulary",
    ),
    "ids": (lambda: build()(INPUTS["input_ids"] + 50, labels=INPUTS["labels"]), ValueError, r"input_ids.*\[0, 43\)"),
    "target ids": (
        lambda: build()(INPUTS["input_ids"], decoder_input_ids=INPUTS["input_ids"] + 50), ValueError,
        r"decoder_input_ids.*\[0, 43\)",
    ),
    "no source": (lambda: build()(labels=INPUTS["labels"]), ValueError, "input_ids.*neither"),
    "mask": (
        lambda: build()(**{**INPUTS, "attention_mask": INPUTS["attention_mask"][:, :3]}), ValueError,
        r"attention_mask.*\(4, 9\).*\(4, 3\)",
    ),
    "labels": (
        lambda: build()(INPUTS["input_ids"], decoder_input_ids=INPUTS["input_ids"], labels=INPUTS["labels"]),
        ValueError, r"labels.*\(4, 9\).*\(4, 6\)",
    ),
    "too long": (
        lambda: build(max_position_embeddings=8)(**INPUTS), ValueError, "input_ids.*9.*max_position_embeddings = 8",
    ),
    "no start": (
        lambda: build(decoder_start_token_id=None)(**INPUTS), ValueError, "config.decoder_start_token_id.*None",
    ),
}  # fmt: skip


@pytest.mark.quick
def test_more_tokens():
    model, inputs = build(), batch()
    wanted = model(**inputs).logits
    model.resize_token_embeddings(50)
    assert model.config.vocab_size == 50 and model.lm_head.weight is model.model.encoder.embed_tokens.weight
    torch.testing.assert_close(model(**inputs).logits[..., :43], wanted)
    with pytest.raises(NotImplementedError, match="embeddings of their own"):
        build(encoder_vocab_size=50).resize_token_embeddings(60)


@pytest.mark.quick
@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    call, error, message = BAD[name]
    with pytest.raises(error, match=message):
        call()


@pytest.mark.quick
@pytest.mark.parametrize("how", ["subclass", "instance", "hook"])
def test_generate_calls_what_was_put_in(how):
    """A user's own forward and hooks run at every step."""
    seen = []

    class Counted(tf.TransformerForConditionalGeneration):
        def forward(self, *args, **kwargs):
            seen.append(1)
            return super().forward(*args, **kwargs)

    kind = Counted if how == "subclass" else tf.TransformerForConditionalGeneration
    model = kind(tf.TransformerConfig(**SMALL)).eval()
    plain = tf.TransformerForConditionalGeneration(model.config).eval()
    plain.load_state_dict(model.state_dict())
    assert not plain.why_hf_loop()
    if how == "instance":
        forward = model.forward
        model.forward = lambda *args, **kwargs: seen.append(1) or forward(*args, **kwargs)
    elif how == "hook":
        model.model.decoder.register_forward_hook(lambda *_: seen.append(1))
    ids = torch.tensor([[5, 6, 7, 2]])
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    assert torch.equal(model.generate(ids, **options), plain.generate(ids, **options)) and len(seen) == 4
