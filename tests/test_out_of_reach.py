"""Checkpoints that are missing, unreachable, truncated or of an unknown family: a clear error at once, with advice."""

import argparse
import socket

import huggingface_hub
import pytest
import transformers
from hf_models import ENCODERS, batch, run, truth
from numerics import assert_as_accurate

import transformer_fast as tf
from transformer_fast.demo.checkpoint import given
from transformer_fast.models import _loading
from transformer_fast.pipelines import factory


@pytest.fixture(params=["offline", "no network"])
def cut_off(request, monkeypatch):
    """Make the hub unreachable; yields the part of the message that says so."""
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", request.param == "offline")
    tried: list = []

    def refuse(address, timeout):
        tried.append(address)
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "create_connection", refuse)
    yield "HF_HUB_OFFLINE is set" if request.param == "offline" else "cannot be reached: [Errno -2] Name or service"
    assert len(tried) <= 1  # the hub's client would retry for half a minute


@pytest.mark.parametrize("load", [tf.BertModel.from_pretrained, tf.AutoModel.from_pretrained, given])
def test_a_name_that_only_the_hub_has(load, cut_off):
    with pytest.raises((OSError, argparse.ArgumentTypeError)) as error:
        load("somebody/no-such-model")
    assert "'somebody/no-such-model': there is no such folder" in str(error.value) and cut_off in str(error.value)
    assert "run `hf download somebody/no-such-model`" in str(error.value)


def test_a_pipeline_without_a_model(cut_off):
    with pytest.raises(OSError) as error:
        tf.pipeline("summarization")
    assert str(error.value).startswith("model: none was given for 'summarization', and the default cannot be loaded: ")
    assert "'sshleifer/distilbart-cnn-12-6'" in str(error.value) and cut_off in str(error.value)


def test_a_cached_name_needs_no_network(monkeypatch, cut_off):
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_, **__: "/cache/config.json")
    _loading.need_hub("somebody/cached", {})


def test_the_hub_is_left_to_a_proxy(monkeypatch, cut_off):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("https_proxy", "http://proxy.example:3128")
    _loading.need_hub("somebody/else", {})


@pytest.mark.parametrize("name", ["./nosuch", "no such", "a/b/c"])
def test_paths_that_are_not_there(name):
    with pytest.raises(argparse.ArgumentTypeError, match="there is no (such )?folder"):
        given(name)


@pytest.mark.parametrize("dropped", ["from_tf", "from_flax", "from_pt"])
@pytest.mark.parametrize("load", [tf.BertModel.from_pretrained, tf.AutoModel.from_pretrained])
def test_arguments_of_transformers_4(dropped, load):
    with pytest.raises(ValueError, match=f"{dropped}: transformers 5 only has PyTorch models"):
        load("anything", **{dropped: True})


def _missing(monkeypatch, *modules):
    find = factory.importlib.util.find_spec
    monkeypatch.setattr(
        factory.importlib.util, "find_spec", lambda name, *a: None if name in modules else find("torch", *a)
    )


@pytest.mark.parametrize(
    "modules, install",
    [
        (["sentencepiece", "google.protobuf"], "sentencepiece protobuf"),
        (["google.protobuf"], "protobuf"),
        (["sentencepiece"], "sentencepiece"),
    ],
)
def test_packages_that_a_tokenizer_needs(modules, install, monkeypatch):
    def fail(*_, **__):
        raise ValueError("Converting from SentencePiece and Tiktoken failed; `tiktoken` is required")

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", fail)
    _missing(monkeypatch, *modules)
    with pytest.raises(ImportError) as error:
        factory._load_tokenizer("somewhere")
    needed = install.replace(" ", " and ")
    assert str(error.value) == f"somewhere: its tokenizer needs {needed}, not installed here: pip install {install}"


@pytest.fixture
def ernie(tmp_path):
    ENCODERS["ernie"]().save_pretrained(tmp_path)
    return tmp_path


def test_a_family_that_is_not_ours_is_transformers_own(ernie):
    with pytest.warns(UserWarning, match=r"no class for model_type 'ernie'; transformers' own .* with accelerate\(\)"):
        model = tf.AutoModel.from_pretrained(ernie)
    assert type(model) is transformers.ErnieModel and not tf.is_ours(model)
    assert model.config._attn_implementation == "transformer_fast"
    assert not tf.accelerate(model, verbose=False).swapped  # everything is already accelerated
    with pytest.warns(UserWarning, match="unchanged, as attn_implementation is given"):
        chosen, info = tf.AutoModel.from_pretrained(ernie, attn_implementation="eager", output_loading_info=True)
    assert chosen.config._attn_implementation == "eager" and not info["missing_keys"]
    with pytest.warns(UserWarning, match="with accelerate"):
        model, info = tf.AutoModel.from_pretrained(ernie, output_loading_info=True)
    assert model.config._attn_implementation == "transformer_fast"
    call = batch("right")
    assert_as_accurate(run(model, call), run(truth(chosen), call), run(chosen, call))
    with pytest.warns(UserWarning, match="no class for model_type 'ernie'"):
        headed = tf.AutoModelForSequenceClassification.from_config(model.config)
    assert type(headed) is transformers.ErnieForSequenceClassification


def test_a_cut_off_file_of_another_family_is_named(ernie):
    file = ernie / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-500])
    with pytest.warns(UserWarning), pytest.raises(ValueError) as error:
        tf.AutoModel.from_pretrained(ernie)
    assert str(error.value).startswith(f"{file}: is truncated or corrupt")
    with pytest.raises(ValueError) as error:
        tf.pipeline("feature-extraction", model=ernie)
    assert str(error.value).startswith(f"{file}: is truncated or corrupt")
