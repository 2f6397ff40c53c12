"""Every model class and Hugging Face's: tiny configurations, and inputs with the labels that its head takes."""

import pytest
import torch
import transformers

from transformer_fast import _EXPORTS

VOCABULARY, BATCH, LENGTH, TARGET, CHOICES = 61, 12, 7, 5, 2
_IDS = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_BERT = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 48, "max_position_embeddings": 40, "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0, "initializer_range": 0.3,
}  # fmt: skip
_BART = _IDS | {
    "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 40, "max_position_embeddings": 40,
    "dropout": 0.0, "init_std": 0.3, "decoder_start_token_id": 2, "forced_eos_token_id": None,
}  # fmt: skip
_GPT = {
    "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 40, "resid_pdrop": 0.0, "embd_pdrop": 0.0,
    "attn_pdrop": 0.0, "summary_first_dropout": 0.0, "initializer_range": 0.3,
}  # fmt: skip
_T5 = {
    "vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4,
    "relative_attention_num_buckets": 8, "relative_attention_max_distance": 12, "pad_token_id": 0,
    "eos_token_id": 2, "decoder_start_token_id": 0, "dropout_rate": 0.0, "initializer_factor": 2.0,
}  # fmt: skip
_DECODER = _IDS | {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "max_position_embeddings": 40, "initializer_range": 0.3, "classifier_dropout": 0.0,
}  # fmt: skip
CONFIGS = {
    "bert": ("BertConfig", _BERT),
    "distilbert": ("DistilBertConfig", {
        "vocab_size": VOCABULARY, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48, "dropout": 0.0,
        "attention_dropout": 0.0, "qa_dropout": 0.0, "seq_classif_dropout": 0.0, "initializer_range": 0.3,
        "max_position_embeddings": 40,
    }),
    "albert": ("AlbertConfig", _BERT | {"embedding_size": 16, "classifier_dropout_prob": 0.0}),
    "roberta": ("RobertaConfig", _BERT | {"pad_token_id": 0}),
    "xlm_roberta": ("XLMRobertaConfig", _BERT),
    "camembert": ("CamembertConfig", _BERT),
    "electra": ("ElectraConfig", _BERT | {"embedding_size": 16, "summary_last_dropout": 0.0}),
    "mpnet": ("MPNetConfig", _BERT),
    "deberta_v2": ("DebertaV2Config", _BERT | {
        "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 4, "share_att_key": False,
        "hidden_size": 48, "conv_kernel_size": 3, "pooler_dropout": 0.0,
    }),
    "modernbert": ("ModernBertConfig", {
        "vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4,
        "intermediate_size": 24, "max_position_embeddings": 40, "local_attention": 4, "global_attn_every_n_layers": 2,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2,
        "initializer_range": 0.3,
    }),
    "gpt2": ("GPT2Config", _IDS | _GPT),
    "openai_gpt": ("OpenAIGPTConfig", {"vocab_size": VOCABULARY, "pad_token_id": 0} | _GPT),
    "llama": ("LlamaConfig", _DECODER | {"num_key_value_heads": 2}),
    "mistral": ("MistralConfig", _DECODER | {"num_key_value_heads": 2, "sliding_window": 4}),
    "qwen2": ("Qwen2Config", _DECODER | {
        "num_key_value_heads": 2, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1,
    }),
    "qwen3": ("Qwen3Config", _DECODER | {"num_key_value_heads": 2, "head_dim": 16}),
    "gemma2": ("Gemma2Config", _DECODER | {
        "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 4, "query_pre_attn_scalar": 12,
        "attn_logit_softcapping": 3.0, "final_logit_softcapping": 5.0,
    }),
    "gpt_neo": ("GPTNeoConfig", _DECODER | {
        "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]],
        "window_size": 6,  # in transformers the output of padding whose window has no tokens depends on the dtype
    }),
    "gpt_neox": ("GPTNeoXConfig", _DECODER),
    "phi": ("PhiConfig", _DECODER),
    "opt": ("OPTConfig", _DECODER | {"ffn_dim": 48, "dropout": 0.0, "init_std": 0.3}),
    "bart": ("BartConfig", _BART),
    "marian": ("MarianConfig", _BART | {"scale_embedding": True, "activation_function": "swish"}),
    "mbart": ("MBartConfig", _BART),
    "pegasus": ("PegasusConfig", _BART),
    "m2m_100": ("M2M100Config", _BART | {"encoder_layerdrop": 0.0, "decoder_layerdrop": 0.0}),
    "t5": ("T5Config", _T5 | {"feed_forward_proj": "gated-gelu"}),
    "mt5": ("MT5Config", _T5),
    "umt5": ("UMT5Config", _T5),
}  # fmt: skip
CLASSES = {name: family for family in CONFIGS for name in _EXPORTS[f"models.{family}"]}
BERTS = ("Bert", "Roberta", "XLMRoberta", "Camembert", "Electra")  # decoders if the configuration says so
SEQ2SEQ = ("bart", "marian", "mbart", "pegasus", "m2m_100", "t5", "mt5", "umt5")
_ONE_STACK = tuple(f"{f}T5{head}" for f in ("", "M", "UM") for head in ("EncoderModel", "ForTokenClassification")) + (
    "BartForCausalLM", "MarianForCausalLM",
              "MBartForCausalLM", "PegasusForCausalLM")  # fmt: skip


def make_config(name: str, **changes):
    config_class, settings = CONFIGS[CLASSES[name]]
    labels = 2 if "QuestionAnswering" in name or name == "AlbertForPreTraining" else 3
    decoder = {"is_decoder": True} if name.startswith(BERTS) and ("LMHead" in name or "CausalLM" in name) else {}
    return getattr(transformers, config_class)(**settings | {"num_labels": labels} | decoder | changes)


