"""generate() by the native step: the tokens of the model's own forward, whatever the prompts and the method."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import BartConfig, GPT2Config, MarianConfig, T5Config
from transformers.models.bart.modeling_bart import BartForConditionalGeneration
from transformers.models.gpt2 import modeling_gpt2 as hf
from transformers.models.marian.modeling_marian import MarianMTModel
from transformers.models.t5.modeling_t5 import T5ForConditionalGeneration

import transformer_fast as tf
from transformer_fast.backends import native
from transformer_fast.generation import set_weight_storage
from transformer_fast.generation.native_step import NativeStepper

if native.load():
    pytest.skip(native.load(), allow_module_level=True)

VOCABULARY = 53


@pytest.fixture
def served(monkeypatch):
    """The number of native steppers that were started."""
    count = []
    start = NativeStepper.start
    monkeypatch.setattr(NativeStepper, "start", lambda self: (count.append(1), start(self))[1])
    return count


def models(seed=0, **options):
    """HF's GPT-2 and ours with the same weights, large enough for decided next tokens."""
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=64, n_embd=32, n_layer=2, n_head=4, initializer_range=0.4,
        bos_token_id=0, eos_token_id=1, pad_token_id=2, **options,
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


METHODS = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "n-best": {"num_beams": 4, "num_return_sequences": 3, "length_penalty": 0.4, "early_stopping": True},
    "penalties": {"repetition_penalty": 1.4, "no_repeat_ngram_size": 2, "min_new_tokens": 4},
    "sampled": {"do_sample": True, "top_k": 9, "num_return_sequences": 3},
}


@pytest.mark.parametrize("method", METHODS)
def test_same_tokens_as_hugging_face(served, method):
    @settings(max_examples=4, deadline=None, derandomize=True)
    @given(seed=st.integers(0, 50), batch=st.integers(1, 4), length=st.integers(1, 9),
           inverse=st.booleans(), side=st.sampled_from(["left", "right"]))  # fmt: skip
    def property(seed, batch, length, inverse, side):
        theirs, ours = models(seed, scale_attn_by_inverse_layer_idx=inverse)
        ids, mask = prompts(batch, length, side)
        kwargs = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False, **METHODS[method]}
        found = []
        for model in (theirs, ours):
            torch.manual_seed(seed)
            found.append(model.generate(ids, **kwargs))
        assert torch.equal(*found)

    property()
    assert len(served) >= 4


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
    "t5": (T5ForConditionalGeneration, T5Config(**_T5)),
    "t5-v1.1": (
        T5ForConditionalGeneration, T5Config(**_T5, feed_forward_proj="gated-gelu", tie_word_embeddings=False)
    ),
}  # fmt: skip


@pytest.mark.parametrize("beams", [1, 4])
@pytest.mark.parametrize("family", SEQ2SEQ)
def test_encoder_decoders_as_hugging_face(served, family, beams):
    seen: set[int] = set()
    for seed in range(3):
        torch.manual_seed(seed)
        cls, config = SEQ2SEQ[family]
        theirs, ours = cls(config).eval(), getattr(tf, cls.__name__)(config).eval()
        if family in ("bart", "marian"):
            theirs.final_logits_bias.normal_()
        if family == "t5-v1.1":
            torch.nn.init.normal_(theirs.lm_head.weight)
        ours.load_state_dict(theirs.state_dict())
        ids, mask = prompts(3, 9, "right")
        kwargs = {"attention_mask": mask, "max_new_tokens": 14, "num_beams": beams, "do_sample": False}
        found = [model.generate(ids, **kwargs) for model in (theirs, ours)]
        assert torch.equal(*found)
        seen |= set(found[0].flatten().tolist())
    assert len(served) == 3 and len(seen) > 6


@pytest.mark.quick
def test_scores_and_cache_of_a_generation(served):
    theirs, ours = models()
    ids, mask = prompts(3, 7, "left")
    kwargs = {"attention_mask": mask, "max_new_tokens": 9, "do_sample": False, "return_dict_in_generate": True}
    theirs = theirs.generate(ids, output_logits=True, **kwargs)
    found = ours.generate(ids, output_logits=True, **kwargs)
    assert torch.equal(found.sequences, theirs.sequences) and len(found.logits) == len(theirs.logits)
    assert len({id(x) for x in found.logits}) == len(found.logits)
    for a, b in zip(found.logits, theirs.logits):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-3 * float(b.abs().max()))
    keys, seen = found.past_key_values.layers[1].keys, mask[:, None, :, None].bool()
    wanted = theirs.past_key_values.layers[1].keys
    assert keys.shape == wanted.shape
    assert torch.allclose(keys[:, :, :7] * seen, wanted[:, :, :7] * seen, rtol=1e-3, atol=1e-3)
    assert torch.allclose(keys[:, :, 7:], wanted[:, :, 7:], rtol=1e-3, atol=1e-3)
    assert served


def test_bfloat16_models_and_storage(served):
    """Half precision decides as the model's own forward does wherever the two best tokens are not close."""
    _, ours = models()
    ids, mask = prompts(4, 6, "left")
    kwargs = {"attention_mask": mask, "max_new_tokens": 1, "do_sample": False}
    truth = ours(ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits[:, -1]
    best = truth.topk(2)[0]
    decided = best[:, 0] - best[:, 1] > 0.1 * truth.abs().amax(1)
    set_weight_storage(ours, torch.bfloat16)
    stored = ours.generate(ids, **kwargs)[:, -1]
    assert torch.equal(stored[decided], truth.argmax(1)[decided])
    ours.bfloat16()
    half = ours.generate(ids, **kwargs)[:, -1]
    assert torch.equal(half[decided], truth.argmax(1)[decided])
    assert decided.any() and len(served) == 2


def test_what_the_native_step_leaves_to_the_model(served):
    theirs, ours = models()
    ids, mask = prompts(2, 5, "left")
    kwargs = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False}
    wanted = theirs.generate(ids, **kwargs)
    seen = []
    hook = ours.transformer.h[1].mlp.c_fc.register_forward_hook(lambda *a: seen.append(1))
    assert torch.equal(ours.generate(ids, **kwargs), wanted) and len(seen) == 6 and not served
    hook.remove()
    assert torch.equal(ours.generate(ids, **kwargs), wanted) and served
    count = len(served)
    ours.double()
    assert torch.equal(ours.generate(ids, **kwargs), wanted) and len(served) == count


def test_training_between_generations(served):
    """An optimizer's step changes what the next generation sees."""
    theirs, ours = models(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    ids, mask = prompts(2, 5, "right")
    ours.generate(ids, attention_mask=mask, max_new_tokens=3)
    for model in (theirs, ours):
        model.train()
        optimizer = torch.optim.SGD(model.parameters(), 0.05)
        model(ids, attention_mask=mask, labels=ids).loss.backward()
        optimizer.step()
        model.eval()
    kwargs = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False}
    assert torch.equal(ours.generate(ids, **kwargs), theirs.generate(ids, **kwargs))
