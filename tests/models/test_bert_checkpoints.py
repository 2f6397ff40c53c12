"""Checkpoints load in Hugging Face and in this package bit for bit; errors name broken files."""

import copy
import io
import json
import os
import pickle

import pytest
import torch
import transformers
from numerics import assert_as_accurate

import transformer_fast

NAMES = ["BertModel", "BertForMaskedLM", "BertForPreTraining", "BertForSequenceClassification", "BertLMHeadModel"]


def same_weights(a, b) -> None:
    a, b = a.state_dict(), b.state_dict()
    assert a.keys() == b.keys()
    assert all(torch.equal(a[k], b[k]) for k in a)


def save(model, folder, form: str) -> None:
    if form == "pytorch_model.bin":
        model.config.save_pretrained(folder)
        torch.save(model.state_dict(), folder / form)
    else:
        model.save_pretrained(folder, max_shard_size="40KB" if form == "shards" else "1GB")
        assert len(list(folder.glob("*.safetensors"))) > (form == "shards")


@pytest.mark.quick
@pytest.mark.parametrize("form", ["model.safetensors", "shards", "pytorch_model.bin"])
@pytest.mark.parametrize("name", NAMES)
def test_from_hugging_face_and_back(name, form, bert_config, ids, tmp_path):
    theirs = getattr(transformers, name)(bert_config(is_decoder=name == "BertLMHeadModel"))
    save(theirs, tmp_path / "theirs", form)
    ours, info = getattr(transformer_fast, name).from_pretrained(tmp_path / "theirs", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not ours.training
    same_weights(ours, theirs)
    with torch.no_grad():
        ours(ids)  # the weight layout of the fused ops must not change what is saved
    save(ours, tmp_path / "ours", form)
    back = getattr(transformers, name).from_pretrained(tmp_path / "ours")
    assert type(back) is getattr(transformers, name)
    same_weights(back, theirs)
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["model_type"] == "bert"


def test_a_head_from_a_base_checkpoint(bert_config, tmp_path):
    base = transformers.BertModel(bert_config())
    base.save_pretrained(tmp_path)
    ours, info = transformer_fast.BertForTokenClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert set(info["missing_keys"]) == {"classifier.weight", "classifier.bias"}
    same_weights(ours.bert.encoder, base.encoder)
    back = transformer_fast.BertModel.from_pretrained(tmp_path, add_pooling_layer=False)
    assert back.pooler is None


def test_dtype_copies_and_pickles(bert_config, ids, tmp_path):
    transformers.BertModel(bert_config()).save_pretrained(tmp_path)
    model = transformer_fast.BertModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16 and model(ids)[0].dtype == torch.bfloat16
    model = model.float()
    before = model(ids)[0]
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(other) is transformer_fast.BertModel
        same_weights(other, model)
        assert torch.equal(other(ids)[0], before)
        with torch.no_grad():  # a copy shares no memory
            for parameter in other.parameters():
                parameter.zero_()
        assert torch.equal(model(ids)[0], before)
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    fresh = transformer_fast.BertModel(model.config).eval()
    assert not torch.equal(fresh(ids)[0], before)
    fresh.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(fresh(ids)[0], before)


def test_weights_changed_in_place_are_used(bert_config, ids):
    """Nothing computed from old values of the weights is used after a change."""
    model = transformer_fast.BertModel(bert_config()).eval()
    with torch.no_grad():
        before = model(ids)[0]
        query = model.encoder.layer[0].attention.self.query
        query.weight.mul_(4)  # a power of two: dividing again gives the same bits
        changed = model(ids)[0]
        query.weight.div_(4)
        query.weight.data = query.weight.data.clone()
        assert not torch.equal(before, changed)
        assert_as_accurate(model(ids)[0], copy.deepcopy(model).double()(ids)[0], before)


@pytest.mark.quick
def test_auto_classes(bert_config, tmp_path):
    transformers.BertForPreTraining(bert_config()).save_pretrained(tmp_path)
    for auto, name in {
        "AutoModel": "BertModel",
        "AutoModelForPreTraining": "BertForPreTraining",
        "AutoModelForMaskedLM": "BertForMaskedLM",
        "AutoModelForCausalLM": "BertLMHeadModel",
        "AutoModelForNextSentencePrediction": "BertForNextSentencePrediction",
        "AutoModelForSequenceClassification": "BertForSequenceClassification",
        "AutoModelForTokenClassification": "BertForTokenClassification",
        "AutoModelForQuestionAnswering": "BertForQuestionAnswering",
        "AutoModelForMultipleChoice": "BertForMultipleChoice",
    }.items():
        model = getattr(transformer_fast, auto).from_pretrained(tmp_path)
        assert type(model) is getattr(transformer_fast, name)
        assert isinstance(model, getattr(transformers, name))
        assert type(getattr(transformer_fast, auto).from_config(bert_config())) is type(model)


@pytest.fixture
def checkpoint(bert_config, tmp_path):
    """A valid checkpoint folder; change(**values) edits its config.json."""
    transformers.BertModel(bert_config()).save_pretrained(tmp_path)

    def change(**values):
        file = tmp_path / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | values))

    change.folder = tmp_path
    return change


def load(folder, **kwargs):
    return transformer_fast.BertModel.from_pretrained(folder, **kwargs)


