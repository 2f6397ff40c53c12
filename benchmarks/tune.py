"""Finds the block sizes of the attention kernels on this GPU and writes them to kernels/attention_configurations.py.

    python benchmarks/tune.py                     every class of this GPU's architecture, some minutes
    python benchmarks/tune.py --kernel forward --width 64 128
    python benchmarks/tune.py --few --seconds 110 --output tiles.json     if time is short: the most important ones
    python benchmarks/tune.py --apply tiles.json                          afterwards, on any machine

Times a forward or backward pass for every candidate of one kernel, with the table's configurations for the other
kernels,
on calls with 16k tokens and hidden size 2048: plain (causal), rich (a bias and dropout), with a relative bias, and with
grouped heads. A candidate replaces a row of the table only if it is at least 2% faster and has the same result. --few:
only plain calls of head dims 64 and 128 and the nearest candidates, written to --output after each. Models never tune
at run time.
"""

import argparse
import itertools
import json
import pathlib
import re
import time
from collections.abc import Callable, Iterator

import torch
from transformer_fast.benchmarks.shapes import HIDDEN, TOKENS
from transformer_fast.kernels import attention_configurations as configurations
from transformer_fast.kernels.attention_configurations import Config

GAIN = 0.98  # a new configuration must take less than this share of the old one's time
DISAGREEMENT = 0.02  # relative to the largest value: more than two roundings to 16 bits


def candidates(kernel: str, sliced: int | None = None) -> Iterator[Config]:
    """Block sizes, warps and stages worth timing; those that do not fit fail to launch and are skipped. sliced: the
    number of columns per slice, see Config."""
    few, many = (16, 32, 64), (64, 128)
    rows = {"decode": (16,), "backward_key": few + (128,), "backward_bias": (32, 64)}.get(kernel, many)
    columns = {"decode": (32, 64, 128, 256), "backward_key": many, "backward_bias": (32, 64)}.get(kernel, (32, 64, 128))
    for m, n, warps, stages in itertools.product(rows, columns, (4, 8), (1, 2, 3, 4)):
        if m * n >= 32 * 32 or kernel == "decode":
            yield Config(m, n, warps, stages, columns=sliced)


def nearest(kernel: str, old: Config, most: int = 8) -> list[Config]:
    """The `candidates` that differ from the table's row by one step in one or two fields."""

    def steps(choice: Config) -> int:
        ratios = zip(choice[:3], old[:3])
        doublings = sum(abs(a.bit_length() - b.bit_length()) for a, b in ratios)
        return doublings + abs(choice.num_stages - old.num_stages)

    found = [c._replace(max_registers=old.max_registers) for c in candidates(kernel, old.columns)]
    return sorted((c for c in found if 0 < steps(c) <= 2), key=steps)[:most]


def best(old: Config, choices: Iterator[Config], seconds: Callable[[Config], float]) -> Config:
    """The fastest choice if it is faster by GAIN, else the old one. `seconds` raises RuntimeError for choices that
    cannot run."""
    fastest, least = old, seconds(old) * GAIN
    for choice in choices:
        try:
            taken = seconds(choice)
        except RuntimeError:  # out of shared memory or registers
            continue
        if taken < least:
            fastest, least = choice, taken
    return fastest


def _arguments(config: Config) -> str:
    if None in config:
        first = config.index(None)
        given = [f"{name}={value}" for name, value in config._asdict().items() if value is not None][first:]
        return ", ".join([*map(str, config[:first]), *given])
    return ", ".join(map(str, config))


def rewrite(source: str, table: dict) -> str:
    """The text of attention_configurations.py with its TABLE replaced by `table`."""
    names = {False: "HALF", True: "SINGLE"}
    rows = []
    for (kernel, architecture, width, single), kinds in table.items():
        configs = ", ".join(f"Config({_arguments(config)})" for config in kinds) + ("," if len(kinds) == 1 else "")
        rows.append(f'    ("{kernel}", "{architecture}", {width}, {names[single]}): ({configs}),\n')
    found, count = re.subn(r"(?ms)^(TABLE: .*? = \{\n).*?^\}", lambda m: m[1] + "".join(rows) + "}", source)
    if count != 1:
        raise ValueError(f"attention_configurations.py: wanted one TABLE, found {count}")
    return found


def timer(kernel: str, shape: configurations.Shape) -> Callable[[Config], float]:
    """A function from a configuration of `kernel` to the seconds of the pass that the kernel belongs to."""
    import triton

    import transformer_fast as tf

    select = configurations.select
    dtype = torch.float32 if shape.single else torch.bfloat16
    heads, length = HIDDEN // shape.width, 4096 if kernel == "decode" else 2048
    batch = TOKENS // length
    queries = 1 if kernel == "decode" else length

    def data(rows, heads=heads):
        return torch.randn(batch, heads, rows, shape.width, device="cuda", dtype=dtype, requires_grad=True)

    key_heads = heads // 4 if shape.kind == "grouped" else heads
    q, k, v = data(queries), data(length, key_heads), data(length, key_heads)
    bias = torch.randn(1, heads, queries, length, device="cuda", requires_grad=True)
    relative = torch.randn(32, heads, device="cuda", requires_grad=True)
    arguments = {
        "plain": {"is_causal": kernel != "decode"},
        "grouped": {"is_causal": True, "enable_gqa": True},
        "rich": {"bias": bias} | ({"dropout_p": 0.1} if kernel != "decode" else {}),
        "relative": {"relative_bias": tf.RelativeBias(relative)}
        | ({"dropout_p": 0.1} if kernel == "backward_table" else {}),  # else the dQ kernel computes these sums
    }[shape.kind]
    leaves = [q, k, v] + {"rich": [bias], "relative": [relative]}.get(shape.kind, [])
    expected: list[torch.Tensor] = []

    def check(found) -> None:
        """Compare with the first configuration that was timed, the table's, so that a fast wrong one cannot win."""
        if shape.kind != "plain":  # dropout differs in each call
            return
        if not expected:
            expected.extend(t.clone() for t in found)
        for t, e in zip(found, expected):
            if not (t - e).abs().max() <= DISAGREEMENT * e.abs().max():
                raise RuntimeError("wrong result")

    def seconds(config: Config) -> float:
        configurations.select = lambda name, s: config if name == kernel else select(name, s)
        try:
            with tf.backend("triton"):
                out = tf.scaled_dot_product_attention(q, k, v, **arguments)
                if kernel.startswith("backward"):
                    grad = torch.ones_like(out)
                    check(torch.autograd.grad(out, leaves, grad, retain_graph=True))
                    return triton.testing.do_bench(
                        lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True), return_mode="median"
                    )
                check([out.detach()])
                with torch.no_grad():
                    return triton.testing.do_bench(
                        lambda: tf.scaled_dot_product_attention(q, k, v, **arguments), return_mode="median"
                    )
        except triton.runtime.errors.OutOfResources as error:
            raise RuntimeError(str(error)) from None
        finally:
            configurations.select = select

    return seconds


