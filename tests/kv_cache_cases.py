"""Calls of kv_cache_attention: inputs, the result per row in plain PyTorch, and the comparison with float64."""

import torch
from numerics import OUTPUT, assert_as_accurate

import transformer_fast as tf

CASES = {
    "one_token": {},
    "grouped_heads": {"h": 8, "hk": 2},
    "several_tokens": {"n": 5, "h": 4, "hk": 2},
    "window": {"n": 3, "window": (20, 0)},
    "softcap": {"softcap": 3.0},
    "relative_bias": {"n": 2, "buckets": 8},
    "more_tokens_than_the_decoding_kernel_takes": {"n": 20},
    "into_an_empty_cache": {"lengths": (0, 0), "n": 4},
    "to_the_last_row": {"lengths": (95, 60), "n": 5},
}


def inputs(device, dtype, h=2, hk=2, n=1, d=40, capacity=100, lengths=(37, 64)):
    def data(heads, rows):
        return torch.randn(2, rows, heads, d, device=device).to(dtype).transpose(1, 2)

    caches = [data(hk, capacity) for _ in range(2)]
    lengths = torch.tensor(lengths, device=device)
    for cache in caches:  # values after the rows in use must not matter
        for b, length in enumerate(lengths.tolist()):
            cache[b, :, length + n :] = torch.nan
            cache[b, :, length : length + n] = torch.inf
    return data(h, n), data(hk, n), data(hk, n), *caches, lengths


def by_hand(query, key, value, key_cache, value_cache, lengths, dtype, **more):
    """(out, lse, caches) in plain PyTorch, with one attention call per row."""
    n = query.shape[2]
    caches = [key_cache.clone(), value_cache.clone()]
    found = []
    for b, length in enumerate(lengths.tolist()):
        for cache, new in zip(caches, (key, value)):
            cache[b, :, length : length + n] = new[b]
        with tf.backend("eager"):
            kv = [cache[b : b + 1, :, : length + n].to(dtype) for cache in caches]
            found.append(tf.scaled_dot_product_attention(
                query[b : b + 1].to(dtype), *kv, is_causal=True, causal_alignment="bottom_right", enable_gqa=True,
                return_lse=True, **more,
            ))  # fmt: skip
    return torch.cat([f[0] for f in found]), torch.cat([f[1] for f in found]), caches


def check(name, device, dtype, **case):
    """Compare out and log-sum-exp of backend `name` with float64, and the caches bit for bit."""
    more = {key: case.pop(key) for key in ("window", "softcap") if key in case}
    if "buckets" in case:
        more["relative_bias"] = tf.RelativeBias(torch.randn(case.pop("buckets"), 2, device=device), 20, False)
    arguments = inputs(device, dtype, **case)
    query, key, value, *caches, lengths = arguments
    truth, plain = (by_hand(*arguments, dtype=t, **more) for t in (torch.float64, dtype))
    filled = [cache.clone() for cache in caches]
    with tf.backend(name):
        out, lse = tf.kv_cache_attention(query, key, value, *filled, lengths, return_lse=True, **more)
    assert_as_accurate(out, truth[0], plain[0], OUTPUT, "out")
    assert_as_accurate(lse, truth[1], plain[1], OUTPUT, "lse")
    for ours, theirs in zip(filled, truth[2]):
        assert torch.equal(ours.nan_to_num(-7.0), theirs.nan_to_num(-7.0))
