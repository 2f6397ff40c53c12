"""Calls the CUDA C++ attention kernels (csrc/cuda/attention_*) for an AttentionSpec."""

from collections.abc import Callable

import torch

from . import memory, native_attention, relative_bias
from .memory import unit_stride
from .philox import threshold
from .specs import repeatable

_HALF = (torch.bfloat16, torch.float16)
DECODE_ROWS = 16  # kDecodeRows of csrc/cuda/attention_decode.hpp
_ops = torch.ops.transformer_fast


def why_not(call) -> tuple[str, ...]:
    """Why no CUDA attention kernel can run the call. The native op itself checks strides and the GPU."""
    if call.dtype in _HALF:
        return ()
    return (f"there is none for {str(call.dtype).removeprefix('torch.')} attention: tensor cores would round to TF32",)


def attention_forward(spec, out: torch.Tensor, lse: torch.Tensor) -> Callable | None:
    """Write out and lse of one call. Returns a Repeat, or None."""
    if _few(spec) and not (spec.rng is not None and threshold(spec.dropout_p)):
        _decode(spec, None, None, out, lse)
        return None
    op, arguments = _ops.cuda_attention_forward.default, _arguments(spec, _relative_bias(spec))
    op(*arguments, out, lse)
    if not repeatable(spec):
        return None
    longest, constants = _constants(arguments)
    return lambda q, k, v, cu, rng, out, lse: op(
        q, k, v, None, None, None, cu, cu, *longest, None, rng, *constants, out, lse
    )


def _constants(arguments: tuple) -> tuple[tuple, tuple]:
    """max_seqlen_q and max_seqlen_k, and what follows the tensors. A Repeat keeps these alone: it outlives tensors."""
    return arguments[8:10], arguments[12:]


def attention_append(spec, key: torch.Tensor, value: torch.Tensor, out: torch.Tensor, lse: torch.Tensor) -> bool:
    """Append to the caches and decode in one launch. Returns False, and does nothing, if the call has more queries than
    the decoding kernel takes."""
    if not _few(spec):
        return False
    _decode(spec, key, value, out, lse)
    return True


def _few(spec) -> bool:
    """Whether the decoding kernel takes the call: few query rows per key head, with which tensor cores would idle."""
    return spec.max_seqlen_q * (spec.query.shape[1] // spec.key.shape[1]) <= DECODE_ROWS


def _decode(spec, new_key, new_value, out, lse) -> None:
    lengths = spec.key_lengths
    if lengths is not None:  # keep int32 or int64: a conversion would cost as much as a short call
        lengths = (lengths if lengths.dtype in (torch.int32, torch.int64) else lengths.to(torch.int64)).contiguous()
    arguments = _arguments(spec._replace(rng=None), _relative_bias(spec), lengths)
    _ops.cuda_attention_decode.default(*arguments, new_key, new_value, out, lse)


def attention_backward(spec, grad_out, grad_lse, out, lse, dq, dk, dv, dbias, dtable) -> Callable | None:
    """Write dq, dk, dv and, where given, dbias and dtable (float32, zeroed by the caller). Returns a Repeat or None."""
    relative = _relative_bias(spec)
    delta = memory.empty(lse.shape, torch.float32, lse.device)
    drelative = None if dtable is None or relative is None else torch.zeros_like(relative)
    grad_lse = None if grad_lse is None else grad_lse.to(torch.float32).contiguous()
    op, arguments, as_given = _ops.cuda_attention_backward.default, _arguments(spec, relative), unit_stride(grad_out)
    op(
        as_given, grad_lse, unit_stride(out), lse.contiguous(), *arguments,
        torch.are_deterministic_algorithms_enabled(), delta, dq, dk, dv, dbias, drelative,
    )  # fmt: skip
    if drelative is not None:
        # A matrix product is deterministic; the atomics of index_add are not.
        buckets = torch.arange(dtable.shape[0], device=dtable.device)
        member = (relative_bias.buckets(spec)[1] == buckets[:, None]).double()
        dtable.copy_(member @ drelative.double().t())
    if not repeatable(spec) or grad_lse is not None or as_given is not grad_out:
        return None

    longest, constants = _constants(arguments)

    def repeat(q, k, v, cu, rng, grad_out, out, lse, dq, dk, dv):
        delta = memory.empty(lse.shape, torch.float32, lse.device)
        ordered = torch.are_deterministic_algorithms_enabled()
        op(
            grad_out, None, out, lse, q, k, v, None, None, None, cu, cu, *longest, None, rng, *constants, ordered,
            delta, dq, dk, dv, None, None,
        )  # fmt: skip

    return repeat


def _relative_bias(spec) -> torch.Tensor | None:
    relative = relative_bias.lookup(spec)[1]
    return None if relative is None else relative.contiguous()


def _arguments(spec, relative: torch.Tensor | None, key_lengths: torch.Tensor | None = None) -> tuple:
    """The arguments of the native ops. key_lengths, of either integer dtype, replaces the spec's int32 conversion."""
    drops = spec.rng is not None and threshold(spec.dropout_p) > 0
    spec = spec._replace(
        key_lengths=_int32(spec.key_lengths) if key_lengths is None else key_lengths,
        cu_seqlens_q=_int32(spec.cu_seqlens_q),
        cu_seqlens_k=_int32(spec.cu_seqlens_k),
        rng=spec.rng.contiguous() if drops else None,
        dropout_p=spec.dropout_p if drops else 0.0,
    )
    return native_attention.arguments(spec, relative)


def _int32(t: torch.Tensor | None) -> torch.Tensor | None:
    return None if t is None else t.to(torch.int32).contiguous()