class TestBrokenCheckpoints:
    def test_no_folder(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="there is no folder"):
            load(tmp_path / "nowhere" / "at" / "all")

    def test_no_config(self, checkpoint):
        os.remove(checkpoint.folder / "config.json")
        for auto in (transformer_fast.BertModel, transformer_fast.AutoModel):
            with pytest.raises(FileNotFoundError, match=r"config\.json: not found.*model\.safetensors"):
                auto.from_pretrained(checkpoint.folder)

    def test_config_not_json(self, checkpoint):
        (checkpoint.folder / "config.json").write_text("{broken")
        with pytest.raises(ValueError, match=r"config\.json: is not valid JSON"):
            load(checkpoint.folder)
        (checkpoint.folder / "config.json").write_text("[]")
        with pytest.raises(ValueError, match=r"config\.json: wanted a JSON object, got list"):
            load(checkpoint.folder)

    def test_other_model_type(self, checkpoint):
        checkpoint(model_type="gpt2")
        with pytest.raises(ValueError, match="wanted a checkpoint with model_type 'bert'.*says 'gpt2'"):
            load(checkpoint.folder)
        with pytest.raises(ValueError, match="neither .* has a class for model_type 'gpt2'; this package has .*bert"):
            transformer_fast.AutoModelForMaskedLM.from_pretrained(checkpoint.folder)
        checkpoint(model_type="nonsense")
        with pytest.raises(ValueError, match="neither .* has a class for model_type 'nonsense'"):
            transformer_fast.AutoModel.from_pretrained(checkpoint.folder)

    @pytest.mark.parametrize("keep", [0, 5, 0.5])
    def test_truncated_safetensors(self, checkpoint, keep):
        file = checkpoint.folder / "model.safetensors"
        whole = file.read_bytes()
        file.write_bytes(whole[: keep if isinstance(keep, int) else int(len(whole) * keep)])
        with pytest.raises(ValueError, match=r"model\.safetensors: is truncated or corrupt"):
            load(checkpoint.folder)

    def test_corrupt_safetensors(self, checkpoint):
        (checkpoint.folder / "model.safetensors").write_bytes(bytes(range(256)) * 8)
        with pytest.raises(ValueError, match=r"model\.safetensors: is truncated or corrupt"):
            load(checkpoint.folder)

    def test_missing_shard(self, checkpoint, bert_config):
        os.remove(checkpoint.folder / "model.safetensors")
        transformers.BertModel(bert_config()).save_pretrained(checkpoint.folder, max_shard_size="40KB")
        shard = sorted(checkpoint.folder.glob("model-*.safetensors"))[1]
        os.remove(shard)
        with pytest.raises(FileNotFoundError, match=shard.name):
            load(checkpoint.folder)

    def test_no_weights(self, checkpoint):
        os.remove(checkpoint.folder / "model.safetensors")
        with pytest.raises(OSError, match=r"no file named model\.safetensors"):
            load(checkpoint.folder)

    def test_shapes_differ(self, checkpoint):
        checkpoint(intermediate_size=96)
        with pytest.raises(
            ValueError, match=r"intermediate.dense.bias is \(80,\) in model.safetensors, wanted \(96,\)"
        ):
            load(checkpoint.folder)
        assert load(checkpoint.folder, ignore_mismatched_sizes=True).config.intermediate_size == 96

    def test_missing_layers(self, checkpoint):
        checkpoint(num_hidden_layers=3)
        with pytest.raises(ValueError, match=r"lacks 16 weights that config.json asks for: encoder.layer.2"):
            load(checkpoint.folder)
        with pytest.raises(ValueError, match=r"lacks 16 weights"):
            transformer_fast.BertForMaskedLM.from_pretrained(checkpoint.folder)

    def test_unexpected_keys_are_reported(self, checkpoint):
        checkpoint(num_hidden_layers=1)
        _, info = load(checkpoint.folder, output_loading_info=True)
        assert len(info["unexpected_keys"]) == 16

    def test_pickled_code_is_never_run(self, checkpoint):
        class Payload:
            def __reduce__(self):
                return os.system, (f"touch {checkpoint.folder}/ran",)

        os.remove(checkpoint.folder / "model.safetensors")
        file = checkpoint.folder / "pytorch_model.bin"
        torch.save({"embeddings.word_embeddings.weight": Payload()}, file)
        with pytest.raises(ValueError, match=r"pytorch_model\.bin: is corrupt or holds more than tensors .*system"):
            load(checkpoint.folder)
        with pytest.raises(ValueError, match="weights_only: wanted True"):
            load(checkpoint.folder, weights_only=False)
        assert not (checkpoint.folder / "ran").exists()
        file.write_bytes(file.read_bytes()[:200])
        with pytest.raises(ValueError, match=r"pytorch_model\.bin: is"):
            load(checkpoint.folder)

    def test_remote_code_is_never_run(self, checkpoint):
        (checkpoint.folder / "evil.py").write_text(f"open({str(checkpoint.folder / 'ran')!r}, 'w')\n")
        checkpoint(auto_map={"AutoModel": "evil.Evil", "AutoConfig": "evil.EvilConfig"})
        for cls in (transformer_fast.BertModel, transformer_fast.AutoModel):
            with pytest.warns(UserWarning, match="trust_remote_code=True has no effect"):
                model = cls.from_pretrained(checkpoint.folder, trust_remote_code=True)
            assert type(model) is transformer_fast.BertModel
        assert not (checkpoint.folder / "ran").exists()
