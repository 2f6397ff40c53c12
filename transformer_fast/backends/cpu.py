"""C++ kernels for the CPU (csrc/cpu), chosen per instruction set at run time."""

import torch

from . import Backend, Call, gemm, memory, native, native_attention, relative_bias
from .memory import unit_stride, unit_stride_weight

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_ops = torch.ops.transformer_fast


class CpuBackend(Backend):
    name = "cpu"
    products = frozenset({"linear", "linear_panel"})

    def why_not(self, call: Call) -> tuple[str, ...]:
        reasons = []
        missing = native.load()
        if missing:
            reasons.append(missing)
        if call.device != "cpu":
            reasons.append(f"device {call.device} is not cpu")
        if call.dtype not in _DTYPES:
            reasons.append(f"dtype {call.dtype} is not float32, bfloat16 or float16")
        if call.op not in self.ops():
            reasons.append(f"there is no CPU kernel for {call.op}")
        if call.op == "linear" and gemm.why_torchs_product(call.dtype):
            reasons.append(gemm.why_torchs_product(call.dtype))
        return tuple(reasons)

    def attention_forward(self, spec, out, lse) -> None:
        arguments = native_attention.arguments(spec, _relative_bias(spec))
        _ops.cpu_attention_forward.default(*arguments, out, lse)

    def attention_backward(self, spec, grad_out, grad_lse, out, lse, dq, dk, dv, dbias, dtable) -> None:
        relative = _relative_bias(spec)
        drelative = None
        if dtable is not None and relative is not None:
            sequences = spec.query.shape[0] if spec.cu_seqlens_q is None else spec.cu_seqlens_q.shape[0] - 1
            drelative = relative.new_zeros((sequences, *relative.shape))
        grad_lse = None if grad_lse is None else grad_lse.to(torch.float32).contiguous()
        _ops.cpu_attention_backward.default(
            unit_stride(grad_out), grad_lse, unit_stride(out), lse.contiguous(),
            *native_attention.arguments(spec, relative), dq, dk, dv, dbias, drelative,
        )  # fmt: skip
        if drelative is not None:
            bucket = relative_bias.buckets(spec, _reach(spec))[1]
            # In float64: most distances share the last bucket, a long sum of small terms.
            total = drelative.sum(0, dtype=torch.float64).t()
            real = slice(_TILE, -_TILE)
            dtable.copy_(torch.zeros_like(dtable, dtype=torch.float64).index_add_(0, bucket[real], total[real]))

    def additive_attention_forward(self, spec, out, weights) -> None:
        _ops.cpu_additive_attention_forward.default(*_additive_arguments(spec), out, weights)

    def additive_attention_backward(
        self, spec, grad_out, grad_weights, weights, grad_query, grad_key, grad_value, grad_score
    ) -> None:
        _ops.cpu_additive_attention_backward.default(
            grad_out, grad_weights, weights, *_additive_arguments(spec), grad_query, grad_key, grad_value, grad_score
        )

    def recurrence_forward(self, spec, out, last, last_memory, saved, memories) -> None:
        _ops.cpu_recurrence_forward.default(
            spec.gates, gate_panels(spec.weight), _float(spec.bias), *_recurrence_arguments(spec),
            out, last, last_memory, saved, memories,
        )  # fmt: skip

    def recurrence_backward(
        self, spec, grads, out, saved, memories, grad_gates, grad_weight, grad_bias, grad_hidden, grad_memory
    ) -> None:
        lstm = spec.memory is not None
        grad_products = grad_gates if lstm else memory.empty_like(grad_gates)
        if not lstm and grad_gates.shape[0]:  # the kernel does not write positions that belong to no sequence
            grad_products.zero_()
        _ops.cpu_recurrence_backward.default(
            *grads, back_panels(spec.weight), *_recurrence_arguments(spec), out, saved, memories if lstm else None,
            grad_gates, None if lstm else grad_products, grad_hidden, grad_memory if lstm else None,
        )  # fmt: skip
        before = _states_before(spec, out)
        if spec.gates.dtype == torch.float32:
            gemm.weight_gradient(grad_products, before, None if spec.bias is None else grad_bias, grad_weight)
            return
        torch.mm(grad_products.t(), before, out=grad_weight)
        if spec.bias is not None:
            grad_bias.copy_(grad_products.sum(0, dtype=torch.float32))

    def recurrent_step(self, spec, *buffers) -> None:
        width, weights, biases = spec.hidden.shape[2], [], []
        for i in range(0, len(spec.cells), 4):
            weights += [gate for w in spec.cells[i : i + 2] for gate in _rows(w).split(width)]
            biases += [_float(b) for b in spec.cells[i + 2 : i + 4]]
        weights += [None if w is None else _rows(w) for w in (spec.query, spec.readout, spec.head)]
        biases += [None, _float(spec.readout_bias), _float(spec.head_bias)]
        found = [
            t if t is None or t.dtype == torch.float32 else memory.empty(t.shape, torch.float32, t.device)
            for t in buffers
        ]
        _ops.cpu_recurrent_step.default(
            spec.ids.contiguous(), spec.token.contiguous(),
            *map(_float, (spec.hidden, spec.memory, spec.feed, spec.keys, spec.values)),
            None if spec.mask is None else spec.mask.contiguous(),
            None if spec.sources is None else spec.sources.to(torch.int32).contiguous(), _float(spec.score_weight),
            weights, biases, spec.maxout, spec.head.shape[1], *found[1:], found[0],
            None, None, None, None, spec.head.shape[0],
        )  # fmt: skip
        for buffer, result in zip(buffers, found):
            if buffer is not result:
                buffer.copy_(result)

    def norm(self, x, residual, weight, bias, rng, eps, rms, dropout_p, need_sum):
        """norm_forward without gradients, for contiguous tensors; returns (y, sum or None)."""
        y = memory.empty_like(x)
        total = memory.empty_like(x) if need_sum else None
        _ops.cpu_norm_forward.default(
            x, residual, _float(weight), _float(bias), rng, eps, rms, dropout_p, y, total, None, None
        )
        return y, total

    def norm_forward(self, spec, y, sum_out, mean, rstd) -> None:
        _ops.cpu_norm_forward.default(
            spec.x, spec.residual, _float(spec.weight), _float(spec.bias), spec.rng, spec.eps, spec.rms,
            spec.dropout_p, y, sum_out, mean, rstd,
        )  # fmt: skip

    def norm_backward(self, spec, grad_y, grad_sum, mean, rstd, grad_v, grad_x, grad_weight, grad_bias) -> None:
        _ops.cpu_norm_backward.default(
            grad_y, grad_sum, spec.x, _float(spec.weight), mean, rstd, spec.rng, spec.dropout_p, grad_v, grad_x,
            grad_weight, grad_bias,
        )  # fmt: skip

    def bias_activation(self, x, bias, gate, activation) -> torch.Tensor:
        """bias_activation_forward without gradients, for contiguous tensors."""
        y = memory.empty_like(x)
        _ops.cpu_bias_activation_forward.default(x, _float(bias), gate, native.ACTIVATIONS[activation], y)
        return y

    def bias_activation_forward(self, x, bias, gate, activation, y) -> None:
        _ops.cpu_bias_activation_forward.default(x, _float(bias), gate, native.ACTIVATIONS[activation], y)

    def bias_activation_backward(self, grad, x, bias, gate, activation, grad_x, grad_bias, grad_gate) -> None:
        _ops.cpu_bias_activation_backward.default(
            grad, x, _float(bias), gate, native.ACTIVATIONS[activation], grad_x, grad_bias, grad_gate
        )

    def dropout_forward(self, x, rng, p, y) -> None:
        _ops.cpu_dropout_forward.default(x if x.stride(1) == 1 else x.contiguous(), rng, p, y)

    def rotary_embedding(self, x, cos, sin, positions, interleaved, inverse, y) -> None:
        _ops.cpu_rotary.default(x, cos, sin, positions, interleaved, inverse, y)

    def rotary_append(self, spec, y) -> None:
        *tensors, query_weight, key_weight, eps, interleaved = spec
        _ops.cpu_rotary_append.default(*tensors, _float(query_weight), _float(key_weight), eps, interleaved, y)

    def cross_entropy_forward(self, spec, losses, largest, total) -> None:
        _ops.cpu_cross_entropy_forward.default(*spec, losses, largest, total)

    def cross_entropy_backward(self, spec, grad_losses, largest, total, grad) -> None:
        logits, target, weight, *options = spec
        _ops.cpu_cross_entropy_backward.default(grad_losses, logits, target, weight, largest, total, *options, grad)

    def embedding_layer_norm_forward(self, spec, y, mean, rstd) -> None:
        _ops.cpu_embedding_layer_norm_forward.default(
            spec.ids, spec.word, spec.position_ids, spec.position, spec.type_ids, spec.token_type,
            _float(spec.norm_weight), _float(spec.norm_bias), spec.rng, spec.eps, spec.dropout_p, y, mean, rstd,
        )  # fmt: skip

    def embedding_layer_norm_backward(
        self, spec, grad, mean, rstd, grad_word, grad_position, grad_type, grad_weight, grad_bias
    ) -> None:
        grad_v = memory.empty(grad.shape, torch.float32, grad.device)
        _ops.cpu_embedding_layer_norm_backward.default(
            grad, spec.ids, spec.word, spec.position_ids, spec.position, spec.type_ids, spec.token_type,
            _float(spec.norm_weight), mean, rstd, spec.rng, spec.dropout_p, grad_v, grad_weight, grad_bias,
        )  # fmt: skip
        for table, ids, padding in (
            (grad_word, spec.ids, spec.padding_idx), (grad_position, spec.position_ids, -1),
            (grad_type, spec.type_ids, -1),
        ):  # fmt: skip
            if table is not None:
                _ops.cpu_embedding_gradient.default(grad_v, ids, padding, table)


