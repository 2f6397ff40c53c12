"""Deleted models leave nothing behind: no tensor, no cache, no copy of their weights."""

import collections
import gc
import weakref

import generating_models
import hf_models
import pytest
import recurrent_models
import torch
from native_decoders import VOCABULARY, Decoder, decode
from transformers import BertConfig, BertModel

import transformer_fast as tf
from transformer_fast.generation import set_weight_storage

BERT = {
    "vocab_size": 61, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128,
    "max_position_embeddings": 40,
}  # fmt: skip


def padded(batch=3, length=7, vocabulary=generating_models.VOCABULARY):
    ids, mask = torch.randint(3, vocabulary, (batch, length)), torch.ones(batch, length, dtype=torch.long)
    mask[0, :3] = 0
    return {"input_ids": ids, "attention_mask": mask}


def encoder():
    model = tf.BertForSequenceClassification(BertConfig(**BERT))
    model(**padded(), labels=torch.tensor([0, 1, 0])).loss.backward()
    with torch.no_grad():
        model.eval()(**padded())
    return model


def encoder_in_int8():
    model = tf.quantize(tf.BertModel(BertConfig(**BERT)).eval())
    with torch.no_grad():
        model(**padded())
    return model


def decoder(dtype=None, copy=True):
    model = generating_models.models()[1]
    set_weight_storage(model, dtype, copy=copy)
    batch = padded()
    for method in ("greedy", "beams", "sampled"):
        model.generate(**batch, **generating_models.METHODS[method], max_new_tokens=4)
    model.train()(**batch, labels=batch["input_ids"]).loss.backward()
    return model


def decoder_that_fails():
    """A generation that stops in the middle."""
    model = generating_models.models()[1]
    set_weight_storage(model, copy=True)

    def fail(ids, scores):
        if ids.shape[1] > 9:
            raise RuntimeError("enough")
        return scores

    with pytest.raises(RuntimeError, match="enough"):
        model.generate(**padded(), max_new_tokens=8, logits_processor=[fail])
    return model


def encoder_decoder():
    model = generating_models.seq2seq_models("t5")[1]
    batch = padded()
    model.generate(**batch, num_beams=2, max_new_tokens=4)
    model.train()(**batch, labels=batch["input_ids"]).loss.backward()
    return model


def recurrent():
    model = recurrent_models.build()
    batch = recurrent_models.batch()
    labels = batch.pop("labels")
    model.generate(**batch, max_new_tokens=4)
    model.train()(**batch, labels=labels).loss.backward()
    return model


def native_step():
    model = Decoder()
    with torch.no_grad():
        decode(model, torch.randint(VOCABULARY, (2, 5)), storage=torch.bfloat16)
    return model


def accelerated():
    model = hf_models.DECODERS["llama"]()
    tf.accelerate(model)
    model.train()
    hf_models.run_with_gradients(model, hf_models.batch("left"))
    return model


def torchs_own():
    model = torch.nn.TransformerEncoder(torch.nn.TransformerEncoderLayer(32, 4, 48, batch_first=True), 2)
    tf.accelerate(model)
    model.train()(torch.randn(2, 5, 32)).sum().backward()
    return model


def of_a_class_made_at_run_time():
    class Mine(tf.BertModel):
        weight_of_the_class = torch.ones(3)

    model = Mine(BertConfig(**BERT)).eval()
    with torch.no_grad():
        model(**padded())
    return model


def accelerated_norm_of_a_class_made_at_run_time():
    class Norm(torch.nn.LayerNorm):
        weight_of_the_class = torch.ones(3)

    model = BertModel(BertConfig(**BERT)).eval()
    for layer in model.encoder.layer:
        layer.output.LayerNorm = Norm(64)
    tf.accelerate(model)
    with torch.no_grad():
        model(**padded())
    return model


CASES = [
    encoder, encoder_in_int8, decoder, decoder_that_fails, encoder_decoder, recurrent, native_step, accelerated,
    torchs_own, of_a_class_made_at_run_time, accelerated_norm_of_a_class_made_at_run_time,
]  # fmt: skip


def living() -> collections.Counter:
    """The number of live objects: tensors, modules, and instances of what this package and these tests define."""
    gc.collect()
    kinds = (type(thing) for thing in gc.get_objects())
    packages = ("transformer_fast", __name__, "native_decoders")
    return collections.Counter(
        f"{kind.__module__}.{kind.__qualname__}"
        for kind in kinds
        if issubclass(kind, (torch.Tensor, torch.nn.Module)) or str(kind.__module__).startswith(packages)
    )


@pytest.mark.parametrize("use", CASES)
def test_nothing_is_left(use):
    use()  # fill the caches that all models share, such as the buckets of distances
    before = living()
    gc.disable()
    try:
        for _ in range(2):
            model = use()
            weights = [weakref.ref(p) for p in model.parameters()]
            del model
            assert weights and not any(w() is not None for w in weights)  # without the garbage collector
    finally:
        gc.enable()
    assert living() - before == collections.Counter()
