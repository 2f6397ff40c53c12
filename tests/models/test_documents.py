"""Documents concatenated into one row by DataCollatorWithFlattening do not attend to one another; compute_padding."""

import copy

import pytest
import torch
import transformers
from numerics import GRADIENT, assert_as_accurate
from transformers import DataCollatorWithFlattening

import transformer_fast
from transformer_fast.layers.quantized import COMPILER_SEES_MODULES

LENGTHS = (3, 5, 1, 4)


def _models(name: str, config):
    """(ours, HF's, HF's in float64), with large random weights."""
    torch.manual_seed(0)
    theirs = getattr(transformers, name)(config).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    ours = getattr(transformer_fast, name)(copy.deepcopy(config)).eval()
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs, copy.deepcopy(theirs).double()


def gpt2():
    config = transformers.GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=40, attn_pdrop=0.0,
                                     resid_pdrop=0.0, embd_pdrop=0.0, bos_token_id=1, eos_token_id=2)  # fmt: skip
    return _models("GPT2LMHeadModel", config)


def bert(name="BertModel", **changes):
    return _models(name, transformers.BertConfig(vocab_size=97, hidden_size=32, num_hidden_layers=2,
                   num_attention_heads=4, intermediate_size=48, **changes))  # fmt: skip


def packed(**options) -> dict:
    generator = torch.Generator().manual_seed(1)
    features = [{"input_ids": torch.randint(3, 96, (n,), generator=generator).tolist()} for n in LENGTHS]
    return dict(DataCollatorWithFlattening(return_tensors="pt", **options)(features))


def llama():
    config = transformers.LlamaConfig(
        vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=48, max_position_embeddings=40,
    )  # fmt: skip
    return _models("LlamaForCausalLM", config)


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("family", [gpt2, llama])
def test_packed_by_position_ids(family, train):
    """Loss, logits and gradients equal HF's; documents do not affect one another."""
    batch, results = packed(), []
    for model in family():
        model.train(train)
        out = model(**batch, use_cache=False)
        targets = torch.nn.functional.pad(batch["labels"], (0, 1), value=-100)[:, 1:]
        loss = torch.nn.functional.cross_entropy(out.logits.flatten(0, 1), targets.flatten())
        loss.backward()
        reported = out.loss if model.dtype == torch.float32 else loss  # HF computes it in float32
        results.append((reported.view(1), out.logits, next(p for p in model.parameters() if p.dim() > 1).grad))
    ours, theirs, truth = results
    for i in range(2):
        assert_as_accurate(ours[i], truth[i], theirs[i])
    assert_as_accurate(ours[2], truth[2], theirs[2], GRADIENT)


