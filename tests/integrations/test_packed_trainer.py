"""Trainer on unpadded rows with several documents: the steps equal those of transformers on padded documents."""

import copy

import pytest
import torch
import transformers
from numerics import GRADIENT, assert_as_accurate

import transformer_fast

STEPS = 3
GPT2 = transformers.GPT2Config(
    vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=40, attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0
)
LLAMA = transformers.LlamaConfig(
    vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    intermediate_size=48, max_position_embeddings=40,
)  # fmt: skip


def _documents() -> list[dict]:
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(2, 20, (4 * STEPS,), generator=generator).tolist()
    return [{"input_ids": torch.randint(3, 96, (n,), generator=generator).tolist()} for n in lengths]


def _padded(rows: list[dict]) -> dict[str, torch.Tensor]:
    ids = [torch.tensor(row["input_ids"]) for row in rows]
    pad = torch.nn.utils.rnn.pad_sequence
    labels = pad(ids, batch_first=True, padding_value=-100)
    labels[:, 0] = -100  # no token predicts it, and DataCollatorWithFlattening does not count it
    masks = [torch.ones_like(t) for t in ids]
    return {
        "input_ids": pad(ids, batch_first=True), "attention_mask": pad(masks, batch_first=True), "labels": labels,
    }  # fmt: skip


def _float64_loss(outputs, labels, num_items_in_batch=None):
    """The loss of the float64 model; transformers' own loss is computed in float32."""
    logits, targets = outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    return torch.nn.functional.cross_entropy(logits, targets, reduction="sum") / num_items_in_batch


class _Trainer(transformers.Trainer):
    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        self.found.append(loss.item())
        return loss


def _train(model, collator, folder, **options) -> tuple[torch.Tensor, torch.Tensor]:
    """(losses of the steps, all weights after them)."""
    arguments = transformers.TrainingArguments(
        str(folder), max_steps=STEPS, per_device_train_batch_size=4, learning_rate=0.1, optim="sgd", use_cpu=True,
        report_to="none", save_strategy="no", disable_tqdm=True, seed=0,
    )  # fmt: skip
    trainer = _Trainer(model, arguments, train_dataset=_documents(), data_collator=collator, **options)
    trainer.found = []
    trainer.train()
    weights = torch.cat([p.detach().flatten() for _, p in sorted(model.named_parameters())])
    return torch.tensor(trainer.found, dtype=weights.dtype), weights


@pytest.mark.parametrize("config", [GPT2, LLAMA], ids=["gpt2", "llama"])
def test_steps_on_unpadded_rows(config, tmp_path):
    torch.manual_seed(0)
    plain = transformers.AutoModelForCausalLM.from_config(copy.deepcopy(config))
    weights = plain.state_dict()
    truth = _train(copy.deepcopy(plain).double(), _padded, tmp_path, compute_loss_func=_float64_loss)
    theirs = _train(copy.deepcopy(plain), _padded, tmp_path)
    models = {
        "import": transformer_fast.AutoModelForCausalLM.from_config(copy.deepcopy(config)),
        "accelerate": transformers.AutoModelForCausalLM.from_config(copy.deepcopy(config)),
        "swaps": transformers.AutoModelForCausalLM.from_config(copy.deepcopy(config)),
        "attention": transformers.AutoModelForCausalLM.from_config(
            copy.deepcopy(config), attn_implementation="transformer_fast"
        ),
    }
    for how, model in models.items():
        model.load_state_dict(weights)
        if how in ("accelerate", "swaps"):
            transformer_fast.accelerate(model, adopt=how == "accelerate", verbose=False)
        losses, after = _train(model, transformers.DataCollatorWithFlattening(return_tensors="pt"), tmp_path)
        assert_as_accurate(losses, truth[0], theirs[0])
        assert_as_accurate(after, truth[1], theirs[1], GRADIENT)
