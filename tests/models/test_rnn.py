"""The recurrent encoder-decoder: compared with its papers' formulas; checkpoints, generation, training."""

import copy

import pytest
import torch
import transformers as hf
from numerics import GRADIENT, assert_as_accurate, pooled
from recurrent_models import KINDS, LENGTHS, batch, build

import transformer_fast as tf
from transformer_fast.models.rnn import SCORES, RecurrentState


def attend(score, query, h):
    """Context and weights of one query, (W,), over the states h, (S, W)."""
    if score.kind == "additive":
        hidden = torch.tanh(score.query.weight @ query + h @ score.key.weight.t() + score.key.bias)
        e = hidden @ score.weight
    elif score.kind == "concat":
        together = torch.cat([score.query.weight, score.key.weight], 1)
        e = torch.tanh(torch.cat([query.expand_as(h), h], 1) @ together.t()) @ score.weight
    else:
        e = (h @ score.key.weight.t() if score.kind == "general" else h) @ query
    w = e.softmax(0)
    return w @ h, w


def written_out(model, inputs):
    """Logits (B, T, V) and weights (B, T, Sk) by the papers' formulas, one sentence at a time, without padding."""
    config, encoder, decoder = model.config, model.model.encoder, model.model.decoder
    score, lstm = decoder.score, config.cell == "lstm"
    starts = model.prepare_decoder_input_ids_from_labels(inputs["labels"])
    all_logits, all_weights = [], []
    for ids, mask, words in zip(inputs["input_ids"], inputs["attention_mask"].bool(), starts):
        h, last = encoder.rnn(encoder.embed_tokens(ids[mask])[None])
        h, last = h[0], last if lstm else (last,)
        last = [s.reshape(config.num_layers, 1, -1) for s in last]  # both directions concatenated
        state = torch.tanh(decoder.initial_state(last[0]))
        state = (state, decoder.initial_cell(last[1])) if lstm else state
        feed = h.new_zeros(config.hidden_size)
        for word in decoder.embed_tokens(words):
            if score.kind == "none":
                context, w = last[0][-1, 0], h.new_zeros(len(h))
                seen = [word, context] if config.context == "every_step" else [word]
                out, state = decoder.rnn(torch.cat(seen)[None, None], state)
                read = out[0, 0]
                if config.context == "every_step":
                    read = decoder.readout(torch.cat([read, word, context])).view(-1, 2).amax(1)
            elif config.attention_placing == "before":
                context, w = attend(score, (state[0] if lstm else state)[-1, 0], h)
                out, state = decoder.rnn(torch.cat([word, context])[None, None], state)
                read = decoder.readout(torch.cat([out[0, 0], word, context])).view(-1, 2).amax(1)
            else:
                out, state = decoder.rnn((torch.cat([word, feed]) if config.input_feeding else word)[None, None], state)
                context, w = attend(score, out[0, 0], h)
                read = feed = torch.tanh(decoder.readout(torch.cat([context, out[0, 0]])))
            all_logits.append(model.lm_head(read))
            all_weights.append(torch.zeros(len(ids), dtype=h.dtype).masked_scatter(mask, w))
    shape = (*inputs["labels"].shape, -1)
    return torch.stack(all_logits).view(shape), torch.stack(all_weights).view(shape)


def gradients(model, outputs):
    """Gradients of every parameter, for random cotangents."""
    g = torch.Generator().manual_seed(5)
    loss = sum((o * torch.randn(o.shape, generator=g).to(o)).sum() for o in outputs)
    names, parameters = zip(*model.named_parameters())
    return dict(zip(names, torch.autograd.grad(loss, parameters)))