def _additive_arguments(spec) -> tuple:
    query, key, value, score_weight, bias, *masks = spec
    return query, key, value, _float(score_weight), _float(bias), *masks


_PANEL = 32  # output columns per panel: csrc/cpu/linear.hpp


def gate_panels(weight: torch.Tensor) -> torch.Tensor:
    """The hidden-state weight (G * H, H) of a recurrent layer, as the panels of each gate, for the forward steps."""
    rows, width = weight.shape
    of_each = -(-width // _PANEL)
    panels = memory.empty((rows // width * of_each, width, _PANEL), torch.float32, weight.device)
    weight = unit_stride_weight(weight.detach())
    if width % _PANEL == 0:
        _ops.cpu_to_panels.default(weight, panels)
    else:
        for part, place in zip(weight.split(width), panels.split(of_each)):
            _ops.cpu_to_panels.default(part, place)
    return panels


def back_panels(weight: torch.Tensor) -> torch.Tensor:
    """The same weight (G * H, H) transposed, as panels, for the backward steps."""
    rows, width = weight.shape
    panels = memory.empty((-(-width // _PANEL), rows, _PANEL), torch.float32, weight.device)
    _ops.cpu_to_panels.default(unit_stride_weight(weight.detach()).t(), panels)
    return panels


def _recurrence_arguments(spec) -> tuple:
    """What forward and backward of the native recurrence both take."""
    return spec.hidden, spec.memory, spec.sequences, spec.steps, spec.reverse


def _states_before(spec, out: torch.Tensor) -> torch.Tensor:
    """The hidden state before the step of each position; undefined at positions that belong to no sequence."""
    before = memory.empty_like(out)
    before[:1] = before[-1:] = 0.0
    begins, lengths = spec.sequences[0], spec.sequences[1]
    some = lengths > 0
    if spec.reverse:
        before[:-1] = out[1:]
        begins = begins + lengths - 1
    else:
        before[1:] = out[:-1]
    before[begins[some]] = spec.hidden[some]
    return before


def _rows(weight: torch.Tensor) -> torch.Tensor:
    """A weight with unit stride along its rows, in a dtype that the decoding step reads; a copy only where needed."""
    return unit_stride_weight(weight.detach().float() if weight.dtype == torch.float16 else weight.detach())


_TILE = 64  # queries: kAttentionQueries of csrc/cpu/attention.hpp


def _reach(spec) -> int:
    """The largest distance that the kernel looks up: that of the call plus one tile, as the last tile reads past it."""
    return max(spec.max_seqlen_q, spec.max_seqlen_k) + _TILE


def _relative_bias(spec) -> torch.Tensor | None:
    return None if spec.relative_bias is None else relative_bias.lookup(spec, _reach(spec))[1]


def _float(t: torch.Tensor | None) -> torch.Tensor | None:
    """A norm weight or bias as contiguous float32. It is a few kilobytes, and the kernels then need only one path."""
    if t is None or (t.dtype is torch.float32 and t.is_contiguous()):
        return t
    return t.detach().to(torch.float32).contiguous()


BACKEND = CpuBackend()
