"""attn_implementation="transformer_fast" against Hugging Face's eager attention, family by family."""

import copy

import pytest
import torch
import transformers as hf
from hf_models import DECODERS, ENCODERS, SEQ2SEQ, TEXT, batch, cast, run, run_with_gradients, truth, vit
from numerics import GRADIENT, assert_as_accurate, pooled

import transformer_fast
from transformer_fast import _transformers
from transformer_fast.integrations import huggingface  # which registers the implementation
from transformer_fast.integrations.lazy_mask import LazyMask

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("padding", ["right", "left", "none"])
@pytest.mark.parametrize("family", TEXT)
def test_every_row_and_gradient(family, padding):
    model = TEXT[family]()
    inputs = batch(padding, seq2seq=family in SEQ2SEQ)
    true_out, true_grads = run_with_gradients(truth(model), inputs)
    for dtype in DTYPES:
        eager_out, eager_grads = run_with_gradients(cast(model, dtype), inputs)
        out, grads = run_with_gradients(cast(model, dtype, "transformer_fast"), inputs)
        assert_as_accurate(out, true_out, eager_out, name=f"{family} {dtype}")
        assert grads.keys() == true_grads.keys()
        assert_as_accurate(
            pooled(grads, true_grads), pooled(true_grads, true_grads), pooled(eager_grads, true_grads), GRADIENT,
            name=f"{family} {dtype} gradients",
        )  # fmt: skip


_WIDTHS = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
WRITTEN_IN = {"MPNet": _WIDTHS, "RoFormer": _WIDTHS, "Bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4}}


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("family", WRITTEN_IN)
def test_attention_that_is_written_into_the_model_stays(family, own, tmp_path):
    """Such a model adds its mask to its scores, and has no other that is causal."""
    cls = getattr(hf, f"{family}Model")
    torch.manual_seed(0)
    model = cls(cls.config_class(vocab_size=61, **WRITTEN_IN[family])).eval()
    for p in model.parameters():
        p.data.normal_(0, 0.2)
    model.save_pretrained(tmp_path)
    if own:  # transformers looks for attention in the file of the class, which is this one
        cls = type("Own", (cls,), {"__module__": __name__})
    chosen = cls.from_pretrained(tmp_path, attn_implementation="transformer_fast").eval()
    accelerated = cls.from_pretrained(tmp_path).eval()
    report = transformer_fast.accelerate(accelerated, adopt=False, verbose=False)
    _transformers._takes.clear()
    with pytest.warns(UserWarning, match=f"written into the models of {family}Config"):
        run(chosen, batch("left"))
    for padding in ("left", "none"):
        inputs = batch(padding)
        wanted = run(model, inputs)
        torch.testing.assert_close(run(chosen, inputs), wanted)
        torch.testing.assert_close(run(accelerated, inputs), wanted)
    assert "written into the model" in report.left["attention"]
    assert "attention: its own" in transformer_fast.explain(chosen)


@pytest.mark.quick
def test_bert_right_padded():
    model, inputs = ENCODERS["bert"](), batch("right")
    outs = [run(m, inputs) for m in (cast(model, torch.float32, "transformer_fast"), truth(model), model)]
    assert_as_accurate(*outs)


def test_vision_model_without_a_mask():
    model, pixels = vit(), torch.randn(2, 3, 16, 16)
    for dtype in DTYPES:
        ours, eager = cast(model, dtype, "transformer_fast"), cast(model, dtype)
        true = truth(model)(pixels.double()).last_hidden_state
        x = pixels.to(dtype)
        assert_as_accurate(ours(x).last_hidden_state, true, eager(x).last_hidden_state, name=str(dtype))


@pytest.mark.parametrize("family", TEXT)
def test_attention_weights_on_request(family):
    model, inputs = TEXT[family](), batch("left", seq2seq=family in SEQ2SEQ)
    real = inputs["attention_mask"].bool()
    ours, true, eager = (
        m(**inputs, output_attentions=True)
        for m in (cast(model, torch.float32, "transformer_fast"), truth(model), model)
    )
    names = [name for name in true if "attentions" in name and len(true[name])]
    assert names
    for name in names:
        assert len(ours[name]) == len(true[name])
        for weights in zip(ours[name], true[name], eager[name]):
            if weights[0].shape[2] == real.shape[1]:  # queries that may be padding
                weights = [w.transpose(1, 2)[real] for w in weights]
            assert_as_accurate(*weights, name=f"{family} {name}")
    assert cast(model, torch.float32, "transformer_fast")(**inputs).get("attentions") is None


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("family", [*DECODERS, *SEQ2SEQ])
def test_greedy_tokens(family, cache):
    model, inputs = TEXT[family](), batch("left")
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "cache_implementation": cache}
    wanted = model.generate(**inputs, **options)
    assert torch.equal(cast(model, torch.float32, "transformer_fast").generate(**inputs, **options), wanted)


def test_beam_search_tokens():
    model, inputs = SEQ2SEQ["marian"](), batch("right")
    options = {"max_new_tokens": 8, "num_beams": 3, "do_sample": False}
    wanted = model.generate(**inputs, **options)
    assert torch.equal(cast(model, torch.float32, "transformer_fast").generate(**inputs, **options), wanted)


