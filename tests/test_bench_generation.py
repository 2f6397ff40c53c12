"""The generation cases compare equal work: other engines return Hugging Face's tokens."""

import importlib.util

import pytest
import torch
from transformer_fast.benchmarks import cases

GREEDY = ["gpt2-b8", "marian-greedy-b8", "t5-small-greedy-b8", "nllb-600m-greedy-b8", "smollm-135m-b8", "qwen3-0.6b-b8"]


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("TRANSFORMER_FAST_BENCHMARK_CACHE", str(tmp_path))


def needs(package: str):
    absent = importlib.util.find_spec(package) is None
    return pytest.mark.skipif(absent, reason=f"{package} is not installed: see CONTRIBUTING.md")


@needs("openvino")
@pytest.mark.parametrize("name", GREEDY)
def test_openvino_generates_hugging_faces_tokens(name):
    case = cases.find(f"generation/{name}")
    inputs = case.inputs(True)
    expected = case.candidate(case.peer).prepare(inputs)()
    call = case.candidate("OpenVINO float32").prepare(inputs)
    assert all(torch.equal(call(), expected) for _ in range(2))  # the cache must start empty in every call
    rounded = case.candidate("OpenVINO int8").prepare(inputs)()
    assert rounded.shape == expected.shape and torch.equal(rounded[:, 0], expected[:, 0])


MORE = ["nllb-600m-greedy-b8", "mbart-large-beam4-b8", "smollm-135m-b8", "qwen3-0.6b-b8", "qwen3-0.6b-b1-int8"]


@pytest.mark.parametrize("name", MORE)
def test_both_generate_as_many_tokens(name):
    case = cases.find(f"generation/{name}")
    inputs = case.inputs(True)
    found = [case.candidate(name).prepare(inputs)() for name in (case.candidates[0].name, case.peer)]
    assert found[0].shape == found[1].shape
    if "int8" not in name:
        assert torch.equal(*found)


@needs("ctranslate2")
@pytest.mark.parametrize("name", ["gpt2-b8", "marian-greedy-b8", "mbart-large-beam4-b8", *MORE[:1], *MORE[2:4]])
def test_ctranslate2_generates_hugging_faces_tokens(name):
    case = cases.find(f"generation/{name}")
    inputs = case.inputs(True)
    expected = case.candidate(case.peer).prepare(inputs)()[:, -inputs.tokens :].tolist()
    found = case.candidate("CTranslate2 float32").prepare(inputs)()
    for row, tokens in zip(found, expected, strict=True):
        (theirs,) = getattr(row, "sequences", None) or row.hypotheses
        assert len(theirs) == inputs.tokens
        assert theirs[:-1] == [f"t{token}" for token in tokens[:-1]]  # Hugging Face may end by force


def test_openvino_refuses_padded_prompts_without_an_encoder():
    from transformer_fast.benchmarks.case import Unavailable
    from transformer_fast.benchmarks.openvino_generation import openvino_generation

    inputs = cases.find("generation/gpt2-b8").inputs(True)
    inputs.mask[1, 3:] = 0
    with pytest.raises(Unavailable, match="one length"):
        openvino_generation(inputs)
