"""Launches the Triton attention kernels (kernels/attention_*.py) for an AttentionSpec."""

from collections.abc import Callable

import torch
import triton

from ..kernels import attention_configurations as configurations
from ..kernels.attention_backward import (
    _attention_backward_key_kernel,
    _attention_backward_query_kernel,
    _attention_delta_kernel,
)
from ..kernels.attention_bias_backward import _attention_backward_bias_kernel
from ..kernels.attention_decode import _attention_combine_kernel, _attention_decode_kernel
from ..kernels.attention_forward import _attention_forward_kernel
from . import relative_bias, triton_launch
from .memory import unit_stride
from .philox import keep_scale, threshold
from .specs import AttentionSpec, layout, repeatable

LOG2E = 1.4426950408889634
UNLIMITED = 2**30  # positions are int32: a window this wide has no effect and cannot overflow
DECODE_QUERIES, DECODE_ROWS = 16, 32
FEW_KEYS = 128  # rows with at most this many keys keep the rounding of the output: see kernels/attention_backward.py
WIDEST_WITH_TABLE = 64  # up to this head dim, without dropout, the sums for dtable fit into registers together with dQ
L2_BYTES = 32 * 2**20  # bytes of keys and values that stay in the L2 cache while the blocks of a few heads run

_CONSTANTS = layout(AttentionSpec).constants


INPUTS = 9


def _inputs(spec) -> tuple[torch.Tensor | None, ...]:
    """The tensors of a call as the kernels read them: query, key, value, bias, mask, key lengths or query offsets, key
    offsets, the relative bias at each distance, rng."""
    dropout = spec.rng is not None and threshold(spec.dropout_p) > 0
    return (
        spec.query,
        spec.key,
        spec.value,
        spec.bias,
        None if spec.mask is None else spec.mask.view(torch.uint8),
        _dense(spec.key_lengths if spec.cu_seqlens_q is None else spec.cu_seqlens_q),
        _dense(spec.cu_seqlens_k),
        relative_bias.lookup(spec)[1],
        spec.rng.contiguous() if dropout else None,
    )


def _dense(t: torch.Tensor | None) -> torch.Tensor | None:
    return t if t is None or t.is_contiguous() else t.contiguous()


def _key(kind: str, spec) -> tuple:
    """What a plan depends on, besides its tensors. It includes functions, because the tuner and tests replace them."""
    table = spec.relative_bias
    return (
        kind, spec.query.device, _CONSTANTS(spec), table is not None and table.shape[0],
        spec.cu_seqlens_q is None, *_settings(spec.query.dtype),
    )  # fmt: skip


def _settings(dtype: torch.dtype) -> tuple:
    precision = dtype != torch.float32 or torch.backends.cuda.matmul.fp32_precision
    return configurations.select, splits_of, _capability, precision


def _repeat(spec, steps: triton_launch.Steps | None, arguments: Callable[..., tuple]) -> Callable | None:
    """A function that runs the steps of a call again, on arguments(tensors)."""
    if steps is None or not repeatable(spec):
        return None
    dtype, settings = spec.query.dtype, _settings(spec.query.dtype)
    return lambda *tensors: _settings(dtype) == settings and steps(*arguments(*tensors))


