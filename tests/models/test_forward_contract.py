"""Every public forward: HF's signature, the cache under each of its names, and no ignored arguments."""

import inspect

import pytest
import torch
import transformers
from transformers.cache_utils import DynamicCache

import transformer_fast as tf
from transformer_fast import _EXPORTS
from transformer_fast._transformers import CACHE_NAME

_FAMILIES = ("albert", "bart", "bert", "camembert", "deberta_v2", "distilbert", "electra", "gpt2", "gpt_neo",
             "gpt_neox", "llama", "m2m_100", "marian", "mbart", "modernbert", "mpnet", "mt5", "openai_gpt", "opt",
             "pegasus", "phi", "roberta", "t5", "umt5", "xlm_roberta")  # fmt: skip
NAMES = [name for family in _FAMILIES for name in _EXPORTS[f"models.{family}"]]
STACKS = [("opt", "OPTDecoder"),
          ("bart", "BartEncoder"), ("bart", "BartDecoder"), ("marian", "MarianEncoder"), ("marian", "MarianDecoder"),
          ("mbart", "MBartEncoder"), ("mbart", "MBartDecoder"),
          ("pegasus", "PegasusEncoder"), ("pegasus", "PegasusDecoder"),
          ("m2m_100", "M2M100Encoder"), ("m2m_100", "M2M100Decoder"), ("umt5", "UMT5Stack"),
          ("t5", "T5Stack")]  # fmt: skip


def _pairs():
    for name in NAMES:
        yield getattr(tf, name), getattr(transformers, name)
    for family, name in STACKS:
        ours = getattr(__import__(f"transformer_fast.models.{family}", fromlist=[name]), name)
        yield ours, ours.__mro__[[c.__module__.startswith("transformers.") for c in ours.__mro__].index(True)]


@pytest.mark.quick
@pytest.mark.parametrize("ours, theirs", list(_pairs()), ids=lambda c: c.__name__)
def test_signature_is_that_of_this_release(ours, theirs):
    seen, wanted = (list(inspect.signature(c.forward).parameters) for c in (ours, theirs))
    named = [name for name in wanted if name not in ("kwargs", "args")]
    assert seen[: len(named)] == named
    assert ours.forward.__doc__.startswith((theirs.forward.__doc__ or "").rstrip())


@pytest.mark.quick
def test_arguments_by_position_are_those_of_this_release():
    config = transformers.OpenAIGPTConfig(vocab_size=61, n_embd=32, n_layer=2, n_head=4, n_positions=40)
    torch.manual_seed(0)
    model, ids = tf.OpenAIGPTLMHeadModel(config).eval(), torch.randint(3, 61, (2, 5))
    out = model(ids, None, None, None, None, None, True, True)  # ..., labels, output_attentions, output_hidden_states
    assert len(out.attentions) == 2 and len(out.hidden_states) == 3 and out.logits.shape == (2, 5, 61)
    with pytest.raises(TypeError, match="multiple values for argument 'output_attentions'"):
        model(ids, None, None, None, None, None, True, output_attentions=True)
    with pytest.raises(TypeError, match="too many"):
        model(ids, *[None] * 20)


def _gpt2(cls=tf.GPT2LMHeadModel, **changes):
    torch.manual_seed(0)
    settings = {"vocab_size": 61, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 40, "pad_token_id": 0}
    return cls(transformers.GPT2Config(**settings, **changes)).eval()


@pytest.mark.quick
def test_cache_under_every_name():
    model, ids = _gpt2(), torch.randint(3, 61, (2, 7))
    with torch.no_grad():
        whole = model(ids).logits[:, -1]
        for name in ("past_key_values", "cache", "cache_params"):
            out = model(ids[:, :-1], use_cache=True)
            assert out[CACHE_NAME] is out.past_key_values and out.past_key_values.get_seq_length() == 6
            torch.testing.assert_close(model(ids[:, -1:], **{name: out.past_key_values}).logits[:, -1], whole)
            assert out.past_key_values.get_seq_length() == 7  # the passed cache was written to
        assert list(model(ids, use_cache=True).keys()) == ["logits", CACHE_NAME]


@pytest.mark.quick
def test_cache_is_handed_on_by_heads():
    model, ids = _gpt2(tf.GPT2ForQuestionAnswering), torch.randint(3, 61, (2, 7))
    with pytest.raises(TypeError):  # as in HF: this head has no cache
        model(ids, cache=DynamicCache())
    config = transformers.BertConfig(
        vocab_size=61, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, is_decoder=True
    )
    base, head = tf.BertModel(config).eval(), tf.BertForTokenClassification(config).eval()
    head.bert.load_state_dict(base.state_dict(), strict=False)
    with torch.no_grad():
        for name in ("past_key_values", "cache"):
            cache = base(ids[:, :4], use_cache=True).past_key_values
            head(ids[:, 4:], **{name: cache})
            assert cache.get_seq_length() == 7


@pytest.mark.quick
def test_two_different_caches_are_refused():
    model, ids, cache = _gpt2(), torch.randint(3, 61, (2, 3)), DynamicCache()
    assert model(ids, cache=cache, past_key_values=cache).past_key_values is cache
    assert model(ids, cache=None, past_key_values=cache).past_key_values is cache
    with pytest.raises(ValueError, match="past_key_values, cache: are names of one argument of GPT2LMHeadModel"):
        model(ids, cache=cache, past_key_values=DynamicCache())


@pytest.mark.quick
@pytest.mark.parametrize("name", ["past_key_value", "kv_cache", "mems", "layer_past", "past_buckets_states"])
def test_unknown_cache_keywords_are_refused(name):
    model, ids = _gpt2(), torch.randint(3, 61, (2, 3))
    with pytest.raises(TypeError, match=f"{name}: GPT2LMHeadModel.forward knows no such argument"):
        model(ids, **{name: DynamicCache()})
    assert model(ids, **{name: None}, use_cache=False, cache_position=torch.arange(3)).past_key_values is None


@pytest.mark.quick
@pytest.mark.parametrize("name", ["past_key_values", "cache"])
def test_models_without_a_cache_refuse_one(name):
    config = transformers.DistilBertConfig(vocab_size=61, dim=32, n_layers=1, n_heads=4, hidden_dim=48)
    ids = torch.randint(3, 61, (2, 3))
    for cls in (tf.DistilBertModel, tf.DistilBertForTokenClassification):
        model = cls(config).eval()
        with pytest.raises(TypeError, match="keeps no cache"):
            model(ids, **{name: DynamicCache()})
        model(ids, **{name: None})


@pytest.mark.quick
def test_own_families():
    config = tf.TransformerConfig(
        vocab_size=61, encoder_vocab_size=61, d_model=32, encoder_layers=1, decoder_layers=1,
        encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48,
    )  # fmt: skip
    torch.manual_seed(0)
    model = tf.TransformerForConditionalGeneration(config).eval()
    ids, target = torch.randint(3, 61, (2, 5)), torch.randint(3, 61, (2, 4))
    assert CACHE_NAME in inspect.signature(model.forward).parameters
    with torch.no_grad():
        whole = model(ids, decoder_input_ids=target).logits[:, -1]
        for name in ("past_key_values", "cache"):
            cache = model(ids, decoder_input_ids=target[:, :3], use_cache=True).past_key_values
            out = model(ids, decoder_input_ids=target[:, 3:], **{name: cache})
            torch.testing.assert_close(out.logits[:, -1], whole)