@pytest.mark.parametrize("kind, cell", KINDS)
@pytest.mark.parametrize("padding", ["left", "right"])
def test_is_the_papers_formulas(kind, cell, padding):
    model, inputs = build(kind, cell), batch(padding)
    truth_model = copy.deepcopy(model).double()
    results = {}
    for name, m in (("truth", truth_model), ("plain", model), ("ours", model)):
        if name == "ours":
            out = m(**inputs, output_attentions=True)
            outputs = (out.logits,) if out.cross_attentions is None else (out.logits, out.cross_attentions[0][:, 0])
            assert (len(outputs) == 1) == (model.config.attention == "none")
        else:
            outputs = written_out(m, inputs)[: 1 if model.config.attention == "none" else 2]
        results[name] = [o.detach() for o in outputs], gradients(m, outputs)
    (truth, truth_grads), (plain, plain_grads), (ours, our_grads) = (results[n] for n in ("truth", "plain", "ours"))
    for name, a, t, p in zip(("logits", "weights"), ours, truth, plain):
        assert_as_accurate(a, t, p, name=name)
    assert_as_accurate(*(pooled(g, truth_grads) for g in (our_grads, truth_grads, plain_grads)), GRADIENT, "gradients")


@pytest.mark.quick
@pytest.mark.parametrize("kind, cell", KINDS)
def test_generates_the_same_with_and_without_a_cache(kind, cell):
    model, inputs = build(kind, cell), batch()
    inputs.pop("labels")
    for options in (
        {},
        {"num_beams": 3, "num_return_sequences": 2, "length_penalty": 0.6},
        {"num_beams": 3, "early_stopping": True},
        {"do_sample": True, "top_k": 7, "temperature": 0.8},
    ):
        found = []
        for use_cache in (True, False):
            torch.manual_seed(2)
            found.append(model.generate(**inputs, max_new_tokens=9, use_cache=use_cache, **options))
        assert torch.equal(*found), options


@pytest.mark.parametrize("kind, cell", KINDS)
def test_the_engine_gives_the_tokens_of_hugging_face(kind, cell, monkeypatch):
    """Rows that end early and are removed, reordered beams, shared sources; compared with the same model in HF's
    loop."""
    model, inputs = build(kind, cell), batch()
    inputs.pop("labels")
    # With these end tokens a random model ends soon; with 5, the peeky GRU would end at its first token.
    model.generation_config.eos_token_id = [2, 3, 4, 7 if (kind, cell) == ("peeky", "gru") else 5]
    steps, step = [], model.recurrent_step
    monkeypatch.setattr(model, "recurrent_step", lambda tokens, *more: steps.append(len(tokens)) or step(tokens, *more))
    for options in (
        {"do_sample": False},
        {"num_beams": 4, "num_return_sequences": 3},
        {"num_beams": 2, "do_sample": True, "top_k": 9},
        {"do_sample": True, "num_return_sequences": 3, "top_p": 0.9},
    ):
        torch.manual_seed(4)
        ours, count = model.generate(**inputs, max_new_tokens=14, **options), len(steps)
        with monkeypatch.context() as patch:
            patch.setattr(type(model), "_stepper", lambda *args: None)
            torch.manual_seed(4)
            theirs = model.generate(**inputs, max_new_tokens=14, **options)
        assert torch.equal(ours, theirs) and 0 < count == len(steps), options
    assert len(set(steps)) > 2  # rows were removed


@pytest.mark.parametrize("kind", ["additive", "dot"])
def test_beams_find_what_they_score(kind):
    """Scores of the returned beams are the log probabilities of their tokens under the model."""
    model, inputs = build(kind), batch()
    inputs.pop("labels")
    found = model.generate(
        **inputs, max_new_tokens=6, num_beams=4, num_return_sequences=4, length_penalty=0.0, output_scores=True,
        return_dict_in_generate=True, output_attentions=True,
    )  # fmt: skip
    rows = {k: v.repeat_interleave(4, 0) for k, v in inputs.items()}
    ids = found.sequences
    log_p = model(**rows, decoder_input_ids=ids[:, :-1]).logits.log_softmax(-1)
    chosen = log_p.gather(2, ids[:, 1:, None]).squeeze(2)
    ended = (ids[:, 1:] == 2).cumsum(1) - (ids[:, 1:] == 2).long() > 0
    torch.testing.assert_close(chosen.masked_fill(ended, 0).sum(1), found.sequences_scores)
    assert found.cross_attentions[0][0].shape == (16, 1, 1, 7)


