"""Draws calls of every op, forward and backward, on every instruction set, and compares each with float64.

    python tests/fuzz.py --minutes 10 --seed 3 [--op attention]

Every tensor gets its own strides, storage offset and dtype. A failure is printed as a standalone program.
"""

import argparse
import collections
import os
import random
import signal
import sys
import time
import traceback

import fuzz_calls
import fuzz_draw
import torch
from numerics import GRADIENT, OUTPUT, assert_as_accurate, pooled

from transformer_fast.backends import native

_HEAD = """import contextlib, torch, torch.nn.functional as F, transformer_fast as tf
from transformer_fast.backends import native
if not native.load(): native.set_isa({isa!r})
torch.set_num_threads({threads}); torch.manual_seed(SEED)
"""
_RUN = """
def run(function, cast, grads, name):
  with tf.backend(name) if name else contextlib.nullcontext():
    leaves = [cast(t).detach().requires_grad_({grad} and name in wanted) for name, t in tensors.items()]
    torch.manual_seed(SEED + 7); out = function(*leaves); out = list(out) if isinstance(out, tuple) else [out]
    if not {grad}: return out, [], []
    with_grad = [y for y in out if y.requires_grad]
    grads = grads or [{make_grad} for y in with_grad]
    found = torch.autograd.grad(with_grad, [t for t in leaves if t.requires_grad], [g.to(y.dtype) for g, y in zip(grads, with_grad)], allow_unused=True)
    return out, list(found), grads
wide = lambda t: t.double() if t.is_floating_point() else t
found, found_grads, grads = run(ours, lambda t: t, None, {name!r})
truth, truth_grads, _ = run(plain, wide, grads, "eager")
same, same_grads, _ = run(plain, lambda t: t, grads, "eager")
"""  # noqa: E501
_PRINT = """names = ["out"] * len(found) + ["grad of " + n for n in tensors if n in wanted]
for name, a, t, e in zip(names, found + found_grads, truth + truth_grads, same + same_grads):
    if a is not None: print(name, "error", (a.double() - t).abs().max().item(), "plain PyTorch's", (e.double() - t).abs().max().item(), "largest", t.abs().max().item())
"""  # noqa: E501
_GRADS = (
    "torch.randn(y.shape).to(y.dtype)",
    "torch.randn(y.shape[-1:]).to(y.dtype).expand(y.shape)",
    "torch.randn(*y.shape, 2).to(y.dtype)[..., 1]",
    "torch.randn(y.shape[::-1]).to(y.dtype).permute([*range(y.dim())][::-1])",
    "torch.randn(y.numel() + 3).to(y.dtype)[3:].view(y.shape)",
)


def program(call: fuzz_calls.Call, rng: random.Random, backend: str = "") -> str:
    """The call, on a backend, as Python source that computes found, truth, same and their gradients."""
    names = ", ".join(call.tensors)
    lines = [_HEAD.format(isa=call.isa, threads=rng.choice((1, 1, 1, 1, 2)))]
    lines += [f"{name} = {source}\n" for name, source in call.tensors.items()]
    lines += [f"{line}\n" for line in call.setup]
    lines.append(f"tensors, wanted = dict({', '.join(f'{n}={n}' for n in call.tensors)}), {call.wanted!r}\n")
    lines.append(f"ours = lambda {names}: {call.ours}\n")
    lines.append(f"plain = {'ours' if call.plain is None else f'lambda {names}: {call.plain}'}")
    lines.append(_RUN.format(grad=call.grad and bool(call.wanted), make_grad=rng.choice(_GRADS), name=backend))
    return "".join(lines)


def verdict(source: str, call: fuzz_calls.Call, seed: int) -> str:
    """'' if the program runs and is accurate, else what is wrong.

    The largest error of few elements can be large by chance (with 50 elements in one call of five, although both are
    equally accurate). So a call that seems inaccurate is repeated with other data, and the errors of ours and of plain
    PyTorch are pooled. A real loss of accuracy stays visible, however rare the data that show it.
    """
    results: list = []
    wrong = ""
    for count in (1, 8, 64):
        try:
            results += [_results(source, call, seed + i) for i in range(len(results), count)]
            _check(results, call)
            return ""
        except AssertionError as error:
            wrong = str(error)
        except Exception:  # any exception of a call is a finding
            return traceback.format_exc(limit=-3)
    return wrong


