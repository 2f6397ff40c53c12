"""ULMFiT's tools on every kind of model: layer groups, learning rates and gradual unfreezing."""

import math

import pytest
import torch
import transformers as hf
from numerics import assert_as_accurate

import transformer_fast as tf

TINY = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16, "num_hidden_layers": 2, "vocab_size": 40}
SEQ2SEQ = {
    "d_model": 16, "encoder_layers": 1, "decoder_layers": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
    "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "vocab_size": 40,
}  # fmt: skip
AWD = {"vocab_size": 40, "embedding_size": 8, "cell_size": 12, "num_layers": 3}


def bert(head="BertForSequenceClassification"):
    return getattr(tf, head)(hf.BertConfig(**TINY))


# A pattern per group: each group has exactly the parameters whose names match.
GROUPS = {
    "BertForSequenceClassification": (lambda: bert(), ["embeddings.", "layer.0.", "layer.1.|pooler", "classifier."]),
    "BertModel": (lambda: bert("BertModel"), ["embeddings.", "layer.0.", "layer.1.|pooler"]),
    "GPT2LMHeadModel": (
        lambda: tf.GPT2LMHeadModel(hf.GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=40, eos_token_id=1)),
        ["wte|wpe", r"h\.0\.", r"h\.1\.|ln_f"],
    ),
    "LlamaForSequenceClassification": (
        lambda: tf.LlamaForSequenceClassification(hf.LlamaConfig(**TINY)),
        ["embed_tokens", r"layers\.0\.", r"layers\.1\.|model\.norm", "score"],
    ),
    "BartForSequenceClassification": (
        lambda: tf.BartForSequenceClassification(hf.BartConfig(**SEQ2SEQ)),
        ["embed|shared", r"encoder\.layers\.0", r"decoder\.layers\.0", r"decoder\.layers\.1", "classification_head"],
    ),
    "T5ForConditionalGeneration": (
        lambda: tf.T5ForConditionalGeneration(
            hf.T5Config(d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, vocab_size=40)
        ),
        ["shared", "encoder", "decoder"],
    ),
    "DistilBertForSequenceClassification": (
        lambda: tf.DistilBertForSequenceClassification(
            hf.DistilBertConfig(dim=16, n_layers=2, n_heads=2, hidden_dim=16, vocab_size=40)
        ),
        ["embeddings", r"layer\.0\.", r"layer\.1\.", "classifier"],
    ),
    "AttentionRNN": (
        lambda: tf.AttentionRNNForConditionalGeneration(
            tf.AttentionRNNConfig(vocab_size=40, embedding_size=8, hidden_size=8, num_layers=2)
        ),
        ["embed_tokens", "encoder.rnn.*_l0", "encoder.rnn.*_l1|initial_state|score", "decoder.rnn.*_l0",
         "decoder.rnn.*_l1|readout", "lm_head"],
    ),
    "Elmo": (
        lambda: tf.ElmoForSequenceClassification(tf.ElmoConfig(filters=[[1, 2]], projection_size=4, cell_size=8)),
        ["embeddings", r"layers\.0", r"layers\.1", "scalar_mix|classifier"],
    ),
    "AWDLSTM": (
        lambda: tf.AWDLSTMForSequenceClassification(tf.AWDLSTMConfig(**AWD)),
        ["embed_tokens", r"layers\.0", r"layers\.1", r"layers\.2", "norms|hidden|classifier"],
    ),
    "transformers' own": (
        lambda: hf.RobertaForSequenceClassification(hf.RobertaConfig(**TINY)),
        ["embeddings", r"layer\.0\.", r"layer\.1\.", "classifier"],
    ),
}  # fmt: skip


@pytest.mark.quick
@pytest.mark.parametrize("name", GROUPS)
def test_groups(name):
    import re

    make, wanted = GROUPS[name]
    model = make()
    groups = tf.layer_groups(model)
    assert len(groups) == len(wanted)
    for group, pattern in zip(groups, wanted):
        assert group and all(re.search(pattern, n) for n in group), (pattern, group)
    assert sorted(n for group in groups for n in group) == sorted(n for n, _ in model.named_parameters())


def test_albert_shares_its_layers():
    model = tf.AlbertForSequenceClassification(hf.AlbertConfig(**TINY, embedding_size=8))
    groups = tf.layer_groups(model)
    assert [len(g) for g in groups[::2]] == [7, 2] and len(groups) == 3


def test_no_layers():
    with pytest.raises(ValueError, match="model: found no layers in Linear"):
        tf.layer_groups(torch.nn.Linear(2, 2))


@pytest.mark.quick
def test_rates_fall_by_the_factor():
    groups = tf.discriminative_learning_rates(bert(), lr=1.0, factor=2.0, weight_decay=0.1)
    assert [group["lr"] for group in groups] == [0.125, 0.25, 0.5, 1.0]
    optimizer = torch.optim.AdamW(groups)
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.1}
    for name, value in (("lr", 0.0), ("factor", -1.0)):
        with pytest.raises(ValueError, match=f"{name}: wanted a positive number, got {value}"):
            tf.discriminative_learning_rates(bert(), **{"lr": 1.0, name: value})


