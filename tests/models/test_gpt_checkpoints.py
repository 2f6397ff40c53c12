"""GPT and GPT-2 checkpoints load in Hugging Face and in this package bit for bit."""

import json

import pytest
import torch
import transformers

import transformer_fast

NAMES = [
    "GPT2Model", "GPT2LMHeadModel", "GPT2DoubleHeadsModel", "GPT2ForSequenceClassification",
    "GPT2ForTokenClassification", "GPT2ForQuestionAnswering", "OpenAIGPTModel", "OpenAIGPTLMHeadModel",
    "OpenAIGPTDoubleHeadsModel", "OpenAIGPTForSequenceClassification",
]  # fmt: skip
AUTO = {
    "AutoModel": ("GPT2Model", "OpenAIGPTModel"),
    "AutoModelForCausalLM": ("GPT2LMHeadModel", "OpenAIGPTLMHeadModel"),
    "AutoModelForPreTraining": ("GPT2LMHeadModel", "OpenAIGPTLMHeadModel"),
    "AutoModelForSequenceClassification": ("GPT2ForSequenceClassification", "OpenAIGPTForSequenceClassification"),
    "AutoModelForTokenClassification": ("GPT2ForTokenClassification", None),
    "AutoModelForQuestionAnswering": ("GPT2ForQuestionAnswering", None),
}


def config_for(name: str, **changes):
    values = {"vocab_size": 61, "n_positions": 19, "n_embd": 27, "n_layer": 2, "n_head": 3, "pad_token_id": 0}
    values |= {"bos_token_id": 1, "eos_token_id": 2, "num_labels": 5 if "Classification" in name else 2}
    kind = transformers.GPT2Config if name.startswith("GPT2") else transformers.OpenAIGPTConfig
    return kind(**(values | changes))


def same_weights(a, b) -> None:
    a, b = a.state_dict(), b.state_dict()
    assert a.keys() == b.keys()
    assert all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.quick
@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": False}], ids=["tied", "untied"])
@pytest.mark.parametrize("name", NAMES)
def test_from_hugging_face_and_back(name, changes, tmp_path):
    config = config_for(name, **changes)
    if name == "GPT2LMHeadModel":
        config.add_cross_attention = True
    theirs = getattr(transformers, name)(config)
    theirs.save_pretrained(tmp_path / "theirs")
    ours, info = getattr(transformer_fast, name).from_pretrained(tmp_path / "theirs", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not ours.training
    same_weights(ours, theirs)
    ids = torch.randint(3, 61, (3, 7))
    with torch.no_grad():
        ours(ids[:1] if "Sequence" in name else ids)  # the fused ops must not change what is saved
    ours.save_pretrained(tmp_path / "ours")
    back = getattr(transformers, name).from_pretrained(tmp_path / "ours")
    assert type(back) is getattr(transformers, name)
    same_weights(back, theirs)
    kinds = [json.loads((tmp_path / folder / "config.json").read_text()) for folder in ("ours", "theirs")]
    assert kinds[0]["model_type"] == kinds[1]["model_type"]
    tied = ours.get_output_embeddings() is not None and "tie_word_embeddings" not in changes
    if tied:
        assert ours.get_output_embeddings().weight is ours.get_input_embeddings().weight


@pytest.mark.parametrize("auto", AUTO)
def test_auto_names(auto, tmp_path):
    for base, expected in zip(("GPT2Model", "OpenAIGPTModel"), AUTO[auto]):
        getattr(transformers, base)(config_for(base)).save_pretrained(tmp_path / base)
        cls = getattr(transformer_fast, auto)
        if expected is None:
            with pytest.raises(ValueError, match=f"{auto}: neither .* has a class for model_type 'openai-gpt'"):
                cls.from_pretrained(tmp_path / base)
        else:
            assert type(cls.from_pretrained(tmp_path / base)) is getattr(transformer_fast, expected)


def test_a_body_that_is_not_all_there_is_refused(tmp_path):
    model = transformers.GPT2LMHeadModel(config_for("GPT2LMHeadModel", n_layer=1))
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"n_layer": 2}))
    with pytest.raises(ValueError, match="the checkpoint lacks 12 weights that config.json asks for: transformer.h.1"):
        transformer_fast.GPT2LMHeadModel.from_pretrained(tmp_path)


def test_an_unknown_activation_is_named(tmp_path):
    transformers.GPT2Model(config_for("GPT2Model")).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"activation_function": "sine"}))
    with pytest.raises(ValueError, match="activation_function 'sine' is unknown"):
        transformer_fast.GPT2Model.from_pretrained(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_dtype_and_number_of_labels(dtype, tmp_path):
    transformers.GPT2Model(config_for("GPT2Model")).save_pretrained(tmp_path)
    model = transformer_fast.GPT2ForSequenceClassification.from_pretrained(tmp_path, num_labels=7, dtype=dtype)
    assert model.score.weight.shape == (7, 27) and model.dtype == dtype