def _results(source: str, call: fuzz_calls.Call, seed: int) -> dict[str, tuple[torch.Tensor, ...]]:
    """name -> (ours, truth, plain PyTorch's in the same dtype), for the outputs and gradients."""
    space, found = _left_behind(source.replace("SEED", str(seed))), {}
    for i, (ours, truth, same) in enumerate(zip(space["found"], space["truth"], space["same"])):
        assert ours.shape == truth.shape, f"output {i}: shape {tuple(ours.shape)}, wanted {tuple(truth.shape)}"
        found[f"output {i}"] = (ours.detach(), truth.detach().double(), same.detach())
    named = [n for n in call.tensors if n in call.wanted]
    for name, ours, truth, same in zip(named, space["found_grads"], space["truth_grads"], space["same_grads"]):
        if truth is None or same is None:
            assert ours is None or not ours.any(), f"gradient of {name}: wanted none"
            continue
        assert ours is not None, f"gradient of {name}: got none"
        assert ours.dtype == same.dtype, f"gradient of {name}: {ours.dtype}, wanted {same.dtype}"
        assert ours.shape == truth.shape, f"gradient of {name}: {tuple(ours.shape)}, wanted {tuple(truth.shape)}"
        found[f"gradient of {name}"] = (ours, truth, same)
    return {name: three for name, three in found.items() if not three[2].isnan().any()}  # overflow in plain PyTorch


def _left_behind(source: str) -> dict:
    """Run the program and return its results. The namespace and the functions in it refer to each other, and to every
    tensor of the call, so it is cleared: Python collects such cycles late."""
    space: dict = {}
    try:
        exec(compile(source, "<drawn call>", "exec"), space)
        return {name: space[name] for name in ("found", "truth", "same", "found_grads", "truth_grads", "same_grads")}
    finally:
        space.clear()


def _check(results: list[dict], call: fuzz_calls.Call) -> None:
    names = [name for name in results[0] if all(name in r for r in results)]
    joined = {name: [torch.cat([r[name][i].flatten() for r in results]) for i in range(3)] for name in names}
    grads = {name: three for name, three in joined.items() if name.startswith("gradient")}
    for name, three in joined.items():
        if name not in grads:
            assert_as_accurate(*three, OUTPUT, name)
    try:
        for name, three in grads.items():
            assert_as_accurate(*three, GRADIENT, name)
    except AssertionError:
        # With very few keys a gradient is exactly zero in plain PyTorch and rounding noise in any fused backward pass.
        # It is then compared with the size of the other gradients.
        if not call.few:
            raise
        ours, truth, same = ({n: t[i].double() for n, t in grads.items()} for i in range(3))
        if not any(t.any() for t in truth.values()):  # nothing to compare with
            raise
        whole = [pooled(t, truth) for t in (ours, truth, same)]
        floor = max(torch.finfo(t[0].dtype).eps for t in grads.values())
        error, theirs = ((t - whole[1]).abs().max().item() for t in (whole[0], whole[2]))
        assert error <= GRADIENT * max(theirs, 2 * floor), f"gradients together: {error:.2e}, plain {theirs:.2e}"


def fuzz(op: str, seed: int, seconds: float, most: int = 10**9) -> tuple[int, list[str]]:
    """Draw calls of `op` for `seconds`, at most `most` of them. Returns their number and each failure as text."""
    end, failures, count = time.monotonic() + seconds, [], 0
    threads = torch.get_num_threads()
    isa = "" if native.load() else native.current_isa()
    try:
        while count < most and time.monotonic() < end:
            rng = random.Random(f"{seed} {op} {count}")
            call = fuzz_calls.draw(op, rng)
            source = program(call, rng)
            data = rng.randrange(1000)
            wrong = verdict(source, call, data)
            count += 1
            if wrong:
                said = wrong.strip().replace("\n", "\n# ")
                source = source.replace("SEED", str(data))
                failures.append(f"# {op}, draw {count - 1} of seed {seed}: {said}\n{source}{_PRINT}")
    finally:
        torch.set_num_threads(threads)
        if isa:
            native.set_isa(isa)
    return count, failures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--op", choices=sorted(fuzz_calls.OPS), action="append", help="default: all, in turn")
    parser.add_argument("--isa", action="append", help="instruction set; default: all of this processor's")
    parser.add_argument("--show", type=int, default=3, help="failures of each op to print")
    arguments = parser.parse_args()
    fuzz_draw.ISAS = arguments.isa or fuzz_draw.ISAS
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        # PyTorch caches code for the last 1,024 shapes of its 16-bit products, but drawn shapes seldom repeat.
        os.environ.setdefault(name, "16")
    ops, end = arguments.op or sorted(fuzz_calls.OPS), time.monotonic() + 60 * arguments.minutes
    counts, failed = collections.Counter(), collections.Counter()
    round_, started = 0, time.monotonic()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        while time.monotonic() < end:
            for op in ops:
                left = end - time.monotonic()
                count, failures = fuzz(op, arguments.seed * 1000 + round_, min(5.0, max(left, 0)))
                for text in failures[: max(0, arguments.show - failed[op])]:
                    print(text, flush=True)
                counts[op] += count
                failed[op] += len(failures)
            round_ += 1
    except KeyboardInterrupt:
        print(f"stopped after {(time.monotonic() - started) / 60:.1f} minutes")
    for op in ops:
        print(f"{op:26s} {counts[op]:7d} calls, {failed[op]} failed")
    print(f"{'all':26s} {sum(counts.values()):7d} calls, {sum(failed.values())} failed (seed {arguments.seed})")
    return 1 if sum(failed.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
