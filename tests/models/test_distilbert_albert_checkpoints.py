"""Checkpoints of the encoders other than BERT load in Hugging Face and in this package bit for bit, and can be
trained."""

import json

import pytest
import torch
import transformers
from encoder_cases import config_for, encoder_config

import transformer_fast

HEADS = ["Model", "ForMaskedLM", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering",
         "ForMultipleChoice"]  # fmt: skip
FAMILIES = ["DistilBert", "Albert", "Roberta", "XLMRoberta", "Camembert", "Electra", "MPNet", "ModernBert", "DebertaV2"]
NAMES = [*(f"{family}{head}" for family in FAMILIES for head in HEADS), "AlbertForPreTraining",
         "ElectraForPreTraining", "ElectraForCausalLM", "RobertaForCausalLM", "XLMRobertaForCausalLM",
         "CamembertForCausalLM"]  # fmt: skip


def same_weights(a, b) -> None:
    a, b = a.state_dict(), b.state_dict()
    assert a.keys() == b.keys()
    assert all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.quick
@pytest.mark.parametrize("name", NAMES)
def test_from_hugging_face_and_back(name, ids, tmp_path):
    theirs = getattr(transformers, name)(config_for(name))
    theirs.save_pretrained(tmp_path / "theirs")
    ours, info = getattr(transformer_fast, name).from_pretrained(tmp_path / "theirs", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not ours.training
    same_weights(ours, theirs)
    with torch.no_grad():
        ours(ids[:, None] if name.endswith("MultipleChoice") else ids)  # copies weights into another layout
    ours.save_pretrained(tmp_path / "ours")
    back = getattr(transformers, name).from_pretrained(tmp_path / "ours")
    same_weights(back, theirs)
    assert (tmp_path / "ours" / "config.json").read_text() == (tmp_path / "theirs" / "config.json").read_text()


@pytest.mark.parametrize("family", FAMILIES)
def test_new_heads_sizes_and_dtypes(family, ids, tmp_path):
    base = getattr(transformers, f"{family}Model")(encoder_config(family))
    base.save_pretrained(tmp_path)
    classes = getattr(transformer_fast, f"{family}ForSequenceClassification")
    model, info = classes.from_pretrained(tmp_path, num_labels=7, dtype=torch.bfloat16, output_loading_info=True)
    assert model.dtype == torch.bfloat16 and model(ids).logits.shape == (12, 7)
    assert info["missing_keys"] and all(
        "classifier" in key or key.startswith(("head.", "pooler.")) for key in info["missing_keys"]
    )
    model.save_pretrained(tmp_path / "seven")
    with pytest.raises(ValueError, match=r"classifier.* is \(7,.*wanted \(2"):
        classes.from_pretrained(tmp_path / "seven", num_labels=2)
    other = classes.from_pretrained(tmp_path / "seven", num_labels=2, ignore_mismatched_sizes=True)
    assert other(ids).logits.shape == (12, 2)
    embeddings = [m.get_input_embeddings().weight for m in (other.base_model, base)]
    assert torch.equal(embeddings[0].bfloat16(), embeddings[1].bfloat16())


@pytest.mark.parametrize(
    "family, changes",
    [("DistilBert", {"n_layers": 3}), ("Albert", {"num_hidden_groups": 3}), ("DistilBert", {"hidden_dim": 96}),
     ("Albert", {"intermediate_size": 96}), ("Electra", {"num_hidden_layers": 3}),
     ("MPNet", {"relative_attention_num_buckets": 40}), ("ModernBert", {"norm_bias": True}),
     ("DebertaV2", {"share_att_key": False})],
    ids=str,
)  # fmt: skip
def test_a_configuration_that_asks_for_other_weights(family, changes, tmp_path):
    getattr(transformers, f"{family}Model")(encoder_config(family)).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    missing = bool({"n_layers", "num_hidden_layers", "num_hidden_groups", "norm_bias", "share_att_key"} & set(changes))
    with pytest.raises(ValueError, match="lacks .* weights" if missing else "shapes in the checkpoint differ"):
        getattr(transformer_fast, f"{family}Model").from_pretrained(tmp_path)


def test_an_unknown_activation(tmp_path):
    transformers.DistilBertModel(encoder_config("DistilBert")).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"activation": "nope"}))
    with pytest.raises(ValueError, match="activation 'nope' is unknown"):
        transformer_fast.DistilBertModel.from_pretrained(tmp_path)


@pytest.mark.quick
@pytest.mark.parametrize("family", FAMILIES)
def test_auto_classes(family, tmp_path):
    getattr(transformers, f"{family}ForMaskedLM")(encoder_config(family, num_labels=2)).save_pretrained(tmp_path)
    for head in HEADS:
        auto = f"AutoModel{head}".replace("ModelModel", "Model")
        model = getattr(transformer_fast, auto).from_pretrained(tmp_path)
        assert type(model) is getattr(transformer_fast, f"{family}{head}")
        assert isinstance(model, getattr(transformers, f"{family}{head}"))


@pytest.mark.parametrize("family", FAMILIES)
def test_resized_embeddings(family, pair, ids, tmp_path):
    name = f"{family}ForMaskedLM"
    ours, theirs, _ = pair(name, encoder_config(family))
    for model in (ours, theirs):
        torch.manual_seed(5)
        model.resize_token_embeddings(120, mean_resizing=False)
    same_weights(ours, theirs)
    assert ours(ids + 20).logits.shape[-1] == 120
    ours.save_pretrained(tmp_path)
    same_weights(getattr(transformers, name).from_pretrained(tmp_path), ours)


@pytest.mark.parametrize("family", ["DistilBert", "Albert", "MPNet"])
def test_trainer(family, pair, tmp_path):
    """Three steps of HF's Trainer have the same result as with HF's model."""
    from transformers import Trainer, TrainingArguments

    ours, theirs, _ = pair(f"{family}ForTokenClassification", encoder_config(family))
    data = []
    for i, length in enumerate((5, 12, 3, 9, 7, 12)):
        row = torch.zeros(12, dtype=torch.long)
        row[:length] = torch.randint(1, 90, (length,))
        labels = torch.where(row > 0, (row + i) % 4, -100)
        data.append({"input_ids": row, "attention_mask": (row > 0).long(), "labels": labels, "unused": "text"})
    losses = []
    for name, model in (("ours", ours), ("theirs", theirs)):
        arguments = TrainingArguments(
            str(tmp_path / name), max_steps=3, per_device_train_batch_size=2, learning_rate=1e-3, report_to=[],
            save_strategy="no", logging_steps=1, seed=3, use_cpu=True, disable_tqdm=True,
        )  # fmt: skip
        trainer = Trainer(model, arguments, train_dataset=data)
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert len(losses[0]) == 3 and losses[0] == pytest.approx(losses[1], rel=1e-3)
