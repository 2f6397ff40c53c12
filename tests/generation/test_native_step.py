"""The native decoding step: the arithmetic of every family, padding, beams, dropped rows, and refusals."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from instruction_sets import running_on
from native_decoders import (
    FAMILIES,
    POSITIONS,
    VOCABULARY,
    Decoder,
    decode,
    random_mask,
    round_weights,
    weights_of,
)  # fmt: skip
from numerics import assert_as_accurate
from transformers.modeling_outputs import BaseModelOutput

from transformer_fast.backends import native
from transformer_fast.generation.native_step import NativeStepper
from transformer_fast.generation.stepper import Prompt
from transformer_fast.generation.weights import kept_copies, set_weight_storage
from transformer_fast.ops.decoder_step import DecoderWeights

if native.load():
    pytest.skip(native.load(), allow_module_level=True)


@pytest.fixture(params=native.supported_isas())
def isa(request):
    with running_on(request.param) as isa:
        yield isa


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def make(family: str, seed: int = 0, dtype: torch.dtype = torch.float32, **options) -> Decoder:
    torch.manual_seed(seed)
    return Decoder(**{**FAMILIES[family], **options}).to(dtype).eval()


def compare(model: Decoder, ids, actual, **inputs):
    double = {k: v.double() if v is not None and v.is_floating_point() else v for k, v in inputs.items()}
    assert_as_accurate(actual, model.to_copy(torch.float64)(ids, **double), model(ids, **inputs))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("copy", [True, False], ids=["copy", "in-place"])
def test_families(isa, family, dtype, copy):
    """Every number of rows that the kernels treat differently, growing caches, padding in prompt and source."""
    for seed, rows in enumerate((1, 9)):
        model = make(family, seed, dtype)
        ids, mask = torch.randint(VOCABULARY, (rows, 18)), random_mask(rows, 18)
        inputs = {"mask": mask}
        if "cross_query" in model.layers[0]:
            states = torch.randn(rows, 7, model.token.embedding_dim, dtype=dtype)
            states_mask = random_mask(rows, 7)
            states_mask[:, 3] = True
            inputs |= {"states": states, "states_mask": states_mask}
        compare(model, ids, decode(model, ids, copy=copy, **inputs), **inputs)
        if dtype == torch.bfloat16 and copy:  # bfloat16 weights are exact in float32
            compare(model, ids, decode(model, ids, storage=torch.float32, **inputs), **inputs)


@pytest.mark.quick
def test_quick():
    model, ids = make("gpt2"), torch.randint(VOCABULARY, (4, 12))
    compare(model, ids, decode(model, ids))


def test_options():
    """Combinations of options that no family has."""

    @settings(max_examples=30, deadline=None, derandomize=True)
    @given(
        width=st.sampled_from([8, 20, 33]),
        heads=st.sampled_from([1, 2, 4]),
        head_dim=st.sampled_from([1, 6, 16, 40]),
        inner=st.sampled_from([5, 32, 70]),
        pre_norm=st.booleans(),
        rms=st.booleans(),
        bias=st.booleans(),
        fused=st.booleans(),
        transposed=st.booleans(),
        gated=st.booleans(),
        activation=st.sampled_from(["gelu", "gelu_tanh", "relu", "silu"]),
        positions=st.booleans(),
        relative=st.booleans(),
        embedding_norm=st.booleans(),
        final_norm=st.booleans(),
        head_bias=st.booleans(),
        embed_scale=st.sampled_from([1.0, 3.5]),
        rows=st.sampled_from([2, 8, 17, 33]),
        copy=st.booleans(),
    )
    def property(rows, copy, **options):
        torch.manual_seed(1)
        model, ids = Decoder(**options).eval(), torch.randint(VOCABULARY, (rows, 9))
        compare(model, ids, decode(model, ids, copy=copy))

    property()


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.int8], ids=str)
@pytest.mark.parametrize("family", ["gpt2", "t5-v1.1"])
def test_narrow_storage(isa, family, storage):
    """Weights that the storage dtype represents exactly give exact results."""
    model, ids = make(family), torch.randint(VOCABULARY, (5, 10))
    inputs = {}
    if "cross_query" in model.layers[0]:
        inputs = {"states": torch.randn(5, 7, model.token.embedding_dim), "states_mask": torch.ones(5, 7).bool()}
    round_weights(model, storage)
    compare(model, ids, decode(model, ids, storage=storage, **inputs), **inputs)
    narrow, wide = weights_of(model, storage).copies.bytes, weights_of(model).copies.bytes
    assert 0 < narrow <= wide / (2 if storage == torch.bfloat16 else 2.5)


def test_long_context():
    model, ids = make("gpt2", layers=1), torch.randint(VOCABULARY, (2, 300))
    model.position = torch.nn.Embedding(302, 24)
    compare(model, ids, decode(model, ids, capacity=300))


@pytest.mark.parametrize("copy", [True, False], ids=["copy", "in-place"])
@pytest.mark.parametrize("rows", [2, 5])
def test_wide_weights_and_threads(copy, rows):
    """The result does not depend on the number of threads, also for (in, out) weights, which are read in parts."""
    torch.manual_seed(0)
    model = Decoder(width=512, heads=8, head_dim=64, inner=2048, cross=False, layers=2).eval()  # enough for threads
    ids, before, found = torch.randint(VOCABULARY, (rows, 6)), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            found.append(decode(model, ids, copy=copy))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(found[0], f) for f in found[1:])
    compare(model, ids, found[0])


# ---- the stepper -----------------------------------------------------------------------------------
def seq2seq_prompt(model, batch: int, copies: int, length: int = 2, max_length: int = 20) -> Prompt:
    states, mask = torch.randn(batch, 6, model.token.embedding_dim), random_mask(batch, 6)
    mask[:, 2] = True
    decoder_mask = torch.ones(batch, length, dtype=torch.int64)
    decoder_mask[0, 0] = 0
    return Prompt(
        torch.randint(VOCABULARY, (batch, length)), copies, max_length,
        {"encoder_outputs": BaseModelOutput(states), "attention_mask": mask.long(),
         "decoder_attention_mask": decoder_mask},
    )  # fmt: skip


@pytest.mark.parametrize("family", ["bart", "t5", "gpt2-scaled"])
def test_beams_and_leaving_rows(family):
    """Random reorders within the beams of each prompt, and dropped rows, compared with whole sequences without a
    cache."""
    batch, copies = 3, 4
    model = make(family)
    prompt = seq2seq_prompt(model, batch, copies)
    assert NativeStepper.why_not(model, prompt) == ""
    stepper = NativeStepper(model, prompt)
    rows = torch.arange(batch * copies) // copies
    ids, source = prompt.input_ids[rows], rows
    mask = prompt.inputs["decoder_attention_mask"][rows] != 0

    def check(logits, rows=slice(None)):
        full = torch.cat([mask, torch.ones(len(ids), ids.shape[1] - mask.shape[1], dtype=torch.bool)], 1)
        states, states_mask = prompt.inputs["encoder_outputs"][0][source], prompt.inputs["attention_mask"][source] != 0
        last = [m(ids, full, None, s, states_mask)[:, -1][rows] for m, s in (
            (model.to_copy(torch.float64), states.double()), (model, states))]  # fmt: skip
        assert_as_accurate(logits, *last)

    check(stepper.start(), slice(None, None, copies))
    for t in range(12):
        tokens = torch.randint(VOCABULARY, (len(ids),))
        ids = torch.cat([ids, tokens[:, None]], 1)
        check(stepper.step(tokens))
        if t in (5, 8):  # rows of the last prompts replace others
            kept = torch.arange(len(ids) - 3)
            kept[1], kept[4] = len(ids) - 1, len(ids) - 3
            stepper.keep(kept)
            ids, source, mask = ids[kept], source[kept], mask[kept]
        elif t < 5:
            index = rows * copies + torch.randint(copies, (len(ids),))
            stepper.reorder(index)
            ids, source, mask = ids[index], source[index], mask[index]


def test_key_values_are_those_of_the_rows():
    model = make("bart")
    prompt = seq2seq_prompt(model, 2, 3)
    stepper = NativeStepper(model, prompt)
    stepper.start()
    stepper.step(torch.tensor([3, 4, 5, 6, 7, 8]))
    before = stepper.key_values()
    index = torch.tensor([2, 2, 0, 5, 3, 3])
    stepper.reorder(index)
    for (k, v), (k_before, v_before) in zip(stepper.key_values(), before):
        assert k.shape == (6, 3, 3, 8) and torch.equal(k, k_before[index]) and torch.equal(v, v_before[index])
    assert not before[0][0][:3, :, 0].any() and before[0][0][3:, :, 0].all()  # the first prompt's padding


def test_weights_are_copied_once_and_again_when_they_change():
    model = make("marian")
    set_weight_storage(model, copy=True)
    prompt = seq2seq_prompt(model, 2, 1)
    first = NativeStepper(model, prompt).start().clone()
    kept = kept_copies(model)
    assert torch.equal(NativeStepper(model, prompt).start(), first) and kept_copies(model) is kept
    model.layers[1]["up"].weight.mul_(2)
    changed = NativeStepper(model, prompt).start().clone()
    assert kept_copies(model) is not kept and not torch.equal(changed, first)
    set_weight_storage(model, torch.bfloat16)
    rounded = NativeStepper(model, prompt).start()
    assert kept_copies(model).storage == torch.bfloat16
    assert 0 < (rounded - changed).abs().max() < 0.1 * changed.abs().max()
    set_weight_storage(model, copy=True)
    assert torch.equal(NativeStepper(model, prompt).start(), changed)


def test_weights_in_place():
    """Weights in place take no memory, nothing is kept between generations, and every change has an effect."""
    for family in FAMILIES:
        for dtype in (torch.float32, torch.bfloat16):
            tensors = make(family, 0, dtype).step_description().tensors()
            weights = DecoderWeights(tensors)
            lie = {t.data_ptr() for t in tensors.sources()}
            read = [t for w in (*weights.weights, weights.head) for t in w[::2] if t is not None]
            assert read and all(t.data_ptr() in lie for t in read)
    model = make("marian")
    set_weight_storage(model)  # its weights are not in a mapped checkpoint
    prompt = seq2seq_prompt(model, 2, 1)
    first = NativeStepper(model, prompt).start().clone()
    assert kept_copies(model) is None
    model.layers[1]["up"].weight.data.mul_(2)  # a write that torch's version counters do not see
    assert not torch.equal(NativeStepper(model, prompt).start(), first)
    with pytest.raises(ValueError, match="wanted None with copy=False"):
        set_weight_storage(model, torch.bfloat16, copy=False)


def test_past_the_positions():
    model = make("bart")
    stepper = NativeStepper(model, seq2seq_prompt(model, 1, 1))
    stepper.start()
    for _ in range(POSITIONS - 2):
        stepper.step(torch.tensor([1]))
    with pytest.raises(ValueError, match=f"past the model's {POSITIONS} positions"):
        stepper.step(torch.tensor([1]))


def test_ids_out_of_range():
    model = make("t5")
    stepper = NativeStepper(model, seq2seq_prompt(model, 1, 1))
    stepper.start()
    with pytest.raises(RuntimeError, match=f"{VOCABULARY} is not one of {VOCABULARY} tokens"):
        stepper.step(torch.tensor([VOCABULARY]))


class Wrapped(torch.nn.Linear):
    pass


def _wrap(model):
    model.layers[0]["up"] = Wrapped(24, 40)


def _mix_norms(model):
    model.layers[1]["output_norm"] = torch.nn.RMSNorm(24)


REFUSALS = {
    "hook": (lambda m: m.layers[0]["up"].register_forward_hook(lambda *a: None), "layers.0.up has hooks"),
    "replaced forward": (lambda m: setattr(m.layers[0], "forward", print), "a forward of its own"),
    "wrapped": (_wrap, "up is a Wrapped"),
    "training": (lambda m: m.train(), "training mode"),
    "float16": (lambda m: m.half(), "float16 is not float32 or bfloat16"),
    "float64": (lambda m: m.double(), "float64 is not float32 or bfloat16"),
    "meta": (lambda m: m.to("meta"), "meta is not cpu"),
    "norms": (_mix_norms, "not all layer norms"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals(case):
    change, reason = REFUSALS[case]
    model = make("bart")
    prompt = seq2seq_prompt(model, 2, 1)
    change(model)
    assert reason in NativeStepper.why_not(model, prompt)


def test_refused_calls():
    model = make("bart")
    prompt = seq2seq_prompt(model, 2, 1)
    with torch.enable_grad():
        assert NativeStepper.why_not(model, prompt) == "gradients are enabled"
    with torch.autocast("cpu", torch.bfloat16):
        assert NativeStepper.why_not(model, prompt) == "autocast is on"
    assert "does not describe" in NativeStepper.why_not(torch.nn.Linear(1, 1), prompt)
    prompt.inputs["token_type_ids"] = prompt.input_ids
    assert NativeStepper.why_not(model, prompt) == "the prompt has token_type_ids"
    assert "no encoder states" in NativeStepper.why_not(model, Prompt(prompt.input_ids))
    model = make("bart", activation=None)
    assert "activation None" in NativeStepper.why_not(model, seq2seq_prompt(model, 2, 1))
    with pytest.raises(TypeError, match="dtype: wanted torch.float32"):
        set_weight_storage(model, torch.float16)
