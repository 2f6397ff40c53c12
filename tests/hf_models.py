"""Tiny random Hugging Face models of many families, and ragged batches for them."""

import copy
import functools

import torch
import transformers as hf
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface

VOCABULARY = 61
LENGTHS = (9, 4, 1, 7)


def _build(model_class, config_class, **settings):
    config = config_class(**settings)
    config._attn_implementation = "eager"
    torch.manual_seed(1)
    model = model_class(config)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, p in model.named_parameters():
            # Freshly initialised models attend almost uniformly. Larger weights make attention matter. T5 does not
            # scale its scores; its queries are smaller instead.
            noise = torch.randn(p.shape, generator=generator)
            p.copy_((0.07 if name.endswith(".q.weight") else 0.2) * noise if p.dim() > 1 else p + 0.1 * noise)
    return model.eval()


_WIDTH = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
_ENCODER = {**_WIDTH, "intermediate_size": 48, "max_position_embeddings": 40}
_DECODER = {
    **_ENCODER,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_SEQ2SEQ = {
    "vocab_size": VOCABULARY, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 40,
    "pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 2, "forced_eos_token_id": None,
}  # fmt: skip
_T5 = {
    "vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4,
    "relative_attention_num_buckets": 8, "relative_attention_max_distance": 12, "pad_token_id": 0, "eos_token_id": 1,
    "decoder_start_token_id": 0,
}  # fmt: skip

ENCODERS = {
    "bert": lambda: _build(hf.BertModel, hf.BertConfig, **_ENCODER),
    "ernie": lambda: _build(hf.ErnieModel, hf.ErnieConfig, **_ENCODER),  # a family that this package does not have
    "distilbert": lambda: _build(
        hf.DistilBertModel, hf.DistilBertConfig, vocab_size=VOCABULARY, dim=32, n_layers=2, n_heads=4, hidden_dim=48
    ),
    "albert": lambda: _build(hf.AlbertModel, hf.AlbertConfig, **_ENCODER, embedding_size=16),
}
DECODERS = {
    "gpt2": lambda: _build(
        hf.GPT2LMHeadModel, hf.GPT2Config, vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=40,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    ),
    "gpt_neox": lambda: _build(
        hf.GPTNeoXForCausalLM, hf.GPTNeoXConfig, **_ENCODER, bos_token_id=1, eos_token_id=2, pad_token_id=0
    ),
    "llama": lambda: _build(hf.LlamaForCausalLM, hf.LlamaConfig, **_DECODER),
    "mistral": lambda: _build(hf.MistralForCausalLM, hf.MistralConfig, **_DECODER, sliding_window=3),
    "gemma2": lambda: _build(
        hf.Gemma2ForCausalLM, hf.Gemma2Config, **_DECODER, sliding_window=3, attn_logit_softcapping=2.0,
        query_pre_attn_scalar=8,
    ),
}  # fmt: skip
SEQ2SEQ = {
    "t5": lambda: _build(hf.T5ForConditionalGeneration, hf.T5Config, feed_forward_proj="gated-gelu", **_T5),
    "mt5": lambda: _build(hf.MT5ForConditionalGeneration, hf.MT5Config, **_T5),
    "umt5": lambda: _build(hf.UMT5ForConditionalGeneration, hf.UMT5Config, **_T5),
    "bart": lambda: _build(hf.BartForConditionalGeneration, hf.BartConfig, **_SEQ2SEQ),
    "marian": lambda: _build(hf.MarianMTModel, hf.MarianConfig, **_SEQ2SEQ),
    "pegasus": lambda: _build(hf.PegasusForConditionalGeneration, hf.PegasusConfig, **_SEQ2SEQ),
    "m2m_100": lambda: _build(hf.M2M100ForConditionalGeneration, hf.M2M100Config, **_SEQ2SEQ),
    "mbart": lambda: _build(hf.MBartForConditionalGeneration, hf.MBartConfig, **_SEQ2SEQ),
}  # fmt: skip
TEXT = {**ENCODERS, **DECODERS, **SEQ2SEQ}


def vit():
    return _build(
        hf.ViTModel, hf.ViTConfig, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
        image_size=16, patch_size=4,
    )  # fmt: skip


def _reference_attention(
    module, query, key, value, attention_mask, dropout=0.0, scaling=None, position_bias=None, softcap=None, **kwargs
):
    """Plain attention in query's dtype. Masks are always given and include causality."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    scores = scores if position_bias is None else scores + position_bias
    if attention_mask is not None:
        dead = ~attention_mask.any(-1, keepdim=True)
        scores = scores.masked_fill(~attention_mask, -torch.inf).masked_fill(dead, 0.0)
    weights = torch.softmax(scores, -1)
    return (weights @ value).transpose(1, 2), weights


def _reference_mask(*args, allow_is_causal_skip=None, allow_is_bidirectional_skip=None, **kwargs):
    return sdpa_mask(*args, allow_is_causal_skip=False, allow_is_bidirectional_skip=False, **kwargs)


AttentionInterface.register("float64_reference", _reference_attention)
AttentionMaskInterface.register("float64_reference", _reference_mask)


def truth(model):
    """A copy of the model that computes entirely in float64. (Hugging Face's eager softmax and RMS norms always compute
    in float32, and its softmax gives NaN with a float64 mask.)"""
    exact = exact_norms(cast(model, torch.float64, "float64_reference"))
    for module in exact.modules():
        if type(module).__name__ == "GPTNeoSelfAttention":  # computes scores in float32 itself
            module._attn = functools.partial(_gpt_neo_attention, module)
    return exact


def _gpt_neo_attention(module, query, key, value, attention_mask=None):
    queries, keys = query.shape[2], key.shape[2]
    scores = (query @ key.transpose(-1, -2)).masked_fill(~module.bias[:, :, keys - queries : keys, :keys], -torch.inf)
    weights = torch.softmax(scores if attention_mask is None else scores + attention_mask, -1)
    return weights @ value, weights


def exact_norms(model):
    """The model with RMS norms that compute in its own dtype, where Hugging Face's compute in float32."""
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm") or type(module).__name__.endswith("T5LayerNorm"):
            module.forward = functools.partial(_rms_norm, module, offset="Gemma" in type(module).__name__)
    return model


def _rms_norm(module, x, offset):
    eps = next(getattr(module, name) for name in ("variance_epsilon", "eps") if hasattr(module, name))
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * (module.weight + offset)


def cast(model, dtype: torch.dtype, implementation: str = "eager"):
    """A copy of the model in another dtype, attending through `implementation`."""
    model = copy.deepcopy(model).to(dtype)
    model.set_attn_implementation(implementation)
    return model


def batch(padding: str, *, seq2seq: bool = False, lengths=LENGTHS) -> dict[str, torch.Tensor]:
    """Ragged token ids. padding: "left", "right" or "none"."""
    generator = torch.Generator().manual_seed(3)
    longest = max(lengths)
    ids = torch.randint(3, VOCABULARY, (len(lengths), longest), generator=generator)
    position, length = torch.arange(longest), torch.tensor(lengths)[:, None]
    mask = torch.ones_like(ids)
    if padding != "none":
        mask = ((position < length) if padding == "right" else (position >= longest - length)).long()
    inputs = {"input_ids": ids * mask, "attention_mask": mask}
    if seq2seq:
        inputs["decoder_input_ids"] = torch.randint(3, VOCABULARY, (len(lengths), 6), generator=generator)
    return inputs


def run(model, inputs: dict[str, torch.Tensor], **options) -> torch.Tensor:
    """The model's main output at every position that is not padding: (positions, width)."""
    out = model(**inputs, **options)
    states = out.logits if "logits" in out else out.last_hidden_state
    if "decoder_input_ids" in inputs or "attention_mask" not in inputs:
        return states.flatten(0, 1)
    return states[inputs["attention_mask"].bool()]


def run_with_gradients(model, inputs, **options) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """`run`'s output and the gradient of every parameter for a random cotangent."""
    out = run(model, inputs, **options)
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(4))
    (out * cotangent.to(out)).sum().backward()
    return out.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
