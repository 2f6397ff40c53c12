"""Under an untested release of transformers there is one warning, and every result is that of transformers."""

import os
import pathlib
import subprocess
import sys

import pytest

_START = """
import copy, os, sys, warnings
os.environ["HF_HUB_OFFLINE"] = "1"
import torch, transformers as hf
from numerics import assert_as_accurate
hf.__version__ = "5.99.0"
seen = []
warnings.showwarning = lambda message, *rest, **more: seen.append(str(message))
warnings.simplefilter("always")
import transformer_fast as tf
from transformer_fast.generation import mixin
kept = mixin.sample
torch.manual_seed(0)
def config():
    return hf.GPT2Config(vocab_size=61, n_embd=32, n_layer=2, n_head=4, n_positions=40, initializer_range=0.4)
def compare(**options):
    theirs, ours = hf.GPT2LMHeadModel(config()).eval(), tf.GPT2LMHeadModel(config()).eval()
    ours.load_state_dict(theirs.state_dict())
    ids = torch.tensor([[0, 0, 7, 9], [5, 4, 3, 2]])
    call = {"attention_mask": (ids != 0).long(), "max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    for beams in (1, 3):
        assert torch.equal(ours.generate(ids, num_beams=beams, **call), theirs.generate(ids, num_beams=beams, **call))
    many = torch.randint(61, (16, 8))  # of a few numbers the largest error of either is chance
    results = (model(many).logits.detach() for model in (ours, copy.deepcopy(theirs).double(), theirs))
    assert_as_accurate(*results)
    assert list(ours(ids)) == list(theirs(ids))
    return ours
def said(word):
    return [text for text in seen if word in text]
"""
_AGREES = """
ours = compare()
assert not ours.runs_as_hugging_face and type(ours.transformer) is tf.GPT2Model
assert len(said("is not one of the releases")) == 1 and "5.17 to 5.24" in said("is not one of")[0], seen
called = []
mixin.sample = lambda *args, **kwargs: called.append(1) or kept(*args, **kwargs)
compare()
assert called  # by the engine
bert = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
for name, settings in (
    ("T5ForConditionalGeneration", hf.T5Config(vocab_size=61, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4)),
    ("ModernBertForSequenceClassification", hf.ModernBertConfig(**bert, pad_token_id=0)),
    ("RobertaForCausalLM", hf.RobertaConfig(**bert, is_decoder=True)),
    ("CamembertForSequenceClassification", hf.CamembertConfig(**bert)),
    ("ElectraForPreTraining", hf.ElectraConfig(**bert)), ("MPNetForMultipleChoice", hf.MPNetConfig(**bert)),
    ("BertForMaskedLM", hf.BertConfig(**bert)), ("BertLMHeadModel", hf.BertConfig(**bert, is_decoder=True)),
    ("BartForSequenceClassification", hf.BartConfig(vocab_size=61, d_model=32, encoder_layers=1, decoder_layers=1)),
    ("OpenAIGPTLMHeadModel", hf.OpenAIGPTConfig(vocab_size=61, n_embd=32, n_layer=1, n_head=4)),
    ("GPT2DoubleHeadsModel", config()),
    ("TransformerForConditionalGeneration", tf.TransformerConfig(d_model=32, ffn_dim=48, vocab_size=61)),
):
    model = getattr(tf, name)(settings)
    assert not model.runs_as_hugging_face, (type(model), seen)
assert not said("for a tiny model differs"), seen
"""
_WRONG_TOKENS = """
mixin.sample = lambda stepper, input_ids, *args, **kwargs: torch.cat((input_ids, input_ids[:, :1]), 1)
ours = compare()
assert ours.runs_as_hugging_face and type(ours.transformer) is hf.GPT2Model
assert len(said("GPT2LMHeadModel runs as transformers' own, for a tiny model differs (generate")) == 1, seen
compare()
assert len(said("for a tiny model differs")) == 1  # found once
with __import__("tempfile").TemporaryDirectory() as folder:
    ours.save_pretrained(folder)
    assert tf.GPT2LMHeadModel.from_pretrained(folder).runs_as_hugging_face
"""
_WRONG_FORWARD = """
import transformer_fast.models.gpt2 as gpt2
def broken(*args, **kwargs):
    raise AttributeError("a name that the release has not")
gpt2.run_stack = broken
ours = compare()
assert ours.runs_as_hugging_face
assert len(said("GPT2LMHeadModel runs as transformers' own, for a tiny model differs (AttributeError:")) == 1, seen
"""


@pytest.mark.parametrize("code", [_AGREES, _WRONG_TOKENS, _WRONG_FORWARD], ids=["agrees", "tokens", "forward"])
def test_newer_release(code):
    path = os.pathsep.join([str(pathlib.Path(__file__).parent), os.environ.get("PYTHONPATH", "")])  # for numerics.py
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", _START + code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
