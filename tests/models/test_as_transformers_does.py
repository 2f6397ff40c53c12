"""Details that users of transformers rely on: accepted arguments, errors, the results of a seed."""

import copy

import peft
import pytest
import torch
import transformers
from numerics import assert_as_accurate

import transformer_fast
from transformer_fast.models._stock import why_hf_forward, why_hf_loop

SPECIAL = {"vocab_size": 97, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
BART = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4,
        "decoder_attention_heads": 4, "encoder_ffn_dim": 40, "decoder_ffn_dim": 40, "max_position_embeddings": 40,
        "decoder_start_token_id": 2} | SPECIAL  # fmt: skip


def bert(**changes):
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 40} | SPECIAL
    return transformers.BertConfig(**sizes | changes)


def gpt2(**changes):
    return transformers.GPT2Config(**{"n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 40} | SPECIAL | changes)


def t5(**changes):
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 40, "num_layers": 1, "num_heads": 4, "decoder_start_token_id": 0}
    return transformers.T5Config(**sizes | SPECIAL | changes)


def pair(name: str, config, dtype=torch.float64):
    torch.manual_seed(0)
    theirs = getattr(transformers, name)(config).to(dtype).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(torch.randn_like(p) * 0.2)
    ours = getattr(transformer_fast, name)(copy.deepcopy(config)).to(dtype).eval()
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def ids(rows: int = 3, length: int = 7) -> torch.Tensor:
    return torch.randint(3, 96, (rows, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    "name, config",
    [
        ("BertLMHeadModel", bert(is_decoder=True)),
        ("BartForCausalLM", transformers.BartConfig(**BART)),
        ("MarianForCausalLM", transformers.MarianConfig(**BART)),
        ("GPT2DoubleHeadsModel", gpt2()),
    ],
)
@pytest.mark.parametrize("options", [{}, {"use_cache": False}, {"num_beams": 2}], ids=str)
def test_prompts_whose_last_position_is_masked(name, config, options):
    mask = torch.ones(3, 7, dtype=torch.long)
    mask[1, -2:] = 0
    mask[2, :2] = 0
    call = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": -1, "pad_token_id": 0, **options}
    a, b = (m.generate(ids(), attention_mask=mask, **call) for m in pair(name, config))
    assert torch.equal(a, b)


@pytest.mark.quick
@pytest.mark.parametrize("kind, config", [
    ("BertForMaskedLM", bert()), ("GPT2LMHeadModel", gpt2()), ("T5ForConditionalGeneration", t5()),
    ("BartForConditionalGeneration", transformers.BartConfig(**BART)),
])  # fmt: skip
def test_one_seed_gives_the_weights_of_transformers(kind, config):
    states = []
    for library in (transformers, transformer_fast):
        torch.manual_seed(3)
        states.append(getattr(library, kind)(copy.deepcopy(config)).state_dict())
    assert all(torch.equal(states[0][name], t) for name, t in states[1].items())


@pytest.mark.quick
@pytest.mark.parametrize("name, config", [
    ("BertModel", bert(num_hidden_layers=0)), ("GPT2LMHeadModel", gpt2(n_layer=0)),
    ("T5ForConditionalGeneration", t5(num_layers=0)),
    ("BartForConditionalGeneration", transformers.BartConfig(**BART | {"encoder_layers": 0, "decoder_layers": 0})),
])  # fmt: skip
def test_no_layers(name, config):
    ours, theirs = pair(name, config)
    more = {"decoder_input_ids": ids()} if config.is_encoder_decoder else {}
    torch.testing.assert_close(ours(ids(), **more)[0], theirs(ids(), **more)[0])
    if name != "BertModel":
        a, b = (m.generate(ids(), max_new_tokens=2, do_sample=False) for m in (ours, theirs))
        assert torch.equal(a, b)


@pytest.mark.quick
@pytest.mark.parametrize("shape", [(1, 7), (1, 1, 7), (3, 1, 7), (1, 7, 7), (1, 1, 1, 7), (3, 1, 7, 7)], ids=str)
def test_masks_that_broadcast(shape):
    ours, theirs = pair("BertModel", bert())
    mask = torch.ones(shape, dtype=torch.long)
    mask[..., 5:] = 0
    full = torch.ones(3, 1, 7, 7, dtype=torch.bool)
    full[..., 5:] = False
    found = ours(ids(), attention_mask=mask).last_hidden_state[:, :5]
    torch.testing.assert_close(found, theirs(ids(), attention_mask=full).last_hidden_state[:, :5])


@pytest.mark.quick
def test_masks_with_one_row_of_decoders():
    """Also beside a cache, which a decoder makes without being asked."""
    ours, theirs = pair("GPT2LMHeadModel", gpt2())
    mask = torch.ones(1, 7, dtype=torch.long)
    mask[:, :2] = 0
    for more in ({}, {"use_cache": False}):
        found = ours(ids(), attention_mask=mask, **more).logits[:, 2:]
        torch.testing.assert_close(found, theirs(ids(), attention_mask=mask.expand(3, 7), **more).logits[:, 2:])


@pytest.mark.quick
def test_labels_that_are_flat():
    calls = {"BertForMaskedLM": bert(), "BertForTokenClassification": bert(num_labels=97)}
    for name, config in calls.items():
        ours, theirs = pair(name, config)
        mask = torch.ones_like(ids())
        mask[1, 4:] = 0
        a, b = (m(ids(), attention_mask=mask, labels=ids().flatten()).loss for m in (ours, theirs))
        torch.testing.assert_close(a, b)


@pytest.mark.quick
def test_prefill_in_chunks_of_an_encoder_decoder():
    ours, theirs = pair("T5ForConditionalGeneration", t5())
    call = {"decoder_input_ids": ids(), "max_new_tokens": 3, "do_sample": False, "prefill_chunk_size": 2}
    assert torch.equal(ours.generate(ids(), **call), theirs.generate(ids(), **call))


@pytest.mark.quick
def test_checkpoints_that_lack_weights(tmp_path, caplog):
    transformers.GPT2LMHeadModel(gpt2()).save_pretrained(tmp_path)
    model = transformer_fast.GPT2LMHeadModel.from_pretrained(tmp_path, add_cross_attention=True)
    assert model.transformer.h[0].ln_cross_attn.weight.eq(1).all()
    with pytest.raises(ValueError, match="lacks"):
        transformer_fast.GPT2LMHeadModel.from_pretrained(tmp_path, n_layer=2)
    _, info = transformer_fast.GPT2LMHeadModel.from_pretrained(tmp_path, n_layer=2, output_loading_info=True)
    assert any("h.1." in key for key in info["missing_keys"])
    for kind in (ValueError, RuntimeError):  # ours, and that of transformers
        with pytest.raises(kind, match="shapes in the checkpoint differ"):
            transformer_fast.GPT2LMHeadModel.from_pretrained(tmp_path, n_positions=50)
    transformers.MarianMTModel(transformers.MarianConfig(**BART)).save_pretrained(tmp_path / "marian")
    marian = transformer_fast.MarianModel.from_pretrained(tmp_path / "marian")  # its sinusoids are not saved
    wanted = transformers.MarianModel.from_pretrained(tmp_path / "marian")
    assert torch.equal(marian.encoder.embed_positions.weight, wanted.encoder.embed_positions.weight)


@pytest.mark.quick
def test_attributes():
    model = transformer_fast.T5Model(t5())
    norm = model.encoder.final_layer_norm
    norm.eps = 0.5
    assert norm.variance_epsilon == 0.5
    config = transformers.AlbertConfig(embedding_size=16, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                                       intermediate_size=40, **SPECIAL)  # fmt: skip
    config.gradient_checkpointing = True
    for name in ("AlbertModel", "AlbertForMaskedLM"):
        assert getattr(transformer_fast, name)(copy.deepcopy(config)).is_gradient_checkpointing or name == "AlbertModel"


# ---- PEFT --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name, config", [("GPT2LMHeadModel", gpt2()), ("T5ForConditionalGeneration", t5())])
@pytest.mark.parametrize("kind", ["prompt", "prefix", "p-tuning", "embeddings", "tokens"])
def test_peft(name, config, kind):
    """Soft prompts, prefixes and adapters on embeddings apply at every step."""
    task = "CAUSAL_LM" if name == "GPT2LMHeadModel" else "SEQ_2_SEQ_LM"
    linear, table = ("c_attn", "wte") if name == "GPT2LMHeadModel" else ("q", "shared")
    fan = {"fan_in_fan_out": name == "GPT2LMHeadModel"}
    options = {
        "prompt": peft.PromptTuningConfig(task_type=task, num_virtual_tokens=3),
        "prefix": peft.PrefixTuningConfig(task_type=task, num_virtual_tokens=3),
        "p-tuning": peft.PromptEncoderConfig(task_type=task, num_virtual_tokens=3, encoder_hidden_size=16),
        "embeddings": peft.LoraConfig(task_type=task, r=4, target_modules=[linear, table], **fan),
        "tokens": peft.LoraConfig(task_type=task, target_modules=[linear], trainable_token_indices={table: [3]}, **fan),
    }[kind]
    tokens, scores = [], []
    for model in pair(name, config):
        torch.manual_seed(4)
        tuned = peft.get_peft_model(model, copy.deepcopy(options)).double().eval()
        with torch.no_grad():
            for n, p in tuned.named_parameters():
                if p.requires_grad:
                    p.normal_(generator=torch.Generator().manual_seed(len(n)))
        more = {"decoder_input_ids": ids()[:, :3]} if config.is_encoder_decoder else {}
        scores.append(tuned(input_ids=ids(), attention_mask=torch.ones_like(ids()), **more).logits)
        call = {"input_ids": ids(), "attention_mask": torch.ones_like(ids()), "do_sample": False}
        tokens.append(tuned.generate(**call, max_new_tokens=5, eos_token_id=-1, pad_token_id=0))
    if name == "GPT2LMHeadModel":  # HF's T5 norms are float32 in a float64 model
        torch.testing.assert_close(*scores)
    assert torch.equal(*tokens)


@pytest.mark.quick
def test_lora_on_linear_layers_stays_fast():
    ours, theirs = pair("GPT2LMHeadModel", gpt2(), torch.float32)
    truth = copy.deepcopy(theirs).double()
    mask = torch.ones_like(ids())
    mask[1, 4:] = 0
    out = []
    for model in (ours, truth, theirs):
        torch.manual_seed(5)
        tuned = peft.get_peft_model(model, peft.LoraConfig(
            r=4, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True, init_lora_weights=False, task_type="CAUSAL_LM",
        ))  # fmt: skip
        with torch.no_grad():
            for n, p in tuned.named_parameters():
                if "lora" in n:
                    p.normal_(generator=torch.Generator().manual_seed(len(n)))
        out.append(tuned.eval()(input_ids=ids(), attention_mask=mask).logits[mask.bool()])
        if model is ours:
            assert (
                not why_hf_forward(model)
                and not why_hf_loop(model)
                and "the fast path" in transformer_fast.explain(tuned)
            )
            tuned.prepare_inputs_for_generation = tuned.prepare_inputs_for_generation
            ours.prepare_inputs_for_generation = tuned.prepare_inputs_for_generation  # as PEFT's generate does
            assert not why_hf_loop(ours)
            tuned.base_model.model.transformer.h[0].attn.c_attn.lora_A["default"].register_forward_hook(lambda *_: None)
            assert "c_attn" in why_hf_forward(ours)
    assert_as_accurate(*out)


@pytest.mark.quick
def test_explain():
    model = transformer_fast.BertForSequenceClassification(bert())
    assert model.explain() == "BertForSequenceClassification\n  forward: the fast path\n  bert: the fast path"
    model.dropout = torch.nn.Identity()
    lines = transformer_fast.explain(model).splitlines()
    assert "as dropout is a torch Identity in place of a Dropout" in lines[1] and lines[2] == "  bert: the fast path"
    gpt = transformer_fast.GPT2LMHeadModel(gpt2())
    assert "generate: this package's engine" in gpt.explain()
    gpt.prepare_inputs_for_generation = lambda *a, **k: None
    assert "generate: transformers' own loop, as GPT2LMHeadModel has a prepare_inputs_for_generation" in gpt.explain()
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 40}
    other = transformers.ErnieModel(transformers.ErnieConfig(**sizes | SPECIAL))
    transformer_fast.accelerate(other, verbose=False)
    text = transformer_fast.explain(other)
    assert "attention: ours" in text and "embeddings.LayerNorm: layer_norm" in text
    with pytest.raises(ValueError, match="there is no op"):
        transformer_fast.explain("no such op")


def test_gpt_neo_adds_causality_and_windows_to_masks_of_four_dimensions():
    sizes = {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "intermediate_size": 40, "window_size": 3}
    config = transformers.GPTNeoConfig(**SPECIAL | sizes, attention_types=[[["global", "local"], 1]])
    mask = torch.zeros(3, 1, 7, 7, dtype=torch.float64)
    mask[1, ..., :2] = -1e4
    for name in ("GPTNeoForCausalLM", "GPTNeoForSequenceClassification"):
        ours, theirs = pair(name, config)
        a, b = (model(ids(), attention_mask=mask).logits for model in (ours, theirs))
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name, config", [("BertModel", bert()), ("GPT2LMHeadModel", gpt2())])
def test_indices_out_of_range_are_index_errors(name, config):
    ours, theirs = pair(name, config)
    for given in (ids().fill_(97), ids().fill_(-1)):
        for model in (ours, theirs):
            with pytest.raises(IndexError):
                model(given)
    with pytest.raises(IndexError, match="max_position_embeddings|n_positions"):
        ours(ids(1, 600))


@pytest.mark.parametrize("name", ["BertModel", "BertForSequenceClassification"])
def test_results_from_the_first_position_give_the_last_state_a_gradient(name):
    gradients = []
    for model in pair(name, bert()):
        out = model(ids(), output_hidden_states="For" in name)
        state, result = (out.hidden_states[-1], out.logits) if "For" in name else out[:2]
        gradients.append(torch.autograd.grad(result.sum(), state)[0])
    torch.testing.assert_close(*gradients)


def test_masks_with_more_columns_than_positions():
    """transformers ignores such a mask if it has no zeros; its classifier-free guidance passes them to encoders."""
    long = torch.ones(3, 9, dtype=torch.long)
    for name, config in (
        ("BertForMaskedLM", bert()),
        ("BartForConditionalGeneration", transformers.BartConfig(**BART)),
    ):
        ours, theirs = pair(name, config)
        torch.testing.assert_close(*(model(ids(), attention_mask=long).logits for model in (ours, theirs)))
    call = {"attention_mask": long[:, :7], "guidance_scale": 1.5, "max_new_tokens": 4, "do_sample": False}
    assert torch.equal(*(model.generate(ids(), **call) for model in (ours, theirs)))
    long[1, 4:] = 0
    with pytest.raises(ValueError, match="attention_mask: wanted shape"):
        ours(ids(), attention_mask=long)
