"""Sentence pairs for pre-training: their parts come from the places that their labels say."""

import collections

import pytest
import torch
import transformers
from transformers import BertTokenizer, DataCollatorForLanguageModeling

import transformer_fast
from transformer_fast import sentence_pairs

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
# Words are named by document d, sentence s and word w, so that every token shows where it comes from.
DOCUMENTS = [[" ".join(f"d{d}s{s}w{w}" for w in range(2 + (3 * d + s) % 5)) for s in range(9)] for d in range(7)]


@pytest.fixture
def tokenizer():
    words = [word for document in DOCUMENTS for sentence in document for word in sentence.split()]
    return BertTokenizer(vocab={word: i for i, word in enumerate([*SPECIAL, *words])}, model_max_length=512)


def parts(tokenizer, pair) -> tuple[list, list]:
    """The words of A and B as (document, sentence, word). It also checks the special tokens."""
    tokens = tokenizer.convert_ids_to_tokens(pair["input_ids"])
    first = tokens.index("[SEP]")
    assert tokens[0] == "[CLS]" and tokens[-1] == "[SEP]" and tokens.count("[SEP]") == 2
    assert pair["token_type_ids"] == [0] * (first + 1) + [1] * (len(tokens) - first - 1)
    assert pair["special_tokens_mask"] == [int(t in ("[CLS]", "[SEP]")) for t in tokens]
    found = []
    for words in (tokens[1:first], tokens[first + 1 : -1]):
        found.append([tuple(int(n) for n in w[1:].replace("s", " ").replace("w", " ").split()) for w in words])
    return found[0], found[1]


@pytest.mark.quick
@pytest.mark.parametrize("max_length", [12, 24, 40])
def test_next_sentences(max_length, tokenizer):
    seen, lengths, labels = set(), [], collections.Counter()
    for seed in range(20):
        for pair in sentence_pairs(DOCUMENTS, tokenizer, max_length=max_length, seed=seed):
            a, b = parts(tokenizer, pair)
            assert a and b and len(pair["input_ids"]) <= max_length
            assert a == sorted(a) and b == sorted(b) and len({w[0] for w in a}) == len({w[0] for w in b}) == 1
            label = pair["next_sentence_label"]
            labels[label] += 1
            if label:
                assert a[0][0] != b[0][0]
            else:
                assert a[0][0] == b[0][0] and a[-1] < b[0]
            seen.update(w[:2] for w in a + b)
            lengths.append(len(pair["input_ids"]))
    assert seen == {(d, s) for d in range(7) for s in range(9)}  # all sentences are used
    assert min(lengths) < 10
    share = labels[1] / sum(labels.values())
    assert 0.4 < share < (0.7 if max_length > 12 else 0.95)  # a single sentence always gets a random one


def test_sentence_order(tokenizer):
    labels = collections.Counter()
    for seed in range(10):
        for pair in sentence_pairs(DOCUMENTS, tokenizer, objective="sentence_order", max_length=30, seed=seed):
            a, b = parts(tokenizer, pair)
            label = pair["sentence_order_label"]
            labels[label] += 1
            assert a[0][0] == b[0][0] and (b > a if label == 0 else a > b)
    assert 0.35 < labels[1] / sum(labels.values()) < 0.65


@pytest.mark.quick
def test_the_same_for_the_same_seed(tokenizer):
    first, again, other = (sentence_pairs(DOCUMENTS, tokenizer, max_length=24, seed=s) for s in (3, 3, 4))
    assert first == again != other


@pytest.mark.parametrize("family, objective", [("Bert", "next_sentence"), ("Albert", "sentence_order")])
def test_a_training_step(family, objective, tokenizer):
    """With transformers' masking collator the pairs are valid inputs of ForPreTraining models."""
    pairs = sentence_pairs(DOCUMENTS, tokenizer, objective=objective, max_length=24)
    batch = DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.3)(pairs[:8])
    assert (batch["labels"] != -100).any() and (batch["input_ids"] == tokenizer.mask_token_id).any()
    config = getattr(transformers, f"{family}Config")(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        num_labels=2,
    )  # fmt: skip
    model = getattr(transformer_fast, f"{family}ForPreTraining")(config)
    batch.pop("special_tokens_mask", None)
    loss = model(**batch).loss
    loss.backward()
    assert loss.isfinite() and model.get_input_embeddings().weight.grad.abs().sum() > 0
    assert torch.is_tensor(batch[f"{objective}_label"])


def test_bad_input(tokenizer):
    with pytest.raises(ValueError, match="objective: wanted 'next_sentence' or 'sentence_order', got 'nsp'"):
        sentence_pairs(DOCUMENTS, tokenizer, objective="nsp")
    with pytest.raises(ValueError, match="documents: next_sentence needs at least 2 with text, got 1"):
        sentence_pairs([["d0s0w0"], [], [""]], tokenizer)
    with pytest.raises(ValueError, match="max_length: wanted at least 5, got 4"):
        sentence_pairs(DOCUMENTS, tokenizer, max_length=4)
    for documents in ("text", ["One sentence.", "Another."]):
        with pytest.raises(TypeError, match="documents: wanted a list of documents, each a list of sentences"):
            sentence_pairs(documents, tokenizer)
