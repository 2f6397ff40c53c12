"""Triton kernels (kernels/) for NVIDIA GPUs from sm_80 on. With TRITON_INTERPRET=1 they run on CPU tensors."""

import contextlib
import functools
import importlib.util
import os

import torch

from . import Backend, Call, memory, verified
from .philox import keep_scale, threshold

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_WIDE_HEAD = 128  # the last rows of kernels/attention_configurations.py are for head dims over this
# kernels/embedding.py keeps a row in registers. The other grids have an axis of column blocks, limited to 65535.
_WIDEST = {"embedding_layer_norm": 4096, "norm": 2**25, "additive_attention": 2**22}


def verified_on_gpu() -> frozenset[str]:
    """Ops whose kernels have passed their tests on a GPU, according to the ledger in benchmarks/results. The others
    have only been tested under Triton's interpreter and compiled ahead of time; `info` says so."""
    return verified.names() & TritonBackend.ops()


@functools.cache
def _missing() -> str:
    return "" if importlib.util.find_spec("triton") else "Triton is not installed (pip install triton)"


def interpreting() -> bool:
    """Whether TRITON_INTERPRET=1 is set. Triton reads it at its first import, so it must be set before that."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    """Multiprocessors of the GPU; 2 under the interpreter, so that a program loops over several tiles there too."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def _device_of(t: torch.Tensor):
    """A context in which t's device is the current one, as Triton launches on torch's current device and stream."""
    if t.is_cuda and t.get_device() != torch.cuda.current_device():
        return torch.cuda.device(t.device)
    return contextlib.nullcontext()


def _on_device(device: int, function):
    """The function, run with this device as the current one."""

    def run(*args):
        if device == torch.cuda.current_device():
            return function(*args)
        with torch.cuda.device(device):
            return function(*args)

    return run


@functools.cache
def _launcher():
    from . import triton_launch

    return triton_launch