@pytest.mark.quick
@pytest.mark.parametrize("kind, cell", [("additive", "gru"), ("general", "lstm")])
def test_saved_and_loaded_bit_for_bit(kind, cell, tmp_path):
    model, inputs = build(kind, cell), batch()
    model.save_pretrained(tmp_path)
    for auto in (tf.AutoModelForSeq2SeqLM, hf.AutoModelForSeq2SeqLM, tf.AttentionRNNForConditionalGeneration):
        loaded = auto.from_pretrained(tmp_path)
        assert type(loaded) is tf.AttentionRNNForConditionalGeneration
        assert loaded.state_dict().keys() == model.state_dict().keys()
        assert all(torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), model.state_dict().values()))
        assert loaded.config.to_diff_dict() | {"dtype": None} == model.config.to_diff_dict() | {"dtype": None}
        torch.testing.assert_close(loaded(**inputs).logits, model(**inputs).logits)  # equal weights in other memory
    base = tf.AutoModel.from_pretrained(tmp_path)
    assert type(base) is tf.AttentionRNNModel
    states = base(inputs["input_ids"], inputs["attention_mask"], inputs["labels"].clamp(min=0)).last_hidden_state
    assert states.shape == (4, 6, model.config.readout_size)


def test_attention_wider_than_the_fused_heads():
    """Above 256 the dot score is computed in plain PyTorch, by the same formula."""
    model, inputs = build("dot", hidden_size=288, embedding_size=8, num_layers=1), batch()
    out = model(**inputs, output_attentions=True)
    logits, weights = written_out(copy.deepcopy(model).double(), inputs)
    plain = written_out(model, inputs)
    assert_as_accurate(out.logits.detach(), logits.detach(), plain[0].detach())
    assert_as_accurate(out.cross_attentions[0][:, 0].detach(), weights.detach(), plain[1].detach())


@pytest.mark.quick
def test_padding_changes_nothing():
    model = build("additive")
    right, left = batch("right"), batch("left")
    ids, length = right["input_ids"], torch.tensor(LENGTHS)
    for row, n in enumerate(length.tolist()):
        left["input_ids"][row, 7 - n :] = ids[row, :n]
    a, b = (model(**inputs, output_attentions=True) for inputs in (right, left))
    torch.testing.assert_close(a.logits, b.logits)
    for row, n in enumerate(length.tolist()):
        torch.testing.assert_close(a.cross_attentions[0][row, :, :, :n], b.cross_attentions[0][row, :, :, 7 - n :])
        assert (
            a.cross_attentions[0][row, :, :, n:].eq(0).all() and b.encoder_last_hidden_state[row, : 7 - n].eq(0).all()
        )
    torch.testing.assert_close(a.cross_attentions[0].sum(-1), torch.ones(4, 1, 6))


