"""Runs every op once, forward and backward, on small awkward shapes, for compute-sanitizer in gpu.sh.

On a GPU, ops with CUDA C++ kernels also run on these, regardless of the default choice; --cuda: only on these.
"""

import sys
from collections.abc import Iterator
from functools import partial

import torch

import transformer_fast as tf
from transformer_fast.backends import BackendError


def main(device: str = "cuda", cuda_alone: bool = False) -> None:
    for dtype in (torch.float32, torch.float16, torch.bfloat16) if not cuda_alone else ():
        for rows, width in ((1, 1), (3, 100), (17, 768), (5, 1025)):
            _norms(rows, width, dtype, device)
            _rows(rows, width, dtype, device)
        for length, head_dim in ((1, 64), (65, 64), (130, 40)):
            _attention(length, head_dim, dtype, device)
        _decoding(dtype, device)
    if device == "cuda":
        torch.cuda.synchronize()
        with tf.backend("cuda"):
            for name, reasons in cuda_calls(device):
                print(f"CUDA C++, {name}: {reasons or 'run'}")
        torch.cuda.synchronize()


def cuda_calls(device: str) -> Iterator[tuple[str, str]]:
    """Run calls under backend("cuda"); yields (call, why the CUDA C++ kernels refused it or "")."""
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        calls = {f"norms {r}x{w}": partial(_norms, r, w) for r, w in ((1, 1), (3, 100), (17, 768), (5, 1025))}
        for length, head_dim in ((1, 64), (65, 64), (130, 128), (130, 40)):
            calls[f"attention {length}, {head_dim}"] = partial(_attention, length, head_dim)
            calls[f"attention without features {length}, {head_dim}"] = partial(_plain_attention, length, head_dim)
        calls["decoding"] = _decoding
        for name, call in calls.items():
            try:
                call(dtype, device)
            except BackendError as error:
                yield f"{name}, {dtype}", str(error)
            else:
                yield f"{name}, {dtype}", ""


def _norms(rows: int, width: int, dtype: torch.dtype, device: str) -> None:
    x, residual = (torch.randn(rows, width, device=device, dtype=dtype, requires_grad=True) for _ in range(2))
    weight, bias = (torch.randn(width, device=device, dtype=dtype, requires_grad=True) for _ in range(2))
    tf.layer_norm(x, (width,), weight, bias).sum().backward()
    tf.rms_norm(x, (width,), weight).sum().backward()
    y, total = tf.add_layer_norm(x, residual, weight, bias, dropout_p=0.1)
    (y.sum() + total.sum()).backward()


def _rows(rows: int, width: int, dtype: torch.dtype, device: str) -> None:
    x = torch.randn(rows, width, device=device, dtype=dtype, requires_grad=True)
    weight, bias = (torch.randn(width, device=device, dtype=dtype, requires_grad=True) for _ in range(2))
    tf.bias_activation(x, bias, "gelu").sum().backward()
    tf.dropout(x, 0.2).sum().backward()
    tf.cross_entropy(x, torch.zeros(rows, dtype=torch.int64, device=device), label_smoothing=0.1).backward()
    ids = torch.arange(rows, device=device)[None] % 2
    tables = (torch.randn(2, width, device=device, dtype=dtype, requires_grad=True) for _ in range(2))
    word, token_type = tables
    tf.embedding_layer_norm(
        ids, word, norm_weight=weight, norm_bias=bias, token_type_ids=ids, token_type_weight=token_type, dropout_p=0.1
    ).sum().backward()


def _attention(length: int, head_dim: int, dtype: torch.dtype, device: str) -> None:
    def leaf(*shape):
        return torch.randn(shape, device=device, dtype=dtype, requires_grad=True)

    q, k, v = (leaf(2, 3, length, head_dim) for _ in range(3))
    tf.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=0.1).sum().backward()
    lengths = torch.tensor([length, length // 2], device=device)
    tf.scaled_dot_product_attention(q, k, v, bias=leaf(1, 3, length, length), key_lengths=lengths).sum().backward()
    relative = tf.RelativeBias(leaf(8, 3), 20, True)
    tf.scaled_dot_product_attention(q, k, v, relative_bias=relative, window=(30, 30)).sum().backward()
    unpadded = [leaf(length + 3, 3, head_dim) for _ in range(3)]
    bounds = torch.tensor([0, length, length + 3], dtype=torch.int32, device=device)
    tf.varlen_attention(*unpadded, bounds, softcap=5.0).sum().backward()
    tf.additive_attention(q[:, 0], k[:, 0], v[:, 0], leaf(head_dim), key_lengths=lengths).sum().backward()


def _plain_attention(length: int, head_dim: int, dtype: torch.dtype, device: str) -> None:
    """A call that the kernels for a single architecture take: only causal, grouped heads and lengths."""
    q, k, v = (torch.randn(2, h, length, head_dim, device=device, dtype=dtype, requires_grad=True) for h in (4, 2, 2))
    lengths = torch.tensor([length, length // 2], device=device)
    for options in ({}, {"is_causal": True}, {"key_lengths": lengths}):
        tf.scaled_dot_product_attention(q, k, v, enable_gqa=True, **options).sum().backward()


def _decoding(dtype: torch.dtype, device: str) -> None:
    query, key, value = (torch.randn(2, h, 1, 64, device=device, dtype=dtype) for h in (4, 2, 2))
    caches = [torch.randn(2, 2, 300, 64, device=device, dtype=dtype) for _ in range(2)]
    tf.kv_cache_attention(query, key, value, *caches, torch.tensor([0, 299], device=device))


if __name__ == "__main__":
    main(cuda_alone="--cuda" in sys.argv[1:])
