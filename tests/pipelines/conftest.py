"""Tokenizers trained here on a few sentences, and tiny random models for them."""

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

import transformer_fast

CORPUS = [
    "The capital of France is Paris, and the river there is the Seine.",
    "Berlin is the capital of Germany; its river is the Spree.",
    "Marie Curie was born in Warsaw and worked in Paris for most of her life.",
    "The Danube flows through Vienna, Bratislava, Budapest and Belgrade before it reaches the Black Sea.",
    "A short sentence.",
    "Unbelievably long words such as internationalisation are cut into pieces by the tokenizer.",
    "In 1687 Isaac Newton published the Principia, which describes motion and gravitation.",
    "Who wrote the book, and when was it published?",
]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def train(special: list[str], unknown: str) -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token=unknown))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=260, special_tokens=special, show_progress=False)
    # The trainer breaks ties between pairs randomly, so words that tests name are frequent enough to be whole tokens.
    tokenizer.train_from_iterator([*CORPUS, *["paris river warsaw"] * 40], trainer)
    return tokenizer


@pytest.fixture(scope="session")
def texts():
    return list(CORPUS)


@pytest.fixture(scope="session")
def tokenizer():
    """WordPiece with BERT's special tokens and its format of pairs."""
    made = train(SPECIAL, "[UNK]")
    cls, sep = made.token_to_id("[CLS]"), made.token_to_id("[SEP]")
    made.post_processor = processors.BertProcessing(("[SEP]", sep), ("[CLS]", cls))
    names = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, model_max_length=64, model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        **{f"{name}_token": token for name, token in names.items()},
    )  # fmt: skip


@pytest.fixture(scope="session")
def seq2seq_tokenizer():
    """WordPiece with </s> at the end."""
    made = train(["<pad>", "<unk>", "</s>"], "<unk>")
    made.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", unk_token="<unk>", eos_token="</s>", model_max_length=64,
        model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip


def encoder(head: str, **changes):
    config = transformers.BertConfig(
        vocab_size=260, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
        max_position_embeddings=128, initializer_range=0.3, **changes,
    )  # fmt: skip
    torch.manual_seed(0)
    return getattr(transformers, f"Bert{head}")(config).eval()


def seq2seq(family: str, **changes):
    torch.manual_seed(0)
    common = {"vocab_size": 260, "pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0}
    if family == "t5":
        config = transformers.T5Config(
            d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, initializer_factor=8.0, **common, **changes
        )
        return transformers.T5ForConditionalGeneration(config).eval()
    classes = {
        "bart": (transformers.BartConfig, transformers.BartForConditionalGeneration),
        "marian": (transformers.MarianConfig, transformers.MarianMTModel),
    }
    config_class, model_class = classes[family]
    config = config_class(
        d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=128, init_std=0.4, forced_eos_token_id=None,
        bos_token_id=None, **common, **changes,
    )  # fmt: skip
    return model_class(config).eval()


@pytest.fixture
def checkpoint(tmp_path, tokenizer):
    """A function that saves a tiny Hugging Face BERT with a head and its tokenizer, and returns the folder."""

    def make(head: str, **changes):
        folder = tmp_path / head
        encoder(head, **changes).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return make


@pytest.fixture
def make_seq2seq():
    return seq2seq


@pytest.fixture
def ours_and_theirs(checkpoint):
    """Pipelines of this package and of transformers for the same task and checkpoint."""

    def make(task: str, head: str, changes: dict, **arguments):
        folder = checkpoint(head, **changes)
        ours = transformer_fast.pipeline(task, model=folder, device="cpu", **arguments)
        theirs = transformers.pipeline(task, model=str(folder), device="cpu", **arguments)
        assert type(ours.model) is getattr(transformer_fast, f"Bert{head}")
        return ours, theirs

    return make
