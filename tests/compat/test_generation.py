"""generate() of every decoder gives Hugging Face's tokens and output classes, by this package's engine."""

import pytest
import torch
import transformers
from compat_families import LENGTH, VOCABULARY, make_pair, padding_mask
from hf_models import truth
from numerics import assert_as_accurate
from transformers.cache_utils import DynamicCache, EncoderDecoderCache

import transformer_fast as tf
from transformer_fast._transformers import CACHE_NAME

DECODERS = ("GPT2LMHeadModel", "OpenAIGPTLMHeadModel", "BertLMHeadModel", "BartForCausalLM", "MarianForCausalLM",
            "MBartForCausalLM", "PegasusForCausalLM", "LlamaForCausalLM", "GPTNeoXForCausalLM", "PhiForCausalLM",
            "OPTForCausalLM", "GPTNeoForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM",
            "Gemma2ForCausalLM")  # fmt: skip
SEQ2SEQ = ("T5ForConditionalGeneration", "BartForConditionalGeneration", "MarianMTModel",
           "MBartForConditionalGeneration", "PegasusForConditionalGeneration", "M2M100ForConditionalGeneration",
           "MT5ForConditionalGeneration", "UMT5ForConditionalGeneration")  # fmt: skip
METHODS = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "sampled": {"do_sample": True, "top_k": 9, "num_return_sequences": 2},
}
ROWS = 3


def _prompts():
    generator = torch.Generator().manual_seed(6)
    mask = padding_mask("left", ROWS)
    return torch.randint(3, VOCABULARY, (ROWS, LENGTH), generator=generator).masked_fill(mask == 0, 0), mask


def _generate(model, **options):
    ids, mask = _prompts()
    torch.manual_seed(7)
    settings = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": 2}
    return model.generate(ids, **settings | options)


@pytest.fixture
def no_loop_of_transformers(monkeypatch):
    """Fail if transformers' own loop decodes."""

    def refuse(*args, **kwargs):
        raise AssertionError("transformers' own loop was used")

    for name in ("_sample", "_beam_search"):
        monkeypatch.setattr(transformers.GenerationMixin, name, refuse)


@pytest.mark.parametrize("name", DECODERS + SEQ2SEQ)
def test_tokens(name, request):
    ours, theirs = make_pair(name)
    wanted = {method: _generate(theirs, **options) for method, options in METHODS.items()}
    request.getfixturevalue("no_loop_of_transformers")
    for method, options in METHODS.items():
        assert torch.equal(_generate(ours, **options), wanted[method]), method


@pytest.mark.parametrize("name", ["GPT2LMHeadModel", "T5ForConditionalGeneration"])
def test_output_classes(name, request):
    ours, theirs = make_pair(name)
    details = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    wanted = [_generate(theirs, **METHODS[method], **details) for method in ("greedy", "beams")]
    request.getfixturevalue("no_loop_of_transformers")
    for method, theirs_out in zip(("greedy", "beams"), wanted):
        out = _generate(ours, **METHODS[method], **details)
        assert type(out) is type(theirs_out)
        names = set(out.keys()) | {"decoder_attentions", "encoder_attentions"}
        assert names >= set(theirs_out.keys()) and torch.equal(out.sequences, theirs_out.sequences)
        assert len(out.scores) == len(theirs_out.scores)
        assert type(out[CACHE_NAME]) is type(theirs_out[CACHE_NAME]) and out.past_key_values is out[CACHE_NAME]
        assert out[CACHE_NAME].get_seq_length() == theirs_out[CACHE_NAME].get_seq_length()


@pytest.mark.parametrize("cache_name", ["past_key_values", "cache"])
def test_a_cache_that_is_given_is_used_and_filled(cache_name):
    ours, theirs = make_pair("GPT2LMHeadModel")
    ids = _prompts()[0][:1]
    filled = []
    for model, name in ((ours, cache_name), (theirs, CACHE_NAME)):
        cache = DynamicCache()
        with torch.no_grad():
            model(ids[:, :-1], **{CACHE_NAME: cache})
        out = model.generate(ids, **{name: cache}, max_new_tokens=4, do_sample=False, eos_token_id=None)
        # Again with the resulting cache, one token further.
        again = model.generate(
            torch.cat((out, out[:, :1]), 1), **{name: cache}, max_new_tokens=3, do_sample=False, eos_token_id=None
        )
        filled.append((again, cache.get_seq_length()))
    assert torch.equal(filled[0][0], filled[1][0]) and filled[0][1] == filled[1][1]
    with pytest.raises(ValueError, match="wanted one cache, got different"):
        ours.generate(ids, past_key_values=DynamicCache(), cache=DynamicCache(), max_new_tokens=2)


LEFT = (
    {"cache_implementation": "static"},
    {"use_cache": False},
    {"output_attentions": True, "return_dict_in_generate": True},
    {"prefill_chunk_size": 3},
    {"prompt_lookup_num_tokens": 2},
)


@pytest.mark.parametrize("options", LEFT, ids=lambda o: next(iter(o)))
def test_what_the_engine_leaves_to_transformers(options):
    ours, theirs = make_pair("GPT2LMHeadModel")
    theirs.set_attn_implementation("eager")
    ids = _prompts()[0][:1]
    seen, wanted = (
        model.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0, **options)
        for model in (ours, theirs)
    )
    if not isinstance(wanted, torch.Tensor):
        seen, wanted = seen.sequences, wanted.sequences
    assert torch.equal(seen, wanted)


@pytest.mark.parametrize("name", SEQ2SEQ)
def test_forward_continues_from_its_cache(name):
    ours, theirs = make_pair(name)
    ids, mask = _prompts()
    target = torch.randint(3, VOCABULARY, (ROWS, 5), generator=torch.Generator().manual_seed(8))
    logits = []
    with torch.no_grad():
        for model in (ours, truth(theirs), theirs):
            first = model(ids, attention_mask=mask, decoder_input_ids=target[:, :3], use_cache=True)
            assert isinstance(first[CACHE_NAME], EncoderDecoderCache)
            more = {"encoder_outputs": (first.encoder_last_hidden_state,), CACHE_NAME: first[CACHE_NAME]}
            second = model(attention_mask=mask, decoder_input_ids=target[:, 3:], **more)
            logits.append(second.logits)
    assert_as_accurate(*logits)


def test_own_families():
    torch.manual_seed(0)
    sizes = {"encoder_vocab_size": VOCABULARY, "vocab_size": VOCABULARY, "pad_token_id": 0, "eos_token_id": 2}
    config = tf.AttentionRNNConfig(hidden_size=32, embedding_size=32, **sizes)
    recurrent = tf.AttentionRNNForConditionalGeneration(config)
    own = tf.TransformerForConditionalGeneration(
        tf.TransformerConfig(d_model=32, encoder_layers=2, decoder_layers=2, ffn_dim=48, **sizes)
    )
    for model in (recurrent.eval(), own.eval()):
        for p in model.parameters():
            torch.nn.init.normal_(p, std=0.4)
        wanted = {}
        for method, options in METHODS.items():
            model.runs_as_hugging_face = True  # transformers' loop around our forward
            wanted[method] = _generate(model, **options)
            model.runs_as_hugging_face = False
            assert torch.equal(_generate(model, **options), wanted[method]), (type(model).__name__, method)