def test_source_of_padding_alone():
    model, inputs = build("concat", "lstm"), batch()
    inputs["attention_mask"][2] = 0
    out = model(**inputs, output_attentions=True)
    assert out.cross_attentions[0][2].eq(0).all() and not out.logits.isnan().any()
    out.loss.backward()
    assert all(not p.grad.isnan().any() for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_dtypes(dtype):
    for kind in SCORES:
        model, inputs = build(kind), batch()
        truth = model.double()(**inputs).logits.detach()
        model = model.to(dtype)
        with tf.backend("eager"):
            eager = model(**inputs).logits.detach()
        out = model(**inputs)
        assert_as_accurate(out.logits.detach(), truth, eager, name=kind)
        out.loss.backward()
        assert all(p.grad.dtype == dtype for p in model.parameters())


@pytest.mark.quick
def test_loss():
    model, inputs = build(label_smoothing=0.1), batch()
    logits = model(**inputs).logits
    wanted = torch.nn.functional.cross_entropy(logits.flatten(0, 1), inputs["labels"].flatten(), label_smoothing=0.1)
    torch.testing.assert_close(model(**inputs).loss, wanted)
    torch.testing.assert_close(model(**inputs, num_items_in_batch=11).loss, wanted * 22 / 11)
    assert isinstance(model(**inputs, return_dict=False), tuple)
    start = model.prepare_decoder_input_ids_from_labels(inputs["labels"])
    assert start[:, 0].eq(1).all() and start[1, -1] == 0 and torch.equal(start[0, 1:], inputs["labels"][0, :-1])


@pytest.mark.quick
@pytest.mark.parametrize("kind, cell", [("additive", "gru"), ("dot", "gru"), ("none", "lstm"), ("peeky", "gru")])
def test_teacher_forcing(kind, cell):
    """At 0: the logits equal those with the inputs of greedy decoding. At 0.5: some inputs are the labels. In
    evaluation,
    and at 1: all are."""
    model, inputs = build(kind, cell, dropout=0.0), batch()
    forced = model(**inputs, output_attentions=True)
    model.config.teacher_forcing = 0.0
    assert torch.equal(model(**inputs).logits, forced.logits)
    model.train()
    free = model(**inputs, output_attentions=True)
    said = free.logits.argmax(-1)
    starts = model.prepare_decoder_input_ids_from_labels(inputs["labels"])
    given = torch.cat((starts[:, :1], said[:, :-1]), 1)
    source = {k: v for k, v in inputs.items() if k != "labels"}
    again = model.eval()(**source, decoder_input_ids=given, output_attentions=True)
    torch.testing.assert_close(free.logits, again.logits)
    if kind in ("additive", "dot"):
        torch.testing.assert_close(free.cross_attentions[0], again.cross_attentions[0])
    free.loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    model.train().config.teacher_forcing = 0.5
    torch.manual_seed(0)
    half = model(**inputs).logits
    torch.testing.assert_close(half[:, 0], free.logits[:, 0])  # the first input is always the start
    assert not torch.equal(half, free.logits) and not torch.equal(half, forced.logits)


@pytest.mark.quick
def test_configurations_of_before():
    """A config without the newer settings gives the decoder that older versions made from its attention."""
    for attention, placing in (("additive", "before"), ("dot", "after"), ("concat", "after")):
        config = tf.AttentionRNNConfig.from_dict({"attention": attention, "hidden_size": 8, "embedding_size": 6})
        assert (config.attention_placing, config.teacher_forcing) == (placing, 1.0)
        assert config.readout_size == (6 if attention == "additive" else 8)


@pytest.mark.parametrize("kind, cell", [("additive", "gru"), ("general", "lstm"), ("none", "lstm"), ("peeky", "gru")])
def test_learns_to_reverse(kind, cell):
    model = build(kind, cell, num_layers=1, hidden_size=48, initializer_range=0.1, dropout=0.0).train()
    g = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    losses = []
    for _ in range(40):
        ids = torch.randint(3, 11, (16, 3), generator=g)
        out = model(ids, labels=torch.cat((ids.flip(1), torch.full((16, 1), 2)), 1))
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(out.loss.item())
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])


def test_tied_vocabulary(tmp_path):
    model, inputs = build(tie_word_embeddings=True), batch()
    assert model.lm_head.weight is model.model.decoder.embed_tokens.weight
    model.save_pretrained(tmp_path)
    loaded = tf.AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.model.decoder.embed_tokens.weight
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)
    torch.testing.assert_close(loaded(**inputs).logits, model(**inputs).logits)


def test_state_advances_step_by_step():
    model, inputs = build("concat"), batch()
    starts = model.prepare_decoder_input_ids_from_labels(inputs.pop("labels"))
    whole = model(**inputs, decoder_input_ids=starts)
    state = None
    steps = []
    for i in range(starts.shape[1]):
        out = model(**inputs, decoder_input_ids=starts[:, i : i + 1], past_key_values=state, use_cache=True)
        state = out.past_key_values
        steps.append(out.logits)
    assert isinstance(state, RecurrentState) and state.get_seq_length() == starts.shape[1]
    torch.testing.assert_close(torch.cat(steps, 1), whole.logits)
    last = model(**inputs, decoder_input_ids=starts, logits_to_keep=1).logits
    torch.testing.assert_close(last, whole.logits[:, -1:])


