"""verify --precision on every kind of head, and its errors."""

import pytest
import torch
import transformers as hf

import transformer_fast as tf
from transformer_fast import quantization
from transformer_fast.verify import VerifyError, verify
from transformer_fast.verify_precision import verify_precision

_WIDE = {
    "vocab_size": 80, "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 144,
}  # fmt: skip
_BART = {
    "vocab_size": 80, "d_model": 64, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 144, "decoder_ffn_dim": 144, "max_position_embeddings": 60,
}  # fmt: skip
_IMAGE = {
    "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64, "image_size": 32,
    "patch_size": 8,
}  # fmt: skip
_CELLS = {"vocab_size": 80, "embedding_size": 64, "hidden_size": 64}

HEADS = {
    "BertForSequenceClassification": (lambda: hf.BertConfig(**_WIDE), {"likeliest output the same": 32}),
    "BertForTokenClassification": (lambda: hf.BertConfig(**_WIDE), {"likeliest output the same": 638}),
    "BertForQuestionAnswering": (
        lambda: hf.BertConfig(**_WIDE), {"likeliest start the same": 32, "likeliest end the same": 32},
    ),
    "BertForMultipleChoice": (lambda: hf.BertConfig(**_WIDE), {"likeliest output the same": 16}),
    "BertForPreTraining": (
        lambda: hf.BertConfig(**_WIDE),
        {"likeliest prediction the same": 638, "likeliest seq_relationship the same": 32},
    ),
    "ElectraForPreTraining": (
        lambda: hf.ElectraConfig(**_WIDE, embedding_size=64), {"likeliest output the same": 638},
    ),
    "BartForSequenceClassification": (lambda: hf.BartConfig(**_BART), {"likeliest output the same": 32}),
    "AttentionRNNForConditionalGeneration": (
        lambda: tf.AttentionRNNConfig(**_CELLS),
        {"likeliest output the same": 419, "generated tokens the same": 192},
    ),
}  # fmt: skip


@pytest.mark.parametrize("head", HEADS)
def test_every_output_is_compared(head, tmp_path):
    config, wanted = HEADS[head]
    torch.manual_seed(0)
    getattr(tf, head)(config()).save_pretrained(tmp_path)
    report = verify_precision(tmp_path)
    assert report.model == head and report.text.startswith("random tokens")
    found = {cost.what: cost for cost in report.costs}
    for what, count in wanted.items():
        assert float(found[what].value[:-1]) > 60
        assert found[what].note.startswith(f"of {count} ")


def test_the_report_says_why_its_text_is_random(tmp_path):
    """The reason of a tokenizer that fails is not lost."""
    torch.manual_seed(0)
    tf.BertForSequenceClassification(hf.BertConfig(**_WIDE)).save_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    assert verify_precision(tmp_path).text == "random tokens (the checkpoint has no tokenizer for English sentences)"
    (tmp_path / "tokenizer.json").write_text("{")
    found = verify_precision(tmp_path).text
    assert found.startswith("random tokens (its tokenizer cannot be used: ") and "line 1 column" in found


@pytest.mark.parametrize("head", ["BertForSequenceClassification", "GPT2DoubleHeadsModel"])
def test_a_single_output(head, tmp_path):
    torch.manual_seed(0)
    gpt = {"vocab_size": 80, "n_embd": 64, "n_layer": 1, "n_head": 4}
    config = hf.GPT2Config(**gpt) if head.startswith("GPT2") else hf.BertConfig(**_WIDE, num_labels=1)
    getattr(tf, head)(config).save_pretrained(tmp_path)
    found = {cost.what: cost.value for cost in verify_precision(tmp_path).costs}
    assert 0 < float(found["output differs by"].split(",")[0]) < 0.5


def test_positions_that_start_after_padding(tmp_path):
    """RoBERTa's positions start at 2, so that the longest text has 2 tokens fewer than there are positions."""
    tf.RobertaForMaskedLM(hf.RobertaConfig(**_WIDE, max_position_embeddings=40)).save_pretrained(tmp_path)
    assert verify_precision(tmp_path).costs


def test_errors_are_one_line(tmp_path, monkeypatch):
    bert = tf.BertForMaskedLM(hf.BertConfig(**_WIDE))
    bert.save_pretrained(tmp_path / "float")
    tf.quantize(bert).save_pretrained(tmp_path / "int8")
    for check in (verify, verify_precision):
        with pytest.raises(VerifyError, match=r"int8: is quantised already \(transformer_fast_int8\); give"):
            check(tmp_path / "int8")
    hf.ViTModel(hf.ViTConfig(**_IMAGE)).save_pretrained(tmp_path / "vit")
    with pytest.raises(VerifyError, match="ViTModel: has no vocabulary of tokens"):
        verify_precision(tmp_path / "vit")
    text = {**_WIDE, "max_position_embeddings": 40, "bos_token_id": 1, "eos_token_id": 2}
    hf.CLIPModel(hf.CLIPConfig(text_config=text, vision_config=_IMAGE)).save_pretrained(tmp_path / "clip")
    with pytest.raises(VerifyError, match="CLIPModel: cannot be run on tokens alone"):
        verify_precision(tmp_path / "clip")
    narrow = {**_WIDE, "hidden_size": 20, "intermediate_size": 36}
    tf.BertModel(hf.BertConfig(**narrow)).save_pretrained(tmp_path / "narrow")
    with pytest.raises(VerifyError, match="BertModel: has no linear layer that can be int8"):
        verify_precision(tmp_path / "narrow")
    broken = tf.BertForMaskedLM(hf.BertConfig(**_WIDE))
    broken.bert.encoder.layer[0].output.dense.weight.data[0, 0] = float("nan")
    broken.save_pretrained(tmp_path / "nan")
    with pytest.raises(VerifyError, match="cannot be quantised: .*output.dense: weight: wanted finite"):
        verify_precision(tmp_path / "nan")
    monkeypatch.setattr(quantization.native, "multiplies_bfloat16", lambda: False)
    with pytest.raises(VerifyError, match="precision: bf16 changes nothing here"):
        verify_precision(tmp_path / "float", "bf16")
