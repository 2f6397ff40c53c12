"""Uses of GPT: text generation with pipelines, fine-tuning with Trainer."""

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

import transformer_fast

pytestmark = pytest.mark.usefixtures("one_thread")
WORDS = ["<pad>", "<s>", "</s>", *"the a cat dog sat ran on mat over fence , .".split()]  # noqa: SIM905
TEXTS = ["the cat sat on", "a dog", "the dog , the cat , the fence ,", "cat"]
NAMES = {"gpt2": "GPT2LMHeadModel", "openai-gpt": "OpenAIGPTLMHeadModel"}


@pytest.fixture
def tokenizer():
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>", padding_side="left"
    )


def config_for(name: str):
    kind = transformers.GPT2Config if name.startswith("GPT2") else transformers.OpenAIGPTConfig
    return kind(
        vocab_size=len(WORDS), n_positions=64, n_embd=24, n_layer=2, n_head=3, pad_token_id=0, bos_token_id=1,
        eos_token_id=2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, initializer_range=0.3, num_labels=2,
    )  # fmt: skip


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}], ids=str)
@pytest.mark.parametrize("family", NAMES)
def test_text_generation_pipeline(family, options, pair, tokenizer):
    ours, theirs, _ = pair(NAMES[family], config_for(NAMES[family]))
    found = []
    for model in (ours, theirs):
        torch.manual_seed(1)
        run = transformers.pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
        texts = run(TEXTS, batch_size=4, max_new_tokens=8, **options)
        found.append([[one["generated_text"] for one in group] for group in texts])
    assert found[0] == found[1] and all(text in group[0] for text, group in zip(TEXTS, found[0]))


@pytest.mark.parametrize("name", [*NAMES.values(), "GPT2ForSequenceClassification"])
def test_trainer(name, pair, tmp_path):
    """Three steps of HF's Trainer have the same result as with HF's model."""
    ours, theirs, _ = pair(name, config_for(name))
    data = []
    for i, length in enumerate((5, 12, 3, 9, 7, 12)):
        ids = torch.zeros(12, dtype=torch.long)
        ids[:length] = torch.randint(3, len(WORDS), (length,))
        labels = i % 2 if "Sequence" in name else ids.masked_fill(ids == 0, -100)
        data.append({"input_ids": ids, "attention_mask": (ids > 0).long(), "labels": labels})
    losses = []
    for model, folder in ((ours, "ours"), (theirs, "theirs")):
        arguments = transformers.TrainingArguments(
            str(tmp_path / folder), max_steps=3, per_device_train_batch_size=2, gradient_accumulation_steps=1,
            learning_rate=1e-3, report_to=[], save_strategy="no", logging_steps=1, seed=3, use_cpu=True,
            disable_tqdm=True,
        )  # fmt: skip
        trainer = transformers.Trainer(model, arguments, train_dataset=data)
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert len(losses[0]) == 3 and losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_a_recorded_graph_is_right_for_other_masks():
    model = transformer_fast.GPT2LMHeadModel(config_for("GPT2LMHeadModel")).eval().requires_grad_(False)
    ids, mask = torch.randint(3, len(WORDS), (4, 9)), torch.ones(4, 9, dtype=torch.long)
    mask[1, 5:] = 0
    exported = torch.export.export(model, (ids,), {"attention_mask": mask, "use_cache": False}).module()
    for given in (mask, mask.flip(0)):
        found = exported(ids, attention_mask=given, use_cache=False)["logits"]
        wanted = model(ids, attention_mask=given, use_cache=False).logits
        torch.testing.assert_close(found[given.bool()], wanted[given.bool()])


def test_shapes_without_values():
    with torch.device("meta"):
        model = transformer_fast.GPT2LMHeadModel(config_for("GPT2LMHeadModel"))
    ids = torch.ones(2, 5, dtype=torch.long, device="meta")
    assert model(ids, attention_mask=torch.ones_like(ids)).logits.shape == (2, 5, len(WORDS))
