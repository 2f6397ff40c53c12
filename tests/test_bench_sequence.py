"""The plain PyTorch versions of this package's own models have the same weights, losses, gradients and tokens."""

import copy

import pytest
import torch
from numerics import GRADIENT, assert_as_accurate
from transformer_fast.benchmarks import cases
from transformer_fast.benchmarks.packed_cases import packed_cases
from transformer_fast.benchmarks.sequence_cases import MODELS, sequence_cases

import transformer_fast as tf

CASES = {case.name: case for case in sequence_cases("cpu")}


@pytest.fixture(scope="module", autouse=True)
def own_folder(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRANSFORMER_FAST_BENCHMARK_CACHE", str(tmp_path_factory.mktemp("checkpoints")))
        yield


def names(kind: str) -> list[str]:
    return [name for name in CASES if name.startswith(kind)]


@pytest.mark.parametrize("name", list(MODELS))
def test_plain_pytorch_is_the_same_model(name):
    case = CASES[f"training/{name}-ragged-16"]
    given = case.inputs(True)
    cls, plain_class, _, _ = MODELS[name]
    ours = getattr(tf, cls).from_pretrained(given.checkpoint).eval()  # without dropout
    plain = plain_class(copy.deepcopy(ours)).eval()
    models = ours, copy.deepcopy(plain).double(), plain
    assert len({sum(p.numel() for p in m.parameters()) for m in models}) == 1
    outputs = [m(input_ids=given.ids, attention_mask=given.mask, labels=given.labels) for m in models]
    real = given.labels != -100
    assert_as_accurate(*(torch.cat((o.logits[real].flatten(), o.loss[None])) for o in outputs), name="logits and loss")
    for output in outputs:
        output.loss.backward()
    words = ours.model.decoder.embed_tokens, models[1].words, plain.words
    assert_as_accurate(*(w.weight.grad for w in words), factor=GRADIENT, name="gradient of the words")


@pytest.mark.parametrize("name", names("generation/"))
def test_every_loop_gives_the_same_tokens(name):
    inputs = CASES[name].inputs(True)
    tokens = [candidate.prepare(inputs)() for candidate in CASES[name].candidates]
    assert tokens[0].shape == (2, 1 + inputs.tokens)
    assert all(torch.equal(found, tokens[0]) for found in tokens[1:])


@pytest.mark.parametrize("name", names("training/"))
def test_training_steps_have_dropout(name):
    for candidate in CASES[name].candidates:
        if not candidate.slow:
            step = candidate.prepare(CASES[name].inputs(True))
            losses = torch.stack([step() for _ in range(3)])
            assert losses.isfinite().all() and len(losses.unique()) == 3, candidate.name


@pytest.mark.quick
@pytest.mark.parametrize("name", names("recurrence/"))
def test_recurrent_layers_are_torchs(name):
    given = CASES[name].inputs(True)
    ours, theirs = (candidate.prepare(given)() for candidate in CASES[name].candidates)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.quick
def test_sequence_cases_are_among_all():
    assert set(CASES) <= {case.name for case in cases.all_cases("cpu")}
    assert not sequence_cases("cuda")


def test_packed_documents_have_the_loss_of_the_padded_batch():
    (case,) = packed_cases("cpu")
    given = case.inputs(True)
    assert given.packed["input_ids"].shape == (1, 8) and given.padded["input_ids"].shape == (2, 5)
    losses = {c.name: torch.stack([step() for step in [c.prepare(given)] * 2]) for c in case.candidates}
    for name, found in losses.items():
        torch.testing.assert_close(found, losses[case.peer], msg=name)
        assert found[0] != found[1]