def needed(kernel: str, shape: configurations.Shape) -> bool:
    """Whether calls of this shape launch the kernel."""
    only = {"backward_bias": "rich", "backward_table": "relative"}
    if shape.kind == "grouped" and kernel != "backward_key":
        return False
    return shape.kind == only.get(kernel, shape.kind)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kernel", nargs="*", default=list(configurations.KERNELS), choices=configurations.KERNELS)
    parser.add_argument("--width", type=int, nargs="*", default=[64, 128, 256])
    parser.add_argument("--single", action="store_true", help="float32 rows too")
    parser.add_argument("--few", action="store_true", help="plain calls, head dims 64 and 128, nearest candidates")
    parser.add_argument(
        "--seconds", type=float, default=float("inf"), help="with --few: begin no candidate after this time"
    )
    parser.add_argument("--output", type=pathlib.Path, help="with --few: where to write what was found")
    parser.add_argument("--apply", type=pathlib.Path, metavar="FILE", help="put what --few found into the table")
    options = parser.parse_args()
    if options.apply:
        return apply(json.loads(options.apply.read_text()))
    if not torch.cuda.is_available():
        raise SystemExit("tune: there is no NVIDIA GPU here; the table is not changed")
    architecture = configurations.architecture(torch.cuda.get_device_capability())
    if options.few:
        return few(architecture, options.output, time.monotonic() + options.seconds)
    table = dict(configurations.TABLE)
    for kernel, width, single in itertools.product(options.kernel, options.width, (False, True)):
        if single and not options.single:
            continue
        found = []
        for kind in configurations.KINDS:
            shape = configurations.Shape(architecture, width, single, kind)
            old = configurations.select(kernel, shape)
            taken = needed(kernel, shape)
            found.append(best(old, candidates(kernel, old.columns), timer(kernel, shape)) if taken else old)
            print(f"{architecture} {kernel} width {width} {kind}: {old} -> {found[-1]}", flush=True)
        table[kernel, architecture, width, single] = tuple(found)
    path = pathlib.Path(configurations.__file__)
    path.write_text(rewrite(path.read_text(), table))


def few(architecture: str, output: pathlib.Path | None, end: float, timer: Callable = timer) -> None:
    """Find the fastest of a few candidates for each kernel of plain 16-bit calls; write the results after each."""
    found: list[dict] = []
    for width, kernel in itertools.product((64, 128), ("forward", "backward_key", "backward_query")):
        shape = configurations.Shape(architecture, width)
        old = configurations.select(kernel, shape)
        entry: dict = {"kernel": kernel, "architecture": architecture, "width": width, "times": []}
        found.append(entry)
        seconds = timer(kernel, shape)
        for config in (old, *nearest(kernel, old)):
            if time.monotonic() > end:
                return
            try:
                taken, why = seconds(config), ""
            except RuntimeError as error:
                taken, why = None, str(error).splitlines()[0][:100]
            entry["times"].append({"config": list(config), "ms": taken, "why": why})
            print(f"{architecture} {kernel} width {width} {config}: {taken or why}", flush=True)
            if output:
                output.parent.mkdir(parents=True, exist_ok=True)
                fresh = output.with_suffix(".new")
                fresh.write_text(json.dumps(found, indent=1))
                fresh.replace(output)


def apply(found: list[dict]) -> None:
    """Write the fastest configuration of each entry into the table, if it is faster by GAIN."""
    table = dict(configurations.TABLE)
    for entry in found:
        timed = [t for t in entry["times"] if t["ms"] is not None]
        if not timed or timed[0] is not entry["times"][0]:  # the table's own row was not timed: nothing to compare with
            continue
        fastest = min(timed, key=lambda t: t["ms"])
        if fastest["ms"] >= GAIN * timed[0]["ms"]:
            continue
        kernel, architecture, width = entry["kernel"], entry["architecture"], entry["width"]
        kinds = [
            configurations.select(kernel, configurations.Shape(architecture, width, kind=kind))
            for kind in configurations.KINDS
        ]
        kinds[0] = Config(*fastest["config"])
        table[kernel, architecture, width, False] = tuple(kinds)
        print(f"{architecture} {kernel} width {width} plain: {kinds[0]}")
    path = pathlib.Path(configurations.__file__)
    path.write_text(rewrite(path.read_text(), table))


if __name__ == "__main__":
    main()
