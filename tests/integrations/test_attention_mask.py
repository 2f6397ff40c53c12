"""Masks stored as rules equal transformers' dense masks, for every kind of access."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import masking_utils as hf

from transformer_fast.integrations.huggingface import attention_mask
from transformer_fast.integrations.lazy_mask import LazyMask, MaskRule

PATTERNS = {
    "causal": hf.causal_mask_function,
    "bidirectional": hf.bidirectional_mask_function,
    "sliding": hf.sliding_window_causal_mask_function(3),
    "sliding both ways": hf.sliding_window_bidirectional_mask_function(2),
    "chunked": hf.chunked_causal_mask_function(3, torch.zeros(3, dtype=torch.long)),
}


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    pattern=st.sampled_from(list(PATTERNS)),
    queries=st.integers(1, 7),
    keys=st.integers(1, 9),
    seen=st.integers(0, 4),
    kv_offset=st.integers(0, 2),
    padding=st.sampled_from([None, "none", "left", "right", "holes", "short"]),
    seed=st.integers(0, 99),
)
def test_has_the_values_of_sdpa_mask(pattern, queries, keys, seen, kv_offset, padding, seed):
    generator = torch.Generator().manual_seed(seed)
    q_offset, total = kv_offset + seen, keys + kv_offset  # keys before kv_offset have left a sliding cache
    position, length = torch.arange(total), torch.randint(0, total + 1, (3, 1), generator=generator)
    mask = {
        None: None,
        "none": torch.ones(3, total, dtype=torch.bool),
        "left": position >= length,
        "right": position < length,
        "holes": torch.rand(3, total, generator=generator) < 0.5,
        "short": (position < length)[:, : max(total - 2, 1)],
    }[padding]
    arguments = {
        "batch_size": 3, "q_length": queries, "kv_length": keys, "q_offset": q_offset, "kv_offset": kv_offset,
        "mask_function": PATTERNS[pattern], "attention_mask": mask, "allow_is_causal_skip": False,
        "allow_is_bidirectional_skip": False,
    }  # fmt: skip
    wanted = hf.sdpa_mask(**arguments)
    assert torch.equal(attention_mask(**arguments) & True, wanted.expand(3, 1, queries, keys))
    # If no mask is needed, None means the same as for transformers' own attention.
    skips = {"allow_is_causal_skip": "bidirectional" not in pattern and "both" not in pattern}
    skips["allow_is_bidirectional_skip"] = not skips["allow_is_causal_skip"]
    skips["local_size"] = {"sliding": 3, "sliding both ways": 2}.get(pattern)
    if pattern != "chunked" and keys >= seen + queries and attention_mask(**{**arguments, **skips}) is None:
        i, j = torch.arange(queries)[:, None], torch.arange(keys)
        implied = (j <= i) if skips["allow_is_causal_skip"] and queries > 1 else torch.ones(queries, keys, dtype=bool)
        assert torch.equal(wanted.expand(3, 1, queries, keys), implied.expand(3, 1, queries, keys))


@pytest.mark.quick
@pytest.mark.parametrize("padding", ["left", "right", "none"])
@pytest.mark.parametrize("pattern", ["causal", "bidirectional", "sliding"])
def test_no_mask_of_s_by_s(pattern, padding):
    length, position = torch.tensor([[8], [3]]), torch.arange(8)
    mask = {"left": position >= 8 - length, "right": position < length, "none": position < 8 + 0 * length}[padding]
    got = attention_mask(
        2, 8, 8, mask_function=PATTERNS[pattern], attention_mask=mask, allow_is_bidirectional_skip=pattern[0] == "b",
        allow_is_causal_skip=pattern[0] != "b",
    )  # fmt: skip
    if padding == "none" and pattern != "sliding":
        assert got is None
        return
    assert isinstance(got, LazyMask) and got._dense is None
    assert (got.rule.key_lengths is not None) == (padding == "right")
    assert (got.rule.padding is not None) == (padding == "left")
    assert (got.rule.left, got.rule.right) == {"causal": (None, 0), "bidirectional": (None, None), "sliding": (2, 0)}[
        pattern
    ]


def _lazy():
    rule = MaskRule(5, key_lengths=torch.tensor([5, 2], dtype=torch.int32), right=0)
    return LazyMask(rule, 2, 4, 5, torch.device("cpu"))


@pytest.mark.parametrize(
    "use",
    [
        lambda m: m[:, :, :, :3],
        lambda m: m & torch.ones(4, 5, dtype=torch.bool),
        lambda m: torch.where(m, 0.0, -1.0),
        lambda m: torch.cat([m, m], -1),
        lambda m: m.to(torch.float32),
        lambda m: m.expand(2, 3, 4, 5),
        lambda m: ~m,
        lambda m: m.all(),
        copy.deepcopy,
    ],
)
def test_reads_like_the_dense_tensor(use):
    dense = _lazy().dense()
    assert torch.equal(use(_lazy()), use(dense))


def test_writing_through_it_is_seen():
    for write in (lambda m: m[0].fill_(True), lambda m: m.logical_not_(), lambda m: m.__setitem__((1, 0, 0), False)):
        mask, dense = _lazy(), _lazy().dense()
        write(mask), write(dense)
        assert mask.rule is None
        assert torch.equal(mask.dense(), dense)


def test_reading_keeps_the_rule():
    mask = _lazy()
    assert mask.shape == (2, 1, 4, 5) and mask.dtype == torch.bool and "LazyMask" in repr(mask)
    assert mask.contiguous() is mask and mask.to("cpu") is mask
    assert mask.any() and mask.rule is not None