_UMT5_ENCODERS = ("UMT5EncoderModel", "UMT5ForTokenClassification")
_RELEASE = tuple(int(n) for n in transformers.__version__.split(".")[:2])


def make_pair(name: str, **changes):
    """(our model, Hugging Face's) with the same random weights, in evaluation mode."""
    import transformer_fast

    if name.startswith("UMT5") and name not in _UMT5_ENCODERS and _RELEASE < (5, 20):
        pytest.skip(f"UMT5's decoder attends to later tokens in transformers {transformers.__version__}")
    torch.manual_seed(3)
    theirs = getattr(transformers, name)(make_config(name, **changes))
    with torch.no_grad():
        for parameter in (p for p in theirs.parameters() if p.requires_grad):  # Marian's positions are not learned
            parameter.add_(torch.randn_like(parameter) * 0.1)
        if hasattr(theirs, "final_logits_bias"):
            theirs.final_logits_bias.normal_()
        if CLASSES[name] == "gpt_neo":  # GPT-Neo does not scale its scores: one sharp row would be the largest error
            for key in [k for k in theirs.state_dict() if k.endswith("q_proj.weight")]:
                theirs.get_parameter(key).mul_(8**-0.5)
    if CLASSES[name] == "gemma2":  # sdpa, the default in transformers 5.17, ignores the softcap
        theirs.set_attn_implementation("eager")
    ours = getattr(transformer_fast, name)(make_config(name, **changes))
    ours.load_state_dict(theirs.state_dict())
    return ours.eval(), theirs.eval()


def padding_mask(side: str = "right", batch: int = BATCH) -> torch.Tensor:
    """A mask (batch, LENGTH) for rows of LENGTH, 4 and 2 tokens."""
    lengths = torch.tensor([(LENGTH, 4, 2)[row % 3] for row in range(batch)])[:, None]
    position = torch.arange(LENGTH)
    return (position < lengths if side == "right" else position >= LENGTH - lengths).long()


def make_inputs(name: str) -> dict[str, torch.Tensor]:
    """A padded batch, with labels if the class takes them."""
    generator = torch.Generator().manual_seed(4)

    def draw(*shape, low=3, high=VOCABULARY):
        return torch.randint(low, high, shape, generator=generator)

    chosen = "MultipleChoice" in name or "DoubleHeads" in name
    mask = padding_mask(batch=BATCH * CHOICES if chosen else BATCH)
    ids = draw(len(mask), LENGTH).masked_fill(mask == 0, 0)
    labels = draw(BATCH, LENGTH).masked_fill(mask[:BATCH] == 0, -100)
    seq2seq = CLASSES[name] in SEQ2SEQ and name not in _ONE_STACK
    if seq2seq and "ForSequenceClassification" in name:
        ids[torch.arange(BATCH), mask.sum(1) - 1] = 2
    call = {"input_ids": ids, "attention_mask": mask}
    if "DoubleHeads" in name:  # HF's OpenAI GPT takes no mask of three dimensions
        ids, mask = draw(BATCH * CHOICES, LENGTH), torch.ones_like(mask)
        call = {"input_ids": ids, "attention_mask": mask}
    if chosen:
        call = {k: v.view(BATCH, CHOICES, LENGTH) for k, v in call.items()}
    if seq2seq and ("ForConditional" in name or "MTModel" in name or name.endswith("Model")):
        call["decoder_input_ids"] = draw(BATCH, TARGET)
        labels = draw(BATCH, TARGET)
    if "SequenceClassification" in name:
        return call | {"labels": draw(BATCH, low=0, high=3)}
    if "MultipleChoice" in name:
        return call | {"labels": draw(BATCH, low=0, high=CHOICES)}
    if "DoubleHeads" in name:
        labels = draw(BATCH, CHOICES, LENGTH).masked_fill(call["attention_mask"] == 0, -100)
        last = call["attention_mask"].sum(-1) - 1
        del call["attention_mask"]
        return call | {"mc_token_ids": last, "labels": labels, "mc_labels": draw(BATCH, low=0, high=CHOICES)}
    if "QuestionAnswering" in name:
        return call | {"start_positions": draw(BATCH, low=0, high=2), "end_positions": draw(BATCH, low=0, high=4)}
    if "NextSentence" in name:
        return call | {"labels": draw(BATCH, low=0, high=2)}
    if name == "ElectraForPreTraining":
        return call | {"labels": draw(BATCH, LENGTH, low=0, high=2)}
    if "ForPreTraining" in name:
        pair = "next_sentence_label" if name.startswith("Bert") else "sentence_order_label"
        return call | {"labels": labels, pair: draw(BATCH, low=0, high=2)}
    if "TokenClassification" in name:
        return call | {"labels": labels.clamp(max=2)}
    if name.endswith("Model") and "LMHead" not in name and "MT" not in name:
        return call
    return call | {"labels": labels}


def real_parts(output, call: dict) -> dict[str, torch.Tensor]:
    """The output's tensors at the positions that are not padding."""
    found = {}
    several = {k: v for k, v in output.items() if isinstance(v, tuple)}
    flat = {f"{key}.{i}": value for key, values in several.items() for i, value in enumerate(values)}
    for key, value in (dict(output.items()) | flat).items():
        if not isinstance(value, torch.Tensor):
            continue
        mask = call.get("attention_mask", call["input_ids"] * 0 + 1)
        if value.shape[:1] != mask.shape[:1]:  # multiple choice has one row per choice
            mask = mask.flatten(0, -2)
        seen = key.startswith("encoder") or "decoder_input_ids" not in call
        if seen and value.dim() >= mask.dim() and value.shape[: mask.dim()] == mask.shape:
            value = value[mask.bool()]
        found[key] = value
    return found
