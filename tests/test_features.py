"""Layer-wise features: those of each text are the hidden states when it is computed alone."""

import pytest
import torch
import transformers
from hf_models import DECODERS, ENCODERS, SEQ2SEQ
from numerics import assert_as_accurate
from transformers import BertTokenizer

import transformer_fast
from transformer_fast import layer_features

WORDS = """[PAD] [UNK] [CLS] [SEP] [MASK]
the a cat dog sat ran on mat over fence , .""".split()  # noqa: SIM905
TEXTS = ["the cat sat on the mat .", "a dog ran", "the dog , the cat , the fence , the mat sat on a dog .", "cat"]


@pytest.fixture
def tokenizer():
    return BertTokenizer(vocab={word: i for i, word in enumerate(WORDS)}, model_max_length=40)


def ours(name: str = "BertModel", dtype=torch.float32):
    theirs = ENCODERS["bert"]()
    model = getattr(transformer_fast, name)(theirs.config)
    model.base_model.load_state_dict(theirs.state_dict(), strict=False)
    return model.to(dtype).eval()


def alone(model, tokenizer, text, layers, combine):
    """The feature of one text by transformers, without padding."""
    with torch.no_grad():
        states = model(**tokenizer(text, return_tensors="pt"), output_hidden_states=True).hidden_states
    kept = [states[i][0] for i in layers]
    return sum(kept) if combine == "sum" else torch.cat(kept, -1)


def pool(states, how):
    rules = {
        "cls": lambda s: s[0],
        "last": lambda s: s[-1],
        "mean": lambda s: s.mean(0),
        "max": lambda s: s.amax(0),
        "concat": lambda s: torch.cat((s[-1], s.amax(0), s.mean(0))),
    }
    return rules[how](states)


@pytest.mark.quick
@pytest.mark.parametrize("pooling", [None, "cls", "concat", "last", "mean", "max"])
@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("whose", ["ours", "theirs"])
def test_every_text_as_if_alone(pooling, batch_size, whose, tokenizer):
    reference = ENCODERS["bert"]()
    model = ours() if whose == "ours" else reference
    found = layer_features(model, TEXTS, tokenizer, pooling=pooling, batch_size=batch_size)
    parts = []
    for m in (ENCODERS["bert"]().double(), reference):
        states = [alone(m, tokenizer, text, [-1], "concat") for text in TEXTS]
        parts.append(torch.cat([s if pooling is None else pool(s, pooling)[None] for s in states]))
    assert_as_accurate(torch.cat(found) if pooling is None else found, *parts)
    if pooling is None:
        assert [len(f) for f in found] == [len(tokenizer(text)["input_ids"]) for text in TEXTS]


@pytest.mark.quick
@pytest.mark.parametrize(
    "layers, indices, combine",
    [
        ("sum_last_four", [-4, -3, -2, -1], "sum"),
        ("concat_last_four", [-4, -3, -2, -1], "concat"),
        (0, [0], "concat"),
        ([-1, 1], [-1, 1], "concat"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layers(layers, indices, combine, dtype, tokenizer):
    config = transformers.BertConfig(
        vocab_size=61, hidden_size=32, num_hidden_layers=4, num_attention_heads=4, intermediate_size=48,
        initializer_range=0.2,
    )  # fmt: skip
    theirs = transformers.BertModel(config).eval()
    model = transformer_fast.BertModel(config).eval()
    model.load_state_dict(theirs.state_dict())
    found = layer_features(model.to(dtype), TEXTS, tokenizer, layers=layers)
    theirs.set_attn_implementation("eager")
    theirs = theirs.to(dtype)
    eager = torch.cat([alone(theirs, tokenizer, text, indices, combine) for text in TEXTS])
    truth = torch.cat([alone(theirs.double(), tokenizer, text, indices, combine) for text in TEXTS])
    assert found[0].dtype == dtype
    assert_as_accurate(torch.cat(found), truth, eager)


def test_models_with_heads_pairs_and_token_ids(tokenizer):
    model = ours("BertForSequenceClassification").train()
    pairs = [("the cat", "a dog ran"), ("a mat", "the fence , the dog")]
    found = layer_features(model, pairs, tokenizer, pooling="mean")
    assert model.training and not found.requires_grad
    base = ours()
    base.load_state_dict(model.base_model.state_dict())
    encoded = tokenizer(*pairs[0], return_tensors="pt")
    with torch.no_grad():
        torch.testing.assert_close(found[0], base(**encoded).last_hidden_state[0].mean(0))
    by_ids = layer_features(base, [tokenizer(t)["input_ids"] for t in TEXTS], tokenizer, pooling="cls")
    torch.testing.assert_close(by_ids, layer_features(base, TEXTS, tokenizer, pooling="cls"))


@pytest.mark.parametrize("family", ["distilbert", "albert", "gpt2", "t5", "bart"])
def test_other_families_of_transformers(family, tokenizer):
    model = (ENCODERS | DECODERS | SEQ2SEQ)[family]()
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    found = layer_features(model, TEXTS, tokenizer, pooling="mean", batch_size=2)
    alone = torch.cat([layer_features(model, [text], tokenizer, pooling="mean") for text in TEXTS])
    truth = layer_features(model.double(), TEXTS, tokenizer, pooling="mean", batch_size=1)
    assert found.shape == (4, 32)
    assert_as_accurate(found, truth, alone)


def test_long_texts_progress_and_nothing(tokenizer, capsys):
    model = ours()
    (found,) = layer_features(model, ["cat " * 100], tokenizer)
    assert len(found) == 40
    assert len(layer_features(model, ["cat " * 100], tokenizer, max_length=7, progress=True)[0]) == 7
    assert "1/1" in capsys.readouterr().err
    assert layer_features(model, [], tokenizer) == []
    assert layer_features(model, [], tokenizer, layers="concat_last_four", pooling="cls").shape == (0, 128)


@pytest.mark.parametrize(
    "call, message",
    [
        ({"layers": "first"}, "layers: wanted last, sum_last_four, concat_last_four, an index or indices, got 'first'"),
        ({"layers": []}, "layers: wanted at least one index"),
        ({"layers": [7]}, r"layers: the model has hidden states -3..2, got \[7\]"),
        ({"layers": "sum_last_four"}, r"layers: the model has hidden states -3..2"),
        ({"pooling": "sum"}, "pooling: wanted one of None, 'cls', .* got 'sum'"),
        ({"batch_size": 0}, "batch_size: wanted at least 1, got 0"),
        ({"texts": [[5], []]}, "texts: number 1 has no tokens"),
        ({"texts": [[], [5]]}, "texts: number 0 has no tokens"),
    ],
)
def test_bad_input(call, message, tokenizer):
    with pytest.raises(ValueError, match=message):
        layer_features(ours(), **({"texts": TEXTS, "tokenizer": tokenizer} | call))


@pytest.mark.parametrize("pooling", [None, "mean"])
def test_one_text(pooling, tokenizer):
    one = layer_features(ours(), TEXTS[1], tokenizer, pooling=pooling)
    (listed,) = layer_features(ours(), [TEXTS[1]], tokenizer, pooling=pooling)
    assert torch.equal(one, listed) and one.dim() == (2 if pooling is None else 1)