class TritonBackend(Backend):
    name = "triton"
    narrows_parameter_gradients = True

    def status(self) -> str:
        if not torch.cuda.is_available():
            return "idle: no NVIDIA GPU is visible"
        if _missing():
            return f"missing: {_missing()}. They would bring fused kernels on this GPU"
        unverified = ", ".join(sorted(self.ops() - verified_on_gpu()))
        note = f"; not yet run on a GPU: {unverified}" if unverified else ""
        old = self._old_gpu()
        return f"idle: {old}" if old else f"active{note}"

    def _old_gpu(self) -> str:
        major, minor = torch.cuda.get_device_capability()
        return f"the GPU has compute capability {major}.{minor}, below 8.0" if major < 8 else ""

    def why_not(self, call: Call) -> tuple[str, ...]:
        reasons = []
        if _missing():
            reasons.append(_missing())
        if call.device == "cuda":
            old = torch.cuda.is_available() and self._old_gpu()
            if old:
                reasons.append(old)
        elif not (call.device == "cpu" and interpreting()):
            reasons.append(f"device {call.device} is not cuda (TRITON_INTERPRET=1 runs it on CPU tensors, slowly)")
        if call.dtype not in _DTYPES:
            reasons.append(f"dtype {call.dtype} is not float32, bfloat16 or float16")
        if call.op not in self.ops():
            reasons.append(f"there is no Triton kernel for {call.op}")
        if call.size > _WIDEST.get(call.op, call.size):
            reasons.append(f"width {call.size} is over {_WIDEST[call.op]}")
        return tuple(reasons)

    def detour(self, call: Call) -> str:
        if call.op != "attention" or "backward" not in call.features or call.size <= _WIDE_HEAD:
            return ""
        if call.dtype == torch.float32 or _large_tiles(call.device):
            return f"gradients with head dims over {_WIDE_HEAD} go in slices, each of which recomputes the scores"
        return ""

    def norm_forward(self, spec, y, sum_out, mean, rstd):
        def build(plan):
            from ..kernels.norm import layer_norm_forward

            first, rest = plan.inputs[:5], plan.inputs[5:]
            drops = threshold(spec.dropout_p), keep_scale(spec.dropout_p)
            layer_norm_forward(*first, spec.eps, spec.rms, *drops, *rest, plan)

        inputs = spec.x, spec.residual, _dense(spec.weight), _dense(spec.bias), _dense(spec.rng), y, sum_out, mean, rstd
        return self._launch(("norm", spec.eps, spec.rms, spec.dropout_p), y, inputs, build, 4)

    def norm_backward(self, spec, grad_y, grad_sum, mean, rstd, grad_v, grad_x, grad_weight, grad_bias):
        def build(plan):
            from ..kernels.norm import layer_norm_backward

            first, rest = plan.inputs[:5], plan.inputs[5:]
            drops = threshold(spec.dropout_p), keep_scale(spec.dropout_p)
            layer_norm_backward(*first, *drops, *rest, _multiprocessors(grad_v.device), plan)

        inputs = (
            grad_y, grad_sum, spec.x, _dense(spec.weight), _dense(spec.rng), _dense(mean), _dense(rstd), grad_v, grad_x,
            grad_weight, grad_bias,
        )  # fmt: skip
        return self._launch(("norm backward", spec.dropout_p), grad_v, inputs, build, 4)

    def _launch(self, key: tuple, output: torch.Tensor, inputs: tuple, build, strided: int):
        """strided: how many of the inputs, at the front, may have any shape and strides; the others are contiguous and
        have shapes that follow from those and the key. Returns a function that repeats the launches on other inputs of
        the same kind, or None."""
        run, device = _launcher().run, output.get_device()
        if device < 0:
            return run((*key, output.device), inputs, build, strided)
        steps = _on_device(device, run)((*key, output.device), inputs, build, strided)
        return None if steps is None else _on_device(device, steps)

    def attention_forward(self, spec, out, lse):
        from .triton_attention import attention_forward

        with _device_of(out):
            repeat = attention_forward(spec, out, lse)
        return repeat if repeat is None or not out.is_cuda else _on_device(out.get_device(), repeat)

    def attention_append(self, spec, key, value, out, lse) -> None:
        from .triton_attention import attention_append

        with _device_of(out):
            if not attention_append(spec, key, value, out, lse):
                super().attention_append(spec, key, value, out, lse)

    def attention_backward(self, spec, grad_out, grad_lse, out, lse, dq, dk, dv, dbias, dtable):
        from .triton_attention import attention_backward

        with _device_of(out):
            repeat = attention_backward(spec, grad_out, grad_lse, out, lse, dq, dk, dv, dbias, dtable)
        return repeat if repeat is None or not out.is_cuda else _on_device(out.get_device(), repeat)

    def additive_attention_forward(self, spec, out, weights) -> None:
        from ..kernels.additive_attention import additive_attention_forward

        mask = None if spec.mask is None else spec.mask.view(torch.uint8)
        with _device_of(out):
            additive_attention_forward(
                *spec[:3], _vector(spec.score_weight), _vector(spec.bias), mask, _dense(spec.key_lengths), out,
                weights,
            )  # fmt: skip

    def additive_attention_backward(self, spec, *tensors) -> None:
        from ..kernels.additive_attention import additive_attention_backward

        with _device_of(spec.query):
            additive_attention_backward(
                *spec[:3], _vector(spec.score_weight), _vector(spec.bias), _dense(spec.key_lengths), *tensors
            )

    def bias_activation_forward(self, x, bias, gate, activation, y):
        def build(plan):
            from ..kernels.activation import bias_activation_forward

            *first, y = plan.inputs
            bias_activation_forward(*first, activation, y, plan)

        return self._launch(("activation", activation), y, (x, _dense(bias), gate, y), build, 3)

    def bias_activation_backward(self, grad, x, bias, gate, activation, grad_x, grad_bias, grad_gate):
        def build(plan):
            from ..kernels.activation import bias_activation_backward

            first, rest = plan.inputs[:4], plan.inputs[4:]
            bias_activation_backward(*first, activation, *rest, _multiprocessors(grad_x.device), plan)

        inputs = (grad, x, _dense(bias), gate, grad_x, grad_bias, grad_gate)
        return self._launch(("activation backward", activation), grad_x, inputs, build, 4)

    def dropout_forward(self, x, rng, p, y) -> None:
        from ..kernels.dropout import dropout_forward

        x = x if x.stride(1) == 1 else x.contiguous()
        with _device_of(y):
            dropout_forward(x, _dense(rng), threshold(p), keep_scale(p), y)

    def rotary_embedding(self, x, cos, sin, positions, interleaved, inverse, y) -> None:
        from ..kernels.rotary import rotary

        with _device_of(y):
            rotary(x, cos, sin, positions, interleaved, inverse, y)

    def rotary_append(self, spec, y) -> None:
        from ..kernels.rotary import rotary_append

        with _device_of(y):
            rotary_append(*spec[:5], _dense(spec.cache_lengths), *spec[6:], y)

    def cross_entropy_forward(self, spec, losses, largest, total) -> None:
        from ..kernels.cross_entropy import cross_entropy_forward

        with _device_of(losses):
            cross_entropy_forward(
                spec.logits, _dense(spec.target), _dense(spec.weight), *spec[3:], losses, largest, total
            )

    def cross_entropy_backward(self, spec, grad_losses, largest, total, grad) -> None:
        from ..kernels.cross_entropy import cross_entropy_backward

        with _device_of(grad):
            cross_entropy_backward(
                _dense(grad_losses), spec.logits, _dense(spec.target), _dense(spec.weight), *spec[3:], _dense(largest),
                _dense(total), grad,
            )  # fmt: skip

    def embedding_layer_norm_forward(self, spec, y, mean, rstd) -> None:
        from ..kernels.embedding import embedding_layer_norm_forward

        with _device_of(y):
            embedding_layer_norm_forward(
                *_tables(spec), _dense(spec.norm_weight), _dense(spec.norm_bias), _dense(spec.rng), spec.eps,
                threshold(spec.dropout_p), keep_scale(spec.dropout_p), y, mean, rstd,
            )  # fmt: skip

    def embedding_layer_norm_backward(
        self, spec, grad, mean, rstd, grad_word, grad_position, grad_type, grad_weight, grad_bias
    ) -> None:
        from ..kernels.embedding import embedding_gradient, embedding_layer_norm_backward

        with _device_of(grad):
            grad_v = memory.empty(grad.shape, torch.float32, grad.device)
            embedding_layer_norm_backward(
                grad, *_tables(spec), _dense(spec.norm_weight), _dense(mean), _dense(rstd), _dense(spec.rng),
                threshold(spec.dropout_p), keep_scale(spec.dropout_p), grad_v, grad_weight, grad_bias,
                _multiprocessors(grad.device),
            )  # fmt: skip
            for table, ids, padding in (
                (grad_word, spec.ids, spec.padding_idx), (grad_position, spec.position_ids, -1),
                (grad_type, spec.type_ids, -1),
            ):  # fmt: skip
                if table is not None:
                    embedding_gradient(grad_v, ids, padding, table)


def _large_tiles(device: str) -> bool:
    """Whether the GPU's matrix instructions (wgmma, tcgen05) need at least 64 rows."""
    return device == "cuda" and torch.cuda.is_available() and torch.cuda.get_device_capability()[0] in (9, 10, 11)


def _dense(t: torch.Tensor | None) -> torch.Tensor | None:
    """A contiguous t: the kernels read vectors without a stride."""
    return t if t is None or t.is_contiguous() else t.contiguous()


def _vector(t: torch.Tensor | None) -> torch.Tensor | None:
    return None if t is None else t.detach().to(torch.float32).contiguous()


def _tables(spec):
    return spec.ids, spec.word, spec.type_ids, spec.token_type, spec.position_ids, spec.position


BACKEND = TritonBackend()
