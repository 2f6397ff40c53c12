"""Small random models with clear next tokens: Hugging Face's and ours with the same weights."""

import torch
from transformers import (
    BartConfig,
    GPT2Config,
    M2M100Config,
    MarianConfig,
    MBartConfig,
    MT5Config,
    PegasusConfig,
    T5Config,
    UMT5Config,
)
from transformers.models.bart.modeling_bart import BartForConditionalGeneration
from transformers.models.gpt2 import modeling_gpt2 as hf
from transformers.models.m2m_100.modeling_m2m_100 import M2M100ForConditionalGeneration
from transformers.models.marian.modeling_marian import MarianMTModel
from transformers.models.mbart.modeling_mbart import MBartForConditionalGeneration
from transformers.models.mt5.modeling_mt5 import MT5ForConditionalGeneration
from transformers.models.pegasus.modeling_pegasus import PegasusForConditionalGeneration
from transformers.models.t5.modeling_t5 import T5ForConditionalGeneration
from transformers.models.umt5.modeling_umt5 import UMT5ForConditionalGeneration

import transformer_fast as tf

VOCABULARY = 53
METHODS = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "n-best": {"num_beams": 4, "num_return_sequences": 3, "length_penalty": 0.4, "early_stopping": True},
    "penalties": {"repetition_penalty": 1.4, "no_repeat_ngram_size": 2, "min_new_tokens": 4},
    "sampled": {"do_sample": True, "top_k": 9, "num_return_sequences": 3},
}


def models(seed=0, **options):
    """HF's GPT-2 and ours with the same weights, large enough for clear next tokens."""
    torch.manual_seed(seed)
    options = {"n_embd": 32, **options}
    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=64, n_layer=2, n_head=4, initializer_range=0.4, bos_token_id=0,
        eos_token_id=1, pad_token_id=2, **options,
    )  # fmt: skip
    theirs, ours = hf.GPT2LMHeadModel(config).eval(), tf.GPT2LMHeadModel(config).eval()
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def prompts(batch, length, side):
    ids = torch.randint(3, VOCABULARY, (batch, length))
    lengths = torch.randint(1, length + 1, (batch,))
    lengths[0] = length
    kept = torch.arange(length) < lengths[:, None]
    mask = (kept.flip(1) if side == "left" else kept).long()
    return ids.masked_fill(mask == 0, 2), mask


_BART = {
    "vocab_size": VOCABULARY, "d_model": 32, "encoder_layers": 1, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 40, "max_position_embeddings": 40,
    "init_std": 0.4, "scale_embedding": True, "pad_token_id": 2, "bos_token_id": 0, "eos_token_id": 1,
    "decoder_start_token_id": 2, "forced_eos_token_id": 1,
}  # fmt: skip
_T5 = {
    "vocab_size": VOCABULARY, "d_model": 32, "d_kv": 6, "d_ff": 40, "num_layers": 2, "num_decoder_layers": 2,
    "num_heads": 4, "relative_attention_num_buckets": 8, "relative_attention_max_distance": 10,
    "initializer_factor": 2.0, "pad_token_id": 2, "eos_token_id": 1, "decoder_start_token_id": 2,
}  # fmt: skip
SEQ2SEQ = {
    "bart": (BartForConditionalGeneration, BartConfig(**_BART)),
    "marian": (MarianMTModel, MarianConfig(**_BART, activation_function="swish")),
    "mbart": (MBartForConditionalGeneration, MBartConfig(**_BART, forced_bos_token_id=7)),
    "pegasus": (PegasusForConditionalGeneration, PegasusConfig(**_BART)),
    # Positions after the first 6 extend the table. This model sometimes generates the padding token.
    "m2m_100": (M2M100ForConditionalGeneration, M2M100Config(**_BART | {"max_position_embeddings": 6})),
    "mt5": (MT5ForConditionalGeneration, MT5Config(**_T5)),
    "umt5": (UMT5ForConditionalGeneration, UMT5Config(**_T5)),
    "t5": (T5ForConditionalGeneration, T5Config(**_T5)),
    "t5-v1.1": (
        T5ForConditionalGeneration, T5Config(**_T5, feed_forward_proj="gated-gelu", tie_word_embeddings=False)
    ),
}  # fmt: skip


def seq2seq_models(family: str, seed: int = 0, **options):
    """Hugging Face's encoder-decoder and ours with the same weights."""
    torch.manual_seed(seed)
    cls, config = SEQ2SEQ[family]
    config = type(config)(**config.to_dict() | options)
    theirs, ours = cls(config).eval(), getattr(tf, cls.__name__)(config).eval()
    if hasattr(theirs, "final_logits_bias"):
        theirs.final_logits_bias.normal_()
    if family in ("t5-v1.1", "mt5"):
        torch.nn.init.normal_(theirs.lm_head.weight)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours
