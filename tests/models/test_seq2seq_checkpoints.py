"""Checkpoints of encoder-decoders load in Hugging Face and in this package bit for bit."""

import copy
import json

import pytest
import torch
import transformers
from numerics import assert_as_accurate
from seq2seq_cases import CASES, GENERATORS, VARIANTS, VOCABULARY, make_inputs, make_labels, real_parts, seq2seq_config

import transformer_fast


def same_weights(a, b) -> None:
    a, b = a.state_dict(), b.state_dict()
    assert a.keys() == b.keys()
    assert all(torch.equal(a[k], b[k]) for k in a)


def class_name(variant: str, head: str) -> str:
    return VARIANTS[variant][0] + head


def perturbed(model):
    with torch.no_grad():
        for p in (p for p in model.parameters() if p.requires_grad):  # Marian's fixed positions are not saved
            p.add_(torch.randn_like(p) * 0.05)
    return model.eval()


@pytest.mark.quick
@pytest.mark.parametrize("variant, head", CASES)
def test_from_hugging_face_and_back(variant, head, tmp_path):
    name = class_name(variant, head)
    changes = {"num_labels": 2} if head == "ForQuestionAnswering" else {}
    theirs = perturbed(getattr(transformers, name)(seq2seq_config(variant, **changes)))
    if hasattr(theirs, "final_logits_bias"):
        theirs.final_logits_bias.normal_()
    theirs.save_pretrained(tmp_path / "theirs")
    ours, info = getattr(transformer_fast, name).from_pretrained(tmp_path / "theirs", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not ours.training
    same_weights(ours, theirs)
    call = make_inputs(head, "right")
    call |= make_labels(head, call)
    with torch.no_grad():  # the weight layout of the fused ops must not change what is saved
        a, b = (real_parts(m(**call), call) for m in (ours, theirs))
    assert a.keys() == b.keys()
    ours.save_pretrained(tmp_path / "ours")
    back = getattr(transformers, name).from_pretrained(tmp_path / "ours")
    assert type(back) is getattr(transformers, name)
    same_weights(back, theirs)


@pytest.mark.parametrize("family, name", [("T5 v1.1", "T5ForConditionalGeneration"), ("Marian", "MarianMTModel")])
def test_an_untied_head(family, name, tmp_path):
    """A checkpoint with an untied head, such as T5 v1.1's, keeps its weights."""
    theirs = perturbed(getattr(transformers, name)(seq2seq_config(family)))
    theirs.save_pretrained(tmp_path)
    state = {k: v.clone() for k, v in theirs.state_dict().items()}
    state["lm_head.weight"] = torch.randn_like(state["lm_head.weight"])
    (tmp_path / "model.safetensors").unlink()
    torch.save(state, tmp_path / "pytorch_model.bin")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    ours, again = (getattr(m, name).from_pretrained(tmp_path) for m in (transformer_fast, transformers))
    same_weights(ours, again)
    assert torch.equal(ours.lm_head.weight, state["lm_head.weight"])
    call = make_inputs("ForConditionalGeneration", "right")
    truth = getattr(transformers, name).from_pretrained(tmp_path, dtype=torch.float64, attn_implementation="eager")
    with torch.no_grad():
        parts = [m(**call).logits for m in (ours, truth, again)]
    assert_as_accurate(*parts)


@pytest.mark.parametrize("name", ["MarianModel", "MarianMTModel"])
def test_separate_vocabularies(name, tmp_path):
    config = seq2seq_config(
        "Marian", share_encoder_decoder_embeddings=False, decoder_vocab_size=71, tie_word_embeddings=False
    )
    theirs = perturbed(getattr(transformers, name)(config))
    theirs.save_pretrained(tmp_path)
    ours = getattr(transformer_fast, name).from_pretrained(tmp_path)
    truth = getattr(transformers, name).from_pretrained(tmp_path, dtype=torch.float64, attn_implementation="eager")
    same_weights(ours, theirs)
    call = make_inputs("Model", "left")
    call["decoder_input_ids"] %= 71
    with torch.no_grad():
        assert_as_accurate(*(m(**call)[0] for m in (ours, truth, theirs)))
    if name == "MarianMTModel":
        assert ours(**call).logits.shape[-1] == 71
        for model in (ours, theirs):
            model.resize_decoder_token_embeddings(80)
        assert ours(**call).logits.shape[-1] == theirs(**call).logits.shape[-1] == 80


@pytest.mark.parametrize("variant, head", GENERATORS)
def test_vocabularies_grow(variant, head):
    model = getattr(transformer_fast, class_name(variant, head))(seq2seq_config(variant)).eval()
    call = make_inputs("ForConditionalGeneration", "right")
    before, truth = model(**call).logits, copy.deepcopy(model).double()(**call).logits
    model.resize_token_embeddings(VOCABULARY + 6, mean_resizing=False)
    after = model(**call).logits
    assert after.shape[-1] == VOCABULARY + 6
    assert_as_accurate(after[..., :VOCABULARY], truth, before)


@pytest.mark.quick
@pytest.mark.parametrize(
    "variant, auto, head",
    [
        ("T5", "AutoModel", "Model"),
        ("T5", "AutoModelForSeq2SeqLM", "ForConditionalGeneration"),
        ("T5", "AutoModelForSequenceClassification", "ForSequenceClassification"),
        ("T5", "AutoModelForTokenClassification", "ForTokenClassification"),
        ("T5", "AutoModelForQuestionAnswering", "ForQuestionAnswering"),
        ("Bart", "AutoModel", "Model"),
        ("Bart", "AutoModelForSeq2SeqLM", "ForConditionalGeneration"),
        ("Bart", "AutoModelForPreTraining", "ForConditionalGeneration"),
        ("Bart", "AutoModelForMaskedLM", "ForConditionalGeneration"),
        ("Bart", "AutoModelForSequenceClassification", "ForSequenceClassification"),
        ("Bart", "AutoModelForQuestionAnswering", "ForQuestionAnswering"),
        ("Bart", "AutoModelForCausalLM", "ForCausalLM"),
        ("MT5", "AutoModel", "Model"),
        ("MT5", "AutoModelForSeq2SeqLM", "ForConditionalGeneration"),
        ("MT5", "AutoModelForSequenceClassification", "ForSequenceClassification"),
        ("MT5", "AutoModelForTokenClassification", "ForTokenClassification"),
        ("MT5", "AutoModelForQuestionAnswering", "ForQuestionAnswering"),
        ("UMT5", "AutoModel", "Model"),
        ("UMT5", "AutoModelForSeq2SeqLM", "ForConditionalGeneration"),
        ("UMT5", "AutoModelForSequenceClassification", "ForSequenceClassification"),
        ("UMT5", "AutoModelForTokenClassification", "ForTokenClassification"),
        ("UMT5", "AutoModelForQuestionAnswering", "ForQuestionAnswering"),
        ("Pegasus", "AutoModel", "Model"),
        ("Pegasus", "AutoModelForSeq2SeqLM", "ForConditionalGeneration"),
        ("Pegasus", "AutoModelForCausalLM", "ForCausalLM"),
        ("M2M100", "AutoModel", "Model"),
        ("M2M100", "AutoModelForSeq2SeqLM", "ForConditionalGeneration"),
        ("MBart", "AutoModel", "Model"),
        ("MBart", "AutoModelForSeq2SeqLM", "ForConditionalGeneration"),
        ("MBart", "AutoModelForMaskedLM", "ForConditionalGeneration"),
        ("MBart", "AutoModelForSequenceClassification", "ForSequenceClassification"),
        ("MBart", "AutoModelForQuestionAnswering", "ForQuestionAnswering"),
        ("MBart", "AutoModelForCausalLM", "ForCausalLM"),
        ("Marian", "AutoModel", "Model"),
        ("Marian", "AutoModelForSeq2SeqLM", "MTModel"),
        ("Marian", "AutoModelForCausalLM", "ForCausalLM"),
    ],
)
def test_auto_classes(variant, auto, head):
    model = getattr(transformer_fast, auto).from_config(seq2seq_config(variant))
    assert type(model) is getattr(transformer_fast, variant + head)
    assert isinstance(model, getattr(transformers, variant + head))


@pytest.mark.parametrize("variant, head", [("T5", "ForConditionalGeneration"), ("Bart", "ForSequenceClassification")])
def test_a_head_from_a_base_checkpoint_and_no_other_family(variant, head, tmp_path):
    base = getattr(transformers, f"{variant}Model")(seq2seq_config(variant))
    base.save_pretrained(tmp_path)
    ours = getattr(transformer_fast, variant + head).from_pretrained(tmp_path)
    assert torch.equal(ours.get_encoder().embed_tokens.weight, base.shared.weight)
    with pytest.raises(ValueError, match="wanted a checkpoint with model_type 'marian'"):
        transformer_fast.MarianModel.from_pretrained(tmp_path)


def test_float16_t5_keeps_its_last_projections_in_float32(tmp_path):
    """Like Hugging Face, with residual sums in float32 from there on; the outputs are the same."""
    config = seq2seq_config("T5 v1.1")
    perturbed(transformers.T5ForConditionalGeneration(config)).save_pretrained(tmp_path)
    name = "T5ForConditionalGeneration"
    ours, theirs = (
        getattr(m, name).from_pretrained(tmp_path, dtype=torch.float16) for m in (transformer_fast, transformers)
    )
    truth = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float64)
    truth.load_state_dict(theirs.state_dict())
    assert ours.encoder.block[0].layer[-1].DenseReluDense.wo.weight.dtype == torch.float32
    for kind in ("right", "left"):
        call = make_inputs("ForConditionalGeneration", kind, kind)
        with torch.no_grad():
            a, b, c = (m(**call, output_hidden_states=True) for m in (ours, theirs, truth))
        mask = call["decoder_attention_mask"].bool()
        assert a.logits.dtype == b.logits.dtype
        assert_as_accurate(a.logits[mask], c.logits[mask], b.logits[mask])
        assert [t.dtype for t in a.decoder_hidden_states] == [t.dtype for t in b.decoder_hidden_states]


def test_float16_t5_that_overflows_is_finite():
    """States beyond float16's range are clamped to its largest numbers, as in Hugging Face's model."""
    config = seq2seq_config("T5")
    theirs = transformers.T5Model(config).half().eval()
    with torch.no_grad():
        theirs.encoder.block[0].layer[-1].DenseReluDense.wo.weight.mul_(3e4)
    ours = transformer_fast.T5Model(config).half().eval()
    ours.load_state_dict(theirs.state_dict())
    call = make_inputs("Model", "none")
    with torch.no_grad():
        a, b = (m(**call, output_hidden_states=True) for m in (ours, theirs))
    assert a.encoder_hidden_states[1].abs().max() == b.encoder_hidden_states[1].abs().max() == 64504
    assert a.last_hidden_state.isfinite().all() and b.last_hidden_state.isfinite().all()
