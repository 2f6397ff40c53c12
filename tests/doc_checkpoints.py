"""Tiny random checkpoints in folders named like the hub models in README and docs, so that the code there runs
unchanged without a network."""

import pathlib

import torch
import transformers as hf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from transformer_fast.demo import load_sentences, locate

CORPUS = load_sentences()[:150]
NARROW = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 64}
SEQ2SEQ = {
    "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
    "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_position_embeddings": 512, "pad_token_id": 0, "eos_token_id": 2,
    "decoder_start_token_id": 0, "forced_eos_token_id": 2, "bos_token_id": 1,
}  # fmt: skip


def byte_pairs(*special: str, end: str = "") -> hf.PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer as GPT-2's and BART's. `end` is appended to each text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=list(special), initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator(CORPUS, trainer)
    names = {"<pad>": "pad_token", "<s>": "bos_token", "</s>": "eos_token", "<|endoftext|>": "eos_token"}
    if end:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"$A {end}", special_tokens=[(end, tokenizer.token_to_id(end))]
        )
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=512, model_input_names=["input_ids", "attention_mask"],
        **{names[token]: token for token in special},
    )  # fmt: skip


def save_all(root: pathlib.Path) -> None:
    torch.manual_seed(0)
    real = root / "sentence-transformers" / "all-MiniLM-L6-v2"
    real.parent.mkdir(parents=True)
    real.symlink_to(locate())
    words = hf.AutoTokenizer.from_pretrained(locate())
    pairs = byte_pairs("<|endoftext|>")
    seq2seq = byte_pairs("<pad>", "<s>", "</s>", end="</s>")

    def bert(head, **changes):
        return head(head.config_class(vocab_size=len(words), max_position_embeddings=512, **NARROW, **changes))

    entities = dict(enumerate(["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]))
    small = {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64, "vocab_size": len(words)}
    sentiment = hf.DistilBertConfig(**small, id2label={0: "NEGATIVE", 1: "POSITIVE"})
    squad = hf.DistilBertConfig(**small)
    gpt2 = hf.GPT2Config(
        vocab_size=len(pairs), n_embd=32, n_layer=2, n_head=2, n_positions=512, bos_token_id=0, eos_token_id=0
    )
    t5 = hf.T5Config(
        vocab_size=len(seq2seq), d_model=32, d_kv=16, d_ff=64, num_layers=1, num_heads=2, pad_token_id=0,
        eos_token_id=2, decoder_start_token_id=0,
    )  # fmt: skip
    roberta = hf.RobertaConfig(vocab_size=400, max_position_embeddings=514, pad_token_id=1, **NARROW)
    for name, model, tokenizer in (
        ("google-bert/bert-base-uncased", bert(hf.BertForPreTraining), words),
        ("dslim/bert-base-NER", bert(hf.BertForTokenClassification, id2label=entities), words),
        ("distilbert/distilbert-base-uncased", hf.DistilBertForMaskedLM(squad), words),
        ("distilbert/distilbert-base-uncased-finetuned-sst-2-english",
         hf.DistilBertForSequenceClassification(sentiment), words),
        ("distilbert/distilbert-base-cased-distilled-squad", hf.DistilBertForQuestionAnswering(squad), words),
        ("FacebookAI/roberta-base", hf.RobertaForMaskedLM(roberta), pairs),
        ("openai-community/gpt2", hf.GPT2LMHeadModel(gpt2), pairs),
        ("Helsinki-NLP/opus-mt-en-de", hf.MarianMTModel(hf.MarianConfig(vocab_size=len(seq2seq), **SEQ2SEQ)), seq2seq),
        ("facebook/bart-large-cnn",
         hf.BartForConditionalGeneration(hf.BartConfig(vocab_size=len(seq2seq), **SEQ2SEQ)), seq2seq),
        ("google-t5/t5-small", hf.T5ForConditionalGeneration(t5), seq2seq),
    ):  # fmt: skip
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