@pytest.mark.quick
@pytest.mark.parametrize("steps, cut_fraction, ratio", [(100, 0.1, 32), (40, 0.25, 10), (7, 0.1, 32)])
def test_schedule_is_equation_3(steps, cut_fraction, ratio):
    optimizer = torch.optim.SGD([{"params": [torch.zeros(1)], "lr": 2.0}, {"params": [torch.zeros(1)], "lr": 0.5}])
    schedule = tf.slanted_triangular_schedule(optimizer, steps, cut_fraction, ratio)
    rates = []
    for _ in range(steps):
        rates.append(schedule.get_last_lr())
        optimizer.step()
        schedule.step()
    cut = math.floor(steps * cut_fraction)
    wanted = []
    for t in range(steps):
        if t < cut:
            p = t / cut
        elif cut:
            p = 1 - (t - cut) / (cut * (1 / cut_fraction - 1))
        else:
            p = 1 - t / steps  # there are no steps in which the rate rises
        wanted.append([lr * (1 + p * (ratio - 1)) / ratio for lr in (2.0, 0.5)])
    torch.testing.assert_close(torch.tensor(rates), torch.tensor(wanted))
    assert max(rates)[0] == 2.0
    for bad, message in (({"steps": 0}, "steps"), ({"cut_fraction": 1.0}, "cut_fraction"), ({"ratio": 0.5}, "ratio")):
        with pytest.raises(ValueError, match=f"{message}: wanted"):
            tf.slanted_triangular_schedule(optimizer, **{"steps": 5, **bad})


@pytest.mark.parametrize("kind", ["bert", "awd_lstm"])
def test_gradual_unfreezing(kind, tmp_path):
    """Which parameters have changed after each epoch of a Trainer, and that all are trainable again afterwards."""
    torch.manual_seed(0)
    model = bert() if kind == "bert" else tf.AWDLSTMForSequenceClassification(tf.AWDLSTMConfig(**AWD))
    frozen = next(n for n, _ in model.named_parameters() if "embed" in n)
    model.get_parameter(frozen).requires_grad_(False)  # frozen by the user
    groups = tf.layer_groups(model)
    moved: list[list[bool]] = []

    class Watch(hf.TrainerCallback):
        def on_epoch_begin(self, *args, **kwargs):
            self.before = {n: p.detach().clone() for n, p in model.named_parameters()}

        def on_epoch_end(self, *args, **kwargs):
            now = dict(model.named_parameters())
            moved.append([any(not torch.equal(now[n], self.before[n]) for n in group) for group in groups])

    rows = [{"input_ids": torch.randint(3, 40, (5,)).tolist(), "labels": i % 2} for i in range(8)]
    epochs = len(groups)
    optimizer = torch.optim.AdamW(tf.discriminative_learning_rates(model, lr=1e-2, weight_decay=0.1))
    schedule = tf.slanted_triangular_schedule(optimizer, steps=2 * epochs)
    arguments = hf.TrainingArguments(
        str(tmp_path), num_train_epochs=epochs, per_device_train_batch_size=4, report_to=[], use_cpu=True,
        save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    trainer = hf.Trainer(
        model, arguments, train_dataset=rows, callbacks=[tf.GradualUnfreezing(), Watch()],
        optimizers=(optimizer, schedule),
    )  # fmt: skip
    trainer.train()
    last = len(groups) - 1
    some = len(groups[0]) > 1  # the embeddings have more parameters than the frozen one
    for epoch, seen in enumerate(moved):
        assert seen == [i >= last - epoch and (i > 0 or some) for i in range(len(groups))], epoch
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == [frozen]
    with pytest.raises(ValueError, match="epochs_per_layer: wanted an integer, at least 1, got 0"):
        tf.GradualUnfreezing(0)


@pytest.mark.quick
def test_concat_pooling_by_hand():
    states = torch.tensor([[[1.0, -4.0], [5.0, -2.0], [0.0, -9.0]]] * 3)
    states[0, 2] = float("nan")  # padding must not be read
    mask = torch.tensor([[1, 1, 0], [0, 1, 1], [0, 0, 0]])
    found = tf.concat_pooling(states, mask)
    truth = torch.tensor([[5, -2, 5, -2, 3, -3], [0, -9, 5, -2, 2.5, -5.5], [0] * 6], dtype=torch.float64)
    assert_as_accurate(found, truth, truth.float())
    torch.testing.assert_close(tf.concat_pooling(states[1:2])[0], torch.tensor([0, -9, 5, -2, 2, -5.0]))
    assert tf.concat_pooling(torch.zeros(2, 0, 3)).shape == (2, 9)
    with pytest.raises(ValueError, match=r"attention_mask: wanted shape \(3, 3\), got \(3, 2\)"):
        tf.concat_pooling(states, mask[:, :2])
    with pytest.raises(ValueError, match=r"states: wanted shape \(B, S, D\), got \(3, 2\)"):
        tf.concat_pooling(states[0])
