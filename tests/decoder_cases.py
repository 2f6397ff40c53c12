"""Tiny decoders with the same random weights: Hugging Face's, ours, and Hugging Face's in float64."""

import torch
import transformers
from hf_models import truth

import transformer_fast

VOCABULARY, BATCH, LENGTH = 61, 12, 13
_COMMON = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 48, "max_position_embeddings": 48, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.15, "num_labels": 4,
}  # fmt: skip
FAMILIES = {
    "Llama": {},
    "Mistral": {"sliding_window": 4},
    "Qwen2": {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    "Qwen3": {"head_dim": 16},
    "Gemma2": {
        "head_dim": 8, "sliding_window": 4, "query_pre_attn_scalar": 12, "attn_logit_softcapping": 3.0,
        "final_logit_softcapping": 5.0,
    },
    "GPTNeoX": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
    "Phi": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
    "OPT": {"ffn_dim": 48, "init_std": 0.15, "dropout": 0.0},
    "GPTNeo": {
        "num_layers": 3, "num_heads": 4, "attention_types": [[["global", "local"], 1], [["local"], 1]],
        "window_size": 4,
    },
}  # fmt: skip
SWITCHES = {
    "biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "one key head": ("Llama", {"num_key_value_heads": 1}),
    "no shared key heads": ("Llama", {"num_key_value_heads": 4}),
    "wide heads": ("Mistral", {"head_dim": 24}),
    "scaled positions": ("Llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}),
    "positions of Llama 3": ("Llama", {"rope_parameters": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16, "rope_theta": 1e4,
    }}),
    "positions that change with the length": ("Llama", {"max_position_embeddings": 8, "rope_parameters": {
        "rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4,
    }}),
    "positions of YaRN": ("Llama", {"rope_parameters": {
        "rope_type": "yarn", "factor": 3.0, "original_max_position_embeddings": 16, "rope_theta": 1e4,
    }}),
    "positions of LongRoPE": ("Llama", {"rope_parameters": {
        "rope_type": "longrope", "short_factor": [1.0, 1.1, 1.2, 1.5], "long_factor": [1.0, 1.5, 3.0, 4.0],
        "original_max_position_embeddings": 16, "rope_theta": 1e4,
    }}),
    "no window": ("Mistral", {"sliding_window": None}),
    "tied": ("Qwen2", {"tie_word_embeddings": True}),
    "no softcaps": ("Gemma2", {"attn_logit_softcapping": None, "final_logit_softcapping": None}),
    "another activation": ("Llama", {"hidden_act": "quick_gelu"}),
    "sublayers in turn": ("GPTNeoX", {"use_parallel_residual": False}),
    "no biases in attention": ("GPTNeoX", {"attention_bias": False}),
    "norms of heads": ("Phi", {"qk_layernorm": True}),
    "norms after the sublayers": ("OPT", {"do_layer_norm_before": False}),
    "narrow words": ("OPT", {"word_embed_proj_dim": 16}),
    "no biases": ("OPT", {"enable_bias": False, "layer_norm_elementwise_affine": False}),
    "no final norm": ("OPT", {"_remove_final_layer_norm": True}),
    "no local layer": ("GPTNeo", {"attention_types": [[["global"], 3]]}),
}  # fmt: skip


def config_for(family: str, **changes):
    values = _COMMON | FAMILIES[family] | changes
    return getattr(transformers, f"{family}Config")(**values)


def models(family: str, head: str, dtype: torch.dtype = torch.float32, seed: int = 0, **changes):
    """(ours, HF's with plain attention in the same dtype, HF's in float64)."""
    torch.manual_seed(seed)
    name = f"{family}{head}"
    config = config_for(family, **({"num_labels": 2} if head == "ForQuestionAnswering" else {}), **changes)
    theirs = getattr(transformers, name)(config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)  # so that biases are not 0 and norms not 1
    ours = getattr(transformer_fast, name)(config_for(family, **changes, num_labels=config.num_labels)).eval()
    ours.load_state_dict(theirs.to(dtype).state_dict())
    ours.to(dtype)
    exact = truth(theirs)
    theirs.set_attn_implementation("eager")
    return ours, theirs, exact


def batch(padding: str) -> tuple[torch.Tensor, torch.Tensor | None]:
    ids = torch.randint(3, VOCABULARY, (BATCH, LENGTH))
    if padding == "none":
        return ids, None
    lengths = torch.tensor([LENGTH, 4, 1, 9, 6, 11]).repeat(BATCH // 6)[:, None]
    place = torch.arange(LENGTH)
    mask = (place < lengths) if padding == "right" else (place >= LENGTH - lengths)
    return ids * mask, mask.long()