@pytest.mark.quick
def test_each_document_is_as_alone():
    ours, *_ = gpt2()
    batch = packed()
    together = ours(batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits[0]
    for part, ids in zip(together.split(LENGTHS), batch["input_ids"][0].split(LENGTHS)):
        torch.testing.assert_close(part, ours(ids[None], use_cache=False).logits[0])


@pytest.mark.quick
def test_documents_take_no_dense_mask(monkeypatch):
    from transformer_fast import ops

    masks, run = [], ops.qkv_attention
    monkeypatch.setattr(ops, "qkv_attention", lambda qkv, cu, *args: masks.append(cu.tolist()) or run(qkv, cu, *args))
    batch = packed()
    gpt2()[0](batch["input_ids"], position_ids=batch["position_ids"], use_cache=False)
    assert masks == [[0, 3, 8, 9, 13]] * 2


@pytest.mark.quick
@pytest.mark.parametrize("how", ["attentions", "two rows", "compiled", "seq_idx"])
def test_documents_otherwise(how):
    ours, theirs, truth = gpt2()
    batch = packed(return_seq_idx=how == "seq_idx")
    ids, positions = batch["input_ids"], batch["position_ids"]
    call = {"input_ids": ids, "position_ids": positions, "use_cache": False}
    if how == "two rows":
        call = {k: v.repeat(2, 1) if isinstance(v, torch.Tensor) else v for k, v in call.items()}
    wanted, plain = truth(**call).logits, theirs(**call).logits
    if how == "attentions":
        out = ours(**call, output_attentions=True)
        assert not out.attentions[0][0, :, 3:8, :3].any()
        found = out.logits
    elif how == "compiled":
        found = torch.compile(ours, backend="eager", fullgraph=True)(**call).logits
    elif how == "seq_idx":
        found = ours(input_ids=ids, seq_idx=batch["seq_idx"], position_ids=positions, use_cache=False).logits
    else:
        found = ours(**call).logits
    assert_as_accurate(found, wanted, plain)


@pytest.mark.quick
def test_what_is_not_packed():
    """With a mask or a cache, HF uses positions only for the embedding, and so do encoders."""
    ours, theirs, truth = gpt2()
    batch = packed()
    ids, positions = batch["input_ids"], batch["position_ids"]
    for more in ({"attention_mask": torch.ones_like(ids), "use_cache": False}, {"use_cache": True}):
        assert_as_accurate(*(m(ids, position_ids=positions, **more).logits for m in (ours, truth, theirs)))
    assert_as_accurate(*(m(ids, position_ids=positions).last_hidden_state for m in bert()[::2] + bert()[1:2]))


@pytest.mark.quick
@pytest.mark.parametrize("name", ["GPT2LMHeadModel", "GPT2ForTokenClassification", "GPT2ForQuestionAnswering",
                                  "LlamaForCausalLM", "LlamaForTokenClassification"])  # fmt: skip
@pytest.mark.parametrize("train", [False, True])
def test_the_cache_of_the_configuration(name, train):
    """Without use_cache in the call the configuration decides, in training too, as in Hugging Face."""
    config = gpt2()[0].config if name.startswith("GPT2") else llama()[0].config
    config.num_labels, config.classifier_dropout = 2, 0.0
    models = [m.train(train) for m in _models(name, config)]
    batch = packed()
    call = {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"]}
    for use_cache in (None, False):
        found = [m(**call, use_cache=use_cache)[0] for m in models]
        assert_as_accurate(found[0], found[2], found[1])
    together, apart = (models[0](**call, use_cache=use_cache)[0] for use_cache in (None, False))
    assert (together - apart).abs().max() > 1e-3
    assert (together - models[0](**call, use_cache=True)[0]).abs().max() < 1e-4


@pytest.mark.quick
@pytest.mark.parametrize("model", ["stock", "hooked", "hooked, attentions"])
def test_cu_seq_lens_of_an_encoder(model):
    ours, *_ = bert("BertForSequenceClassification")
    batch = packed(return_flash_attn_kwargs=True)
    batch.pop("labels")
    if model != "stock":
        ours.bert.encoder.register_forward_hook(lambda *_: None)
    if model == "hooked, attentions":
        batch["output_attentions"] = True
    out = ours(**batch, output_hidden_states=True)
    for part, ids in zip(out.hidden_states[-1][0].split(LENGTHS), batch["input_ids"][0].split(LENGTHS)):
        torch.testing.assert_close(part, ours.bert(ids[None]).last_hidden_state[0])
    first = ours(batch["input_ids"][:, : LENGTHS[0]]).logits
    torch.testing.assert_close(ours(**batch).logits, first)
    with pytest.raises(ValueError, match="cu_seq_lens_q: wanted"):
        ours(**{**batch, "cu_seq_lens_q": batch["cu_seq_lens_q"][:-1]})


# ---- padding -----------------------------------------------------------------------------------------
@pytest.mark.quick
@pytest.mark.parametrize("side", ["right", "left"])
def test_compute_padding(side):
    ids = torch.randint(3, 96, (3, 7), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    mask = mask if side == "left" else mask.flip(1)
    for ours, theirs, truth in (bert(), gpt2()):
        zeros = ours(ids, attention_mask=mask)[0]
        assert not zeros[:, 1:][mask[:, 1:] == 0].any()  # the first position is pooled
        with transformer_fast.compute_padding(True):
            found = ours(ids, attention_mask=mask)[0]
            with transformer_fast.compute_padding(False):
                assert torch.equal(ours(ids, attention_mask=mask)[0], zeros)
        assert_as_accurate(found, truth(ids, attention_mask=mask)[0], theirs(ids, attention_mask=mask)[0])
        assert torch.equal(ours(ids, attention_mask=mask)[0], zeros)
    transformer_fast.compute_padding(True)
    try:
        assert ours(ids, attention_mask=mask)[0][mask == 0].any()
    finally:
        transformer_fast.compute_padding(False)
    with pytest.raises(TypeError, match="on: wanted True or False"):
        transformer_fast.compute_padding("yes")


@pytest.mark.quick
def test_compile_of_a_padded_batch_in_one_graph():
    ours, theirs, truth = bert("BertForMaskedLM")
    ids = torch.randint(3, 96, (2, 6))
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1] * 6])
    call = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
    found, wanted, plain = (m(**call) for m in (torch.compile(ours, backend="eager", fullgraph=True), truth, theirs))
    assert_as_accurate(found.loss.view(1), wanted.loss.view(1), plain.loss.view(1))
    at = mask.bool()
    assert_as_accurate(found.logits[at], wanted.logits[at], plain.logits[at])
    if COMPILER_SEES_MODULES:  # else HF's own forward is compiled, which computes padding
        assert not found.logits[~at].any()


# ---- returned states have gradients --------------------------------------------------------------------
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("make", [bert, gpt2])
def test_gradients_reach_returned_states(make, masked):
    ids = torch.randint(3, 96, (2, 6), generator=torch.Generator().manual_seed(3))
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1] * 6]) if masked else None
    results = []
    for model, chosen in zip(make(), ("sdpa", "eager", "eager")):
        model.config._attn_implementation = chosen
        for module in model.modules():
            if hasattr(module, "config"):
                module.config._attn_implementation = chosen
        out = model(ids, attention_mask=mask, output_hidden_states=True, output_attentions=True)
        out[0][:, 0, :20].square().sum().backward(inputs=[*out.hidden_states, *out.attentions])
        at = (mask if masked else torch.ones_like(ids)).bool()
        pairs = at[:, None, :, None] & at[:, None, None, :]
        results.append(
            [h.grad[at] for h in out.hidden_states[:-1]]
            + [(a.grad * pairs) for a in out.attentions[:-1]]
            + [a.detach() * pairs for a in out.attentions]
        )
    for found, plain, wanted in zip(*results):
        assert_as_accurate(found, wanted, plain, GRADIENT)