@pytest.mark.parametrize("cache_class", [hf.DynamicCache, hf.StaticCache])
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2"])
def test_prefill_in_chunks(family, cache_class):
    """The second chunk's queries are at the end of the keys, or in the middle of a static cache."""
    model, inputs = DECODERS[family](), batch("left")

    def chunked(model, dtype=torch.float32):
        limit = {"max_cache_len": 12} if cache_class is hf.StaticCache else {}
        cache = cache_class(config=model.config, **limit)
        states = []
        for start, stop in ((0, 5), (5, 8), (8, 9)):
            ids, mask = inputs["input_ids"][:, start:stop], inputs["attention_mask"][:, :stop]
            out = model(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True)
            states.append(out.logits)
        return torch.cat(states, 1)[inputs["attention_mask"].bool()].detach()

    ours = chunked(cast(model, torch.float32, "transformer_fast"))
    assert_as_accurate(ours, chunked(truth(model)), chunked(model))


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2"])
def test_packed_sequences(family, monkeypatch):
    """Several sequences per row, separated only by position_ids: varlen attention without a dense mask."""
    model = DECODERS[family]().train()
    ids = batch("none")["input_ids"].view(2, -1)
    rows = [[4, 1, 10, 3], [7, 11]]  # mistral's and gemma2's windows are of 3
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in rows])
    inputs = {"input_ids": ids, "position_ids": positions}
    models = [cast(model, torch.float32, "transformer_fast"), truth(model), model]
    bounds, varlen = [], huggingface.varlen_attention
    with monkeypatch.context() as patch:
        patch.setattr(LazyMask, "dense", lambda mask: pytest.fail("a dense mask was made"))
        patch.setattr(
            huggingface,
            "varlen_attention",
            lambda q, k, v, cu, *more, **named: bounds.append(cu.tolist()) or varlen(q, k, v, cu, *more, **named),
        )
        ours = run_with_gradients(models[0], inputs, use_cache=False)
    assert bounds == [[0, 4, 5, 15, 18, 25, 36]] * 2
    exact, plain = (run_with_gradients(m, inputs, use_cache=False) for m in models[1:])
    assert_as_accurate(ours[0], exact[0], plain[0])
    assert_as_accurate(*(pooled(g[1], exact[1]) for g in (ours, exact, plain)), GRADIENT)
    with torch.no_grad():  # code that reads the mask gets transformers' own
        out = models[0](**inputs, use_cache=False, output_attentions=True)
        assert_as_accurate(out.logits.flatten(0, 1), exact[0], plain[0])
        assert not out.attentions[0][0, :, 5:15, :5].any()
        alone = models[0](input_ids=ids[:1, 5:15], use_cache=False).logits[0]
    assert_as_accurate(alone, exact[0][5:15], plain[0][5:15], name="a sequence by itself")


@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_own_four_dimensional_mask(family, kind):
    model, ids = TEXT[family](), batch("none")["input_ids"]
    mask = torch.rand(len(ids), 1, ids.shape[1], ids.shape[1]) < 0.6
    mask |= torch.eye(ids.shape[1], dtype=torch.bool)
    bias = torch.zeros(mask.shape).masked_fill(~mask, -1e9)
    given = mask if kind == "bool" else bias
    outs = [
        (m(input_ids=ids, attention_mask=a)[0]).flatten(0, 1)
        for m, a in ((cast(model, torch.float32, "transformer_fast"), given), (truth(model), mask), (model, bias))
    ]
    assert_as_accurate(*outs)


def test_padding_is_never_attended_to():
    """Values at padded positions do not affect other positions."""
    for family in ("bert", "llama", "t5"):
        model = cast(TEXT[family](), torch.float32, "transformer_fast")
        for padding in ("left", "right"):
            inputs = batch(padding, seq2seq=family in SEQ2SEQ)
            other = {**inputs, "input_ids": inputs["input_ids"] + 7 * (1 - inputs["attention_mask"])}
            assert torch.equal(run(model, inputs), run(model, other)), f"{family} {padding}"


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant):
    model = cast(DECODERS["llama"](), torch.float32, "transformer_fast").train()
    out, grads = run_with_gradients(model, batch("right"))
    model.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    again, recomputed = run_with_gradients(model, batch("right"))
    assert torch.equal(out, again)
    assert all(torch.equal(grads[name], recomputed[name]) for name in grads)


@pytest.mark.parametrize("regional", [True, False])
def test_compile(regional):
    """Whole models with fullgraph, and single layers, where masks with different rules must not be confused."""
    model = cast(DECODERS["gpt2"](), torch.float32, "transformer_fast")
    compiled = copy.deepcopy(model)
    torch._dynamo.reset()
    for part in compiled.transformer.h if regional else [compiled]:
        part.compile(backend="eager", fullgraph=True)
    with torch.no_grad():
        for padding, lengths in (("right", (9, 4, 1, 7)), ("right", (2, 9, 5, 7)), ("left", (9, 4, 1, 7))):
            inputs = batch(padding, lengths=lengths)
            outs = [run(m, inputs) for m in (compiled, truth(model), model)]
            assert_as_accurate(*outs, name=f"{padding} {lengths}")