def test_gradients_of_gradients_are_had_from_plain_pytorch():
    """The loop over repacked weights raises an error for second-order gradients; plain PyTorch has them."""
    model, inputs = build("additive", num_layers=1), batch()
    weight = model.model.decoder.rnn.weight_hh_l0
    with pytest.raises(RuntimeError, match="once_differentiable"):
        (first,) = torch.autograd.grad(model(**inputs).loss, weight, create_graph=True)
        first.square().sum().backward()
    with tf.backend("eager"):
        (first,) = torch.autograd.grad(model(**inputs).loss, weight, create_graph=True)
        assert torch.autograd.grad(first.square().sum(), weight)[0].isfinite().all()


INPUTS = batch()
BAD = {
    "score": (lambda: tf.AttentionRNNConfig(attention="cosine"), ValueError, "attention.*'additive'.*'cosine'"),
    "cell": (lambda: tf.AttentionRNNConfig(cell="elman"), ValueError, "cell.*'gru', 'lstm'.*'elman'"),
    "placing": (
        lambda: tf.AttentionRNNConfig(attention_placing="inside"), ValueError, "attention_placing.*'before'.*'inside'",
    ),
    "context": (lambda: tf.AttentionRNNConfig(context="every_step"), ValueError, 'context.*"initial".*every_step'),
    "teacher forcing": (lambda: tf.AttentionRNNConfig(teacher_forcing=1.5), ValueError, r"teacher_forcing.*1\].*1.5"),
    "odd width": (lambda: tf.AttentionRNNConfig(hidden_size=5), ValueError, "hidden_size.*even.*5"),
    "tied widths": (
        lambda: tf.AttentionRNNConfig(attention="dot", hidden_size=8, tie_word_embeddings=True), ValueError,
        "tie_word_embeddings.*512.*8",
    ),
    "ids": (lambda: build()(INPUTS["input_ids"] + 50, labels=INPUTS["labels"]), ValueError, r"input_ids.*\[0, 43\)"),
    "no source": (lambda: build()(labels=INPUTS["labels"]), ValueError, "input_ids.*neither"),
    "no target": (lambda: build()(INPUTS["input_ids"]), ValueError, "decoder_input_ids.*neither"),
    "empty target": (
        lambda: build()(INPUTS["input_ids"], decoder_input_ids=INPUTS["input_ids"][:, :0]), ValueError,
        r"decoder_input_ids.*at least 1.*\(4, 0\)",
    ),
    "target batch": (
        lambda: build()(INPUTS["input_ids"], decoder_input_ids=INPUTS["input_ids"][:2]), ValueError,
        r"decoder_input_ids.*\(4.*\(2, 7\)",
    ),
    "target ids": (
        lambda: build()(INPUTS["input_ids"], decoder_input_ids=INPUTS["input_ids"] + 37), ValueError,
        r"decoder_input_ids.*\[0, 37\)",
    ),
    "mask": (
        lambda: build()(**{**INPUTS, "attention_mask": INPUTS["attention_mask"][:, :3]}), ValueError,
        r"attention_mask.*\(4, 7\).*\(4, 3\)",
    ),
    "labels": (
        lambda: build()(INPUTS["input_ids"], decoder_input_ids=INPUTS["input_ids"] % 37, labels=INPUTS["labels"]),
        ValueError, r"labels.*\(4, 7\).*\(4, 6\)",
    ),
}  # fmt: skip


def test_resizing_says_why_not():
    with pytest.raises(NotImplementedError, match="embeddings of their own"):
        build().resize_token_embeddings(50)


@pytest.mark.quick
@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    call, error, message = BAD[name]
    with pytest.raises(error, match=message):
        call()