class Launch:
    """The arguments that all attention kernels share, by name, for one kind of call. The tensors are those of the plan;
    later calls of the same kind put their own in their place."""

    def __init__(self, spec, plan: triton_launch.Plan):
        q, k, value, bias, mask, lengths, cu_k, relative, rng = plan.inputs[:INPUTS]
        self.spec, self.plan = spec, plan
        self.query, self.key, self.value = q, k, value
        self.unpadded = spec.cu_seqlens_q is not None
        self.head_dim = q.shape[-1]
        self.heads, self.key_heads = q.shape[1], k.shape[1]
        self.groups = self.heads // self.key_heads
        self.queries, self.keys = spec.max_seqlen_q, spec.max_seqlen_k
        self.batch = spec.cu_seqlens_q.shape[0] - 1 if self.unpadded else q.shape[0]
        dropout = rng is not None
        left, right = spec.window_left, spec.window_right
        plain = not (dropout or spec.softcap) and all(t is None for t in (spec.bias, spec.mask, spec.relative_bias))
        kind = "relative" if spec.relative_bias is not None else "plain" if plain and left < 0 else "rich"
        self.shape = configurations.shape(_capability(q.device), self.head_dim, q.element_size(), kind, self.queries)
        self.block_d = max(16, triton.next_power_of_2(self.head_dim))
        self.reach = 0 if relative is None else relative.shape[1] // 2
        softcap = float(spec.softcap)
        single = q.dtype == torch.float32
        folded = plain and not single and spec.scale > 0
        self.pointers = {
            "cu_q_ptr": lengths if self.unpadded else None,
            "cu_k_ptr": cu_k,
            "key_lengths_ptr": None if self.unpadded else lengths,
            "bias_ptr": bias,
            "mask_ptr": mask,
            "relative_ptr": relative,
            "rng_ptr": rng,
        }
        self.scalars = {
            **self.strides("q", q),
            **self.strides("k", k),
            **self.strides("v", value),
            **_broadcast_strides("bias", bias),
            **_broadcast_strides("mask", mask),
            "queries": self.queries,
            "keys": self.keys,
            "score_scale": spec.scale / softcap if softcap else spec.scale * (LOG2E if folded else 1.0),
            "softcap": softcap,
            "window_left": min(left, UNLIMITED),
            "window_right": min(right, UNLIMITED),
            "reach": self.reach,
            "threshold": threshold(spec.dropout_p) if dropout else 0,
            "keep_scale": keep_scale(spec.dropout_p) if dropout else 1.0,
        }
        self.constants = {
            "GROUPS": self.groups,
            "HEAD_DIM": self.head_dim,
            "LEFT": left >= 0,
            "RIGHT": right >= 0,
            "BOTTOM_RIGHT": bool(spec.bottom_right),
            "SOFTCAP": bool(softcap),
            "FOLDED": folded,
            # Do not read allow_tf32 here: that raises once fp32_precision has been set.
            "PRECISION": "tf32" if not single or torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee",
        }

    def strides(self, name: str, t: torch.Tensor) -> dict[str, int]:
        """stride_<name>b, stride_<name>h and stride_<name>s of a (B, H, S, D) or (total, H, D) tensor."""
        b, h, s = (0, t.stride(1), t.stride(0)) if self.unpadded else t.stride()[:3]
        return {f"stride_{name}b": b, f"stride_{name}h": h, f"stride_{name}s": s}

    def lse_strides(self, lse: torch.Tensor) -> dict[str, int]:
        b, h = (0, lse.stride(0)) if self.unpadded else lse.stride()[:2]
        return {"stride_lse_b": b, "stride_lse_h": h}

    def arguments(self, kernel, config, **more):
        """Keyword arguments of `kernel`: those of the shared arguments and of `more` that it has parameters for."""
        known = {**self.pointers, **self.scalars, **self.constants, **more}
        known |= {"BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "WIDE": _wide(known)}
        known["BLOCK_D"] = min(self.block_d, config.columns or self.block_d)
        taken = {name: known[name] for name in kernel.arg_names}
        if config.max_registers is not None:
            taken["maxnreg"] = config.max_registers
        return {**taken, "num_warps": config.num_warps, "num_stages": config.num_stages}

    def slices(self, config) -> int:
        """How many programs share a block of rows; each computes some of its columns."""
        return 1 if config.columns is None else triton.cdiv(self.head_dim, config.columns)

    def heads_together(self, tensor_bytes: int, most: int) -> int:
        return max(1, min(most, L2_BYTES // max(1, tensor_bytes)))


def _wide(arguments) -> bool:
    """Whether offsets within a tile of 256 rows can exceed 32 bits."""
    return max(abs(v) for n, v in arguments.items() if n.startswith("stride_") and n.endswith("s")) * 256 >= 2**31


def _broadcast_strides(name: str, t: torch.Tensor | None) -> dict[str, int]:
    steps = (0, 0, 0, 0) if t is None else (0 if n == 1 else s for n, s in zip(t.shape, t.stride()))
    return {f"stride_{name}_{axis}": step for axis, step in zip("bhmn", steps)}


def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (8, 0)


def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def splits_of(tiles: int, blocks: int, multiprocessors: int) -> int:
    """The number of parts into which the keys of a decoding call are split.

    It is 1 if `tiles` programs fill 80% of the GPU. Otherwise it is the smallest number whose wave efficiency reaches
    85% of the best efficiency of any number up to `blocks`.
    """
    if tiles >= 0.8 * multiprocessors or blocks <= 1:
        return 1

    def efficiency(splits: int) -> float:
        waves = tiles * splits / multiprocessors
        return waves / -(-tiles * splits // multiprocessors)

    candidates = range(1, min(blocks, 128, multiprocessors) + 1)
    best = max(map(efficiency, candidates))
    return next(s for s in candidates if efficiency(s) >= 0.85 * best)


def attention_forward(spec, out: torch.Tensor, lse: torch.Tensor) -> Callable | None:
    """Write out and lse of one call. Returns a Repeat, or None."""

    def build(plan):
        call = Launch(spec, plan)
        if _few(spec) and call.pointers["rng_ptr"] is None:
            _decode(call, *plan.inputs[INPUTS:])
        else:
            _forward(call, *plan.inputs[INPUTS:])

    steps = triton_launch.run(_key("forward", spec), (*_inputs(spec), out, lse), build)
    return _repeat(spec, steps, lambda q, k, v, cu, rng, out, lse: (q, k, v, None, None, cu, cu, None, rng, out, lse))


def _forward(call: Launch, out: torch.Tensor, lse: torch.Tensor) -> None:
    config = configurations.select("forward", call.shape)
    blocks = triton.cdiv(call.queries, config.block_m)
    batch_heads = call.batch * call.heads
    keys_bytes = 2 * call.keys * call.head_dim * out.element_size()
    arguments = call.arguments(
        _attention_forward_kernel,
        config,
        q_ptr=call.query,
        k_ptr=call.key,
        v_ptr=call.value,
        out_ptr=out,
        lse_ptr=lse,
        **call.strides("o", out),
        **call.lse_strides(lse),
        heads=call.heads,
        batch_heads=batch_heads,
        blocks=blocks,
        heads_together=min(batch_heads, call.groups * call.heads_together(keys_bytes, batch_heads)),
    )
    call.plan.launch(_attention_forward_kernel, (blocks * batch_heads * call.slices(config),), arguments)


def attention_append(spec, key: torch.Tensor, value: torch.Tensor, out: torch.Tensor, lse: torch.Tensor) -> bool:
    """Append to the caches and decode in one launch. Returns False, and does nothing, if the call has more queries than
    the decoding kernel takes."""
    if not _few(spec):
        return False

    def build(plan):
        _decode(Launch(spec, plan), *plan.inputs[INPUTS:])

    triton_launch.run(_key("append", spec), (*_inputs(spec), out, lse, key, value), build)
    return True


def _few(spec) -> bool:
    groups = spec.query.shape[1] // spec.key.shape[1]
    return spec.max_seqlen_q <= DECODE_QUERIES and spec.max_seqlen_q * groups <= DECODE_ROWS


def _decode(call: Launch, out: torch.Tensor, lse: torch.Tensor, new_key=None, new_value=None) -> None:
    spec = call.spec
    config = configurations.select("decode", call.shape)
    config = config._replace(block_m=max(config.block_m, triton.next_power_of_2(call.queries * call.groups)))
    if new_key is not None:  # registers also hold a tile of the new rows
        config = config._replace(block_n=max(16, config.block_n // 2))
    tiles = call.batch * call.key_heads
    splits = splits_of(tiles, triton.cdiv(call.keys, config.block_n), _multiprocessors(out.device))
    part, part_lse = out, lse
    if splits > 1:
        # (splits, B, H, Sq, D), or (splits, H, total, D) unpadded
        rows = out.transpose(0, 1).shape if call.unpadded else out.shape
        part = call.plan.empty((splits, *rows), torch.float32, out.device)
        part_lse = call.plan.empty((splits, *lse.shape), torch.float32, out.device)
        one = part[0].transpose(0, 1) if call.unpadded else part[0]
    arguments = call.arguments(
        _attention_decode_kernel,
        config,
        q_ptr=call.query,
        k_ptr=call.key,
        v_ptr=call.value,
        new_k_ptr=new_key,
        new_v_ptr=new_value,
        **call.strides("nk", call.key if new_key is None else new_key),
        **call.strides("nv", call.value if new_value is None else new_value),
        out_ptr=part,
        lse_ptr=part_lse,
        **call.strides("o", out if splits == 1 else one),
        **call.lse_strides(lse if splits == 1 else part_lse[0]),
        stride_out_split=0 if splits == 1 else part.stride(0),
        stride_lse_split=0 if splits == 1 else part_lse.stride(0),
        score_scale=spec.scale / spec.softcap if spec.softcap else spec.scale,  # without LOG2E
        heads=call.key_heads,
        SPLIT=splits > 1,
    )
    call.plan.launch(_attention_decode_kernel, (tiles, splits), arguments)
    if splits == 1:
        return
    arguments = {
        "part_ptr": part, "part_lse_ptr": part_lse, "out_ptr": out, "lse_ptr": lse, "stride_part_split": part.stride(0),
        "stride_lse_split": part_lse.stride(0), **call.strides("o", out), "heads": call.heads, "rows": lse.shape[-1],
        "splits": splits, "HEAD_DIM": call.head_dim, "BLOCK_D": call.block_d, "SPLITS": triton.next_power_of_2(splits),
        "num_warps": 4,
    }  # fmt: skip
    call.plan.launch(_attention_combine_kernel, (lse.numel(),), arguments)


def attention_backward(spec, grad_out, grad_lse, out, lse, dq, dk, dv, dbias, dtable) -> Callable | None:
    """Write dq, dk, dv and, where given, dbias and dtable (float32, zeroed by the caller). Returns a Repeat or None."""
    as_given, plain = grad_out, grad_lse is None and dbias is None and dtable is None
    out, grad_out = unit_stride(out), unit_stride(grad_out)
    grad_lse = None if grad_lse is None else grad_lse.to(torch.float32).contiguous()
    bucket = None if dtable is None else relative_bias.buckets(spec)[1]
    inputs = (*_inputs(spec), grad_out, grad_lse, out, lse.contiguous(), dq, dk, dv, dbias, dtable, bucket)
    steps = triton_launch.run(_key("backward", spec), inputs, lambda plan: _backward(Launch(spec, plan)))
    if not plain or grad_out is not as_given:
        return None
    return _repeat(
        spec, steps, lambda q, k, v, cu, rng, grad_out, out, lse, dq, dk, dv:
        (q, k, v, None, None, cu, cu, None, rng, grad_out, None, out, lse, dq, dk, dv, None, None, None)
    )  # fmt: skip


def _backward(call: Launch) -> None:
    grad_out, grad_lse, out, lse, dq, dk, dv, dbias, dtable, _ = call.plan.inputs[INPUTS:]
    exact = call.constants["PRECISION"] == "ieee"
    delta, peak, *rest = (call.plan.empty(lse.shape, torch.float32, lse.device) for _ in range(2 + exact))
    correction = rest[0] if exact else None
    center = call.plan.empty((call.batch, call.key_heads, call.head_dim), torch.float32, lse.device)
    rows = {**call.lse_strides(lse), **call.strides("g", grad_out), "heads": call.heads, "queries": call.queries}
    # Larger blocks of float32 or of wide heads spill, because the compiler aims at many programs per multiprocessor.
    block = max(16, min(64, 8192 // (call.block_d * out.element_size())))
    arguments = {
        "out_ptr": out, "grad_out_ptr": grad_out, "k_ptr": call.key, "lse_ptr": lse, "grad_lse_ptr": grad_lse,
        "delta_ptr": delta, "peak_ptr": peak, "correction_ptr": correction, "center_ptr": center,
        **{name: call.pointers[name] for name in ("cu_q_ptr", "cu_k_ptr", "key_lengths_ptr")},
        **call.strides("o", out), **call.strides("k", call.key), **rows, "keys": call.keys, "GROUPS": call.groups,
        "HEAD_DIM": call.head_dim, "BLOCK_D": call.block_d, "BLOCK_M": block, "FOLDED": call.constants["FOLDED"],
        "num_warps": 4, "maxnreg": 128,
    }  # fmt: skip
    grid = (triton.cdiv(call.queries, block) * call.batch * call.heads,)
    call.plan.launch(_attention_delta_kernel, grid, arguments)
    shared = {
        "q_ptr": call.query,
        "k_ptr": call.key,
        "v_ptr": call.value,
        "grad_out_ptr": grad_out,
        "grad_lse_ptr": grad_lse,
        "delta_ptr": delta,
        "peak_ptr": peak,
        "correction_ptr": correction,
        "center_ptr": center,
        "grad_scale": call.spec.scale,
        **rows,
    }
    hidden = any(call.pointers[name] is not None for name in ("mask_ptr", "bias_ptr", "relative_ptr"))
    every = dbias is not None or dtable is not None or call.keys <= FEW_KEYS
    every = every or (
        hidden and call.pointers["rng_ptr"] is not None
    )  # only one key may be left, and dropout rounds its value
    if every or exact:
        _query_gradient(call, shared, delta=True, large=not every)
    _key_gradients(call, shared, dk, dv)
    broadcast = dbias is not None and _broadcasts(call, dbias)
    apart = dtable is not None and (call.head_dim > WIDEST_WITH_TABLE or call.pointers["rng_ptr"] is not None)
    _query_gradient(call, shared, dq, None if broadcast else dbias, None if apart else dtable)
    if apart:
        _query_gradient(call, shared, dtable=dtable)
    if broadcast:
        _bias_gradient(call, shared, dbias)


def _key_gradients(call: Launch, shared, dk, dv) -> None:
    shape = call.shape
    if call.groups > 1 and shape.kind == "plain":
        shape = shape._replace(kind="grouped")
    config = configurations.select("backward_key", shape)
    blocks = triton.cdiv(call.keys, config.block_n)
    batch_heads = call.batch * call.key_heads
    queries_bytes = 2 * call.groups * call.queries * call.head_dim * dk.element_size()
    arguments = call.arguments(
        _attention_backward_key_kernel,
        config,
        **shared
        | {
            "dk_ptr": dk,
            "dv_ptr": dv,
            **call.strides("dk", dk),
            **call.strides("dv", dv),
            "heads": call.key_heads,
            "batch_heads": batch_heads,
            "blocks": blocks,
            "heads_together": call.heads_together(queries_bytes, batch_heads),
        },
    )
    call.plan.launch(_attention_backward_key_kernel, (blocks * batch_heads * call.slices(config),), arguments)


def _query_gradient(call: Launch, shared, dq=None, dbias=None, dtable=None, delta=False, large=False) -> None:
    """Launch the query-side backward kernel for those of dQ, dbias and dtable that are given, or for delta alone.
    large: compute delta only where an lse is large."""
    shape = call.shape._replace(kind="rich") if delta and call.shape.kind == "plain" else call.shape
    config = configurations.select("backward_query" if dq is not None or delta else "backward_table", shape)
    if delta:  # the compiler aims at two blocks per multiprocessor and spills with more tiles in flight
        config = config._replace(num_stages=1)
    blocks = triton.cdiv(call.queries, config.block_m)
    batch_heads = call.batch * call.heads
    keys_bytes = 2 * call.keys * call.head_dim * call.query.element_size()
    buckets, bucket, bucket_sums = 0, None, None
    if dtable is not None:
        buckets = max(16, triton.next_power_of_2(dtable.shape[0]))
        bucket = call.plan.inputs[-1]
        sizes = (call.batch, call.heads, blocks, buckets)
        bucket_sums = call.plan.empty(sizes, dtable.dtype, dtable.device, zeros=True)
    arguments = call.arguments(
        _attention_backward_query_kernel,
        config,
        **shared,
        dq_ptr=dq,
        dbias_ptr=dbias,
        bucket_ptr=bucket,
        bucket_sums_ptr=bucket_sums,
        **call.strides("dq", call.query if dq is None else dq),
        **_broadcast_strides("dbias", dbias),
        batch_heads=batch_heads,
        blocks=blocks,
        heads_together=min(batch_heads, call.groups * call.heads_together(keys_bytes, batch_heads)),
        BUCKETS=buckets,
        DELTA=delta,
        LARGE=large,
        DIAGONALS=triton.next_power_of_2(min(config.block_m, config.block_n) + config.block_n),
    )
    slices = 1 if dq is None else call.slices(config)
    call.plan.launch(_attention_backward_query_kernel, (blocks * batch_heads * slices,), arguments)
    if dtable is not None and bucket_sums is not None:
        call.plan.then(_sum_of_buckets, dtable, bucket_sums)


def _sum_of_buckets(dtable: torch.Tensor, sums: torch.Tensor) -> None:
    dtable.copy_(sums.sum((0, 2))[:, : dtable.shape[0]].t())


def _axes(call: Launch) -> tuple[int, int, int, int]:
    return call.batch, call.heads, call.queries, call.keys


def _broadcasts(call: Launch, dbias) -> bool:
    return tuple(dbias.shape) != _axes(call)


def _bias_gradient(call: Launch, shared, dbias) -> None:
    config = configurations.select("backward_bias", call.shape)
    tiles = (*_axes(call)[:2], triton.cdiv(call.queries, config.block_m), triton.cdiv(call.keys, config.block_n))
    summed = [n == 1 and full > 1 for n, full in zip(dbias.shape, _axes(call))]
    own = [1 if s else n for s, n in zip(summed, tiles)]
    each = [n if s else 1 for s, n in zip(summed, tiles)]
    programs, count = own[0] * own[1] * own[2] * own[3], each[0] * each[1] * each[2] * each[3]
    # Enough programs to fill the GPU, as long as the partial sums stay small compared with keys and values.
    wanted = triton.cdiv(2 * _multiprocessors(dbias.device), programs)
    splits = max(1, min(wanted, count, 2**24 // dbias.numel()))
    part = dbias if splits == 1 else call.plan.empty((splits, *dbias.shape), dbias.dtype, dbias.device)
    arguments = call.arguments(
        _attention_backward_bias_kernel,
        config,
        **shared,
        dbias_ptr=part,
        stride_split=dbias.numel(),
        **_broadcast_strides("dbias", dbias),
        **{f"own_{axis}": n for axis, n in zip("bhmn", own)},
        **{f"each_{axis}": n for axis, n in zip("bhmn", each)},
        SUM_M=summed[2],
        SUM_N=summed[3],
    )
    call.plan.launch(_attention_backward_bias_kernel, (programs, splits), arguments)
    if splits > 1:
        call.plan.then(_sum_of_parts, dbias, part)


def _sum_of_parts(dbias: torch.Tensor, part: torch.Tensor) -> None:
    torch.sum(part, 0, out=dbias)
