"""Predicts the attention kernels' speed on an H100 from their machine code, without a GPU:

    python benchmarks/sass_model.py [--record]

A kernel's main loop is read from its SASS for sm_90a: matrix products (HGMMA, HMMA), exponentials (MUFU), arithmetic,
bytes of shared memory, barriers, and the instructions between a product and the wait for it. From these, cycles per
iteration are computed in two ways:

- the time of each unit of a multiprocessor at its full rate: tensor cores, MUFU, FMA and ALU pipes, instruction issue,
  shared memory;
- a simulation of the warpgroups that share the multiprocessor: products queue at the tensor cores in the order of issue
  and run asynchronously, arithmetic shares the pipes, waits and named barriers stop a warpgroup.

The larger of the two is the prediction. Not modelled: prologue and epilogue, masked tiles, L2 and DRAM, the drop of the
clock under load. So a prediction is for the main loop, at the stated clock, and measured rates of long sequences should
be somewhat lower. `--record` writes the rows of the CUDA kernels and of the installed Triton's into
benchmarks/results/predictions/h100.csv, each with the hash of its sources.
"""

import argparse
import collections
import csv
import dataclasses
import hashlib
import importlib.util
import pathlib
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator

ROOT = pathlib.Path(__file__).resolve().parent.parent
CUDA_SOURCES = [f"attention_{side}_{kind}" for kind in ("wgmma", "mma") for side in ("forward", "backward")]
RECORD = ROOT / "benchmarks" / "results" / "predictions" / "h100.csv"
MULTIPROCESSORS, GHZ = 132, 1.755  # H100 SXM, its boost clock
TENSOR_FMA, SHARED_BYTES = 2048, 128  # per clock and multiprocessor, 16-bit dense
# Clocks per warp instruction of the pipes of one of the four sub-partitions of a multiprocessor.
MUFU, ALU, FMA = 8, 2, 1
MMA = 4 / 0.629  # HMMA.16816: published microbenchmarks find 62.9% of the rate of wgmma
PIPES = ("issue", "tensor", "MUFU", "FMA", "ALU", "shared")
PRODUCTS = re.compile(r"HG?MMA\b")
FMA_PIPE = ("FFMA", "FADD", "FMUL", "HFMA2", "HADD2", "HMUL2", "IMAD", "MOV")
NO_PIPE = ("U", "R2UR", "S2UR", "NOP", "BRA", "BSSY", "BSYNC", "WARPSYNC", "DEPBAR", "SYNCS", "FENCE", "LDC", "ELECT")
PRODUCT_LATENCY, WAIT_LATENCY, BARRIER_LATENCY = 32, 16, 24  # clocks; published microbenchmarks' order of magnitude
ITERATIONS = 24  # of a simulation, after the same number of warm-up iterations


@dataclasses.dataclass(frozen=True)
class Instruction:
    opcode: str
    operands: str


@dataclasses.dataclass(frozen=True)
class Loop:
    """The instructions of one warp in an iteration, without blocks that inner tiles skip."""

    instructions: tuple[Instruction, ...]

    def count(self, *names: str) -> int:
        return sum(i.opcode.split(".")[0] in names for i in self.instructions)


def parse(sass: str) -> dict[str, list[str | Instruction]]:
    """{kernel name: labels and instructions, in order}."""
    kernels: dict[str, list[str | Instruction]] = {}
    for part in re.split(r"^\.text\.", sass, flags=re.MULTILINE)[1:]:
        name, *lines = part.splitlines()
        items = kernels.setdefault(name.rstrip(":"), [])
        for line in lines:
            if label := re.match(r"(\.L_x?_?\w+):", line):
                items.append(label[1])
            elif found := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:\{\s*)?(?:@!?U?P\w+ +)?([A-Z][\w.]*)\s*([^;]*)", line):
                items.append(Instruction(found[1], found[2].strip()))
    return kernels


def _target(item) -> str | None:
    found = re.search(r"`\((\S+)\)", item.operands) if isinstance(item, Instruction) else None
    return found[1] if found and item.opcode.startswith("BRA") else None


def main_loop(items: list[str | Instruction]) -> Loop:
    """The innermost loop with most products; among equal ones, the one with the fewest selects (masks)."""
    places = {item: n for n, item in enumerate(items) if isinstance(item, str)}
    spans = []
    for end, item in enumerate(items):
        begin = places.get(_target(item) or "", end)
        # The spin loop of a wait is at the kernel's end and branches back: it is not a main loop.
        spins = any(isinstance(i, Instruction) and i.opcode.startswith("SYNCS") for i in items[end - 3 : end])
        if begin < end and not spins:
            spans.append((begin, end))

    def products(span) -> int:
        return sum(isinstance(i, Instruction) and bool(PRODUCTS.match(i.opcode)) for i in items[span[0] : span[1]])

    spans = [s for s in spans if products(s)]
    inner = [s for s in spans if not any(o != s and s[0] <= o[0] and o[1] <= s[1] for o in spans)]
    if not inner:
        raise ValueError("no loop with matrix products")
    most = max(map(products, inner))
    loops = [Loop(tuple(_executed(items[b : e + 1]))) for b, e in inner if products((b, e)) == most]
    return min(loops, key=lambda loop: loop.count("FSEL", "ISETP", "SEL"))


def _executed(items: list[str | Instruction]) -> list[Instruction]:
    """Without blocks that are skipped in most iterations: masks and zeros at an edge, rescaling for a new maximum,
    turns of a deterministic call."""
    kept: list[Instruction] = []
    n = 0
    while n < len(items):
        item = items[n]
        if isinstance(item, Instruction):
            kept.append(item)
            target = _target(item)
            if target in items[n + 1 :]:
                end = n + 1 + items[n + 1 :].index(target)
                block = [i for i in items[n + 1 : end] if isinstance(i, Instruction)]
                choices, scaled = (sum(i.opcode == name for i in block) for name in ("FSEL", "FMUL"))
                rare = choices >= 8 or scaled >= 16 or any(i.opcode.startswith(("CCTL", "BAR")) for i in block)
                if rare and not any(PRODUCTS.match(i.opcode) for i in block):
                    n = end
                    continue
        n += 1
    return kept


def product_shape(i: Instruction) -> tuple[int, int, int]:
    """(N, bytes of shared memory, clocks of the tensor cores) of one HGMMA of 64 x N x 16."""
    n = int(re.search(r"HGMMA\.64x(\d+)x16", i.opcode)[1])
    left_in_registers = bool(re.match(r"R\d+\S*, R\d+", i.operands))
    size = n * 32 + (0 if left_in_registers else 64 * 32)
    return n, size, max(64 * n * 16 // TENSOR_FMA, size // SHARED_BYTES)


def pipes(instructions) -> collections.Counter:
    """Clocks of a sub-partition's pipes, and bytes of shared memory, for one warp."""
    used: collections.Counter = collections.Counter()
    for i in instructions:
        name = i.opcode.split(".")[0]
        used["issue"] += 1
        if name == "MUFU":
            used["MUFU"] += MUFU
        elif name == "HMMA":
            used["tensor"] += MMA
        elif name in ("LDS", "STS", "LDSM", "STSM", "LDGSTS"):
            width = re.search(r"\.(64|128)\b", i.opcode)
            matrices = re.search(r"\.(?:M|MT)88\.(\d)", i.opcode)
            size = 128 * int(matrices[1]) if matrices else 32 * (int(width[1]) // 8 if width else 4)
            used["bytes"] += size
            used["shared"] += 4 * size / SHARED_BYTES  # the four sub-partitions share it
        elif name == "SHFL":
            used["shared"] += 4
        elif name in FMA_PIPE:
            used["FMA"] += FMA
        elif not name.startswith(NO_PIPE):
            used["ALU"] += ALU
    return used


def _program(loop: Loop) -> list[tuple]:
    """The actions of a warpgroup in an iteration: ("work", clocks without contention, share of each pipe), ("product",
    clocks, last of its group), ("wait", groups), ("sync", barrier), ("arrive", barrier)."""
    steps: list[tuple] = []
    pending: list[Instruction] = []

    def flush():
        if pending:
            used = pipes(pending)
            alone = max(used[p] for p in PIPES)
            steps.append(("work", alone, {p: used[p] / alone for p in PIPES}))
            pending.clear()

    for i in loop.instructions:
        pending.append(i)
        if "HGMMA" in i.opcode:
            flush()
            steps.append(("product", product_shape(i)[2], "gsb0" in i.operands))
        elif i.opcode.startswith("WARPGROUP.DEPBAR"):
            flush()
            steps.append(("wait", int(re.search(r"gsb0, (0x\w+)", i.operands)[1], 16)))
        elif i.opcode.startswith(("BAR.SYNC", "BAR.ARV", "BAR.RED")):
            flush()
            own = re.match(r"R\d", i.operands)  # warpgroups take turns on the tensor cores
            steps.append(("arrive" if "ARV" in i.opcode else "sync", "turn" if own else "all"))
    flush()
    return steps


def simulate(loop: Loop, groups: int, together: int) -> float:
    """Clocks per iteration in the steady state, with `groups` warpgroups on a multiprocessor, in blocks of `together`
    warpgroups that share barriers."""
    program = _program(loop)
    now, tensor_free = 0.0, 0.0
    place, rounds = [0] * groups, [0] * groups
    left: list[float | None] = [None] * groups  # clocks left of a group's current work
    shares: list[dict[str, float]] = [{}] * groups  # share of each pipe in that work
    ready = [0.0] * groups
    closed: list[list[float]] = [[] for _ in range(groups)]  # when each group of products of a warpgroup is done
    arrived: collections.Counter = collections.Counter()
    turn = 0
    marks: list[float] = []
    while len(marks) < 2 * ITERATIONS:
        progressed = False
        for g in range(groups):
            while left[g] is None and ready[g] <= now:
                step, block = program[place[g]], g // together
                if step[0] == "work":
                    left[g], shares[g] = step[1], step[2]
                elif step[0] == "product":
                    tensor_free = max(tensor_free, now) + step[1]
                    if step[2]:
                        closed[g].append(tensor_free + PRODUCT_LATENCY)
                elif step[0] == "wait":
                    under_way = len(closed[g]) - step[1]
                    if under_way > 0:
                        ready[g] = max(now, closed[g][under_way - 1] + WAIT_LATENCY)
                        closed[g] = closed[g][under_way:]
                elif step == ("sync", "turn"):
                    if together * block + turn % together != g:
                        break
                elif step == ("arrive", "turn"):
                    turn += 1
                elif step[0] == "sync":
                    key = (block, place[g], rounds[g])
                    if not arrived[key, g]:
                        arrived[key, g] = 1
                        arrived[key] += 1
                        progressed = True
                    if arrived[key] < together:
                        break
                    ready[g] = now + BARRIER_LATENCY
                progressed = True
                place[g] += 1
                if place[g] == len(program):
                    place[g] = 0
                    rounds[g] += 1
                    if g == 0:
                        marks.append(now)
        if progressed:
            continue
        busy = [g for g in range(groups) if left[g] is not None]
        times = [r for r in ready if r > now]
        slower = max([1.0, *(sum(shares[g][p] for g in busy) for p in PIPES)])
        if busy:
            times.append(now + min(left[g] for g in busy) * slower)
        if not times:
            raise ValueError("the warpgroups wait for each other")
        step_to = min(times)
        for g in busy:
            left[g] -= (step_to - now) / slower
            if left[g] <= 1e-9:
                left[g] = None
                progressed = True
        now = step_to
    return (marks[-1] - marks[ITERATIONS - 1]) / ITERATIONS


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A kernel to predict. groups: number of warpgroups with products per multiprocessor, in blocks of `together`.
    loaded: bytes of shared memory that TMA reads or writes per iteration of a block. sources: their hash."""

    name: str
    loop: Loop
    groups: int
    together: int
    loaded: int = 0
    sources: str = ""


COLUMNS = [
    "kernel", "sources", "warpgroups", "products", "exponentials", "fma", "alu", "shared_bytes", "tensor_clocks",
    "mufu_clocks",
    "fma_clocks", "alu_clocks", "issue_clocks", "shared_clocks", "simulated_clocks", "clocks", "bound_by",
    "loop_tflops", "ghz", "multiprocessors",
]  # fmt: skip


def predict(kernel: Kernel) -> dict:
    """A row of COLUMNS. Clocks are per multiprocessor, for one iteration of each of its warpgroups."""
    loop, groups = kernel.loop, kernel.groups
    shapes = [product_shape(i) for i in loop.instructions if "HGMMA" in i.opcode]
    used = pipes(loop.instructions)
    size = groups * (sum(s for _, s, _ in shapes) + 4 * used["bytes"]) + groups // kernel.together * kernel.loaded
    clocks = {
        "tensor": groups * (sum(64 * n * 16 / TENSOR_FMA for n, _, _ in shapes) + used["tensor"]),
        "MUFU": groups * used["MUFU"],
        "FMA": groups * used["FMA"],
        "ALU": groups * used["ALU"],
        "issue": groups * used["issue"],
        "shared memory": size / SHARED_BYTES,
    }
    simulated = simulate(loop, groups, kernel.together)
    most = max(clocks, key=clocks.__getitem__)
    total = max(simulated, clocks[most])
    flops = 2 * groups * (sum(64 * n * 16 for n, _, _ in shapes) + 4 * 16 * 8 * 16 * loop.count("HMMA"))
    products = loop.count("HGMMA", "HMMA")
    values = [
        kernel.name, kernel.sources, groups, products, loop.count("MUFU"), used["FMA"], used["ALU"] // ALU, size,
        *(round(clocks[c]) for c in ("tensor", "MUFU", "FMA", "ALU", "issue", "shared memory")), round(simulated),
        round(total), most if clocks[most] >= 0.95 * total else "latency of waits",
        round(flops / total * MULTIPROCESSORS * GHZ / 1000), GHZ, MULTIPROCESSORS,
    ]  # fmt: skip
    return dict(zip(COLUMNS, values))


def _disassemble(cubin: pathlib.Path) -> dict[str, list[str | Instruction]]:
    command = [_tool("nvdisasm"), "-c", str(cubin)]
    return parse(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def _cubin(name: str, folder: pathlib.Path) -> pathlib.Path:
    cubin, includes = folder / f"{name}.cubin", [f"-I{ROOT}/csrc", f"-I{ROOT}/csrc/cuda"]
    source = ROOT / "csrc" / "cuda" / f"{name}.cu"
    command = ["nvcc", "-std=c++17", "-O3", "-cubin", "-arch=sm_90a", *includes, source, "-o", cubin]
    subprocess.run(command, check=True)
    return cubin


def cuda_kernels() -> list[Kernel]:
    """The kernels of csrc/cuda for plain calls in bfloat16, compiled here."""
    with tempfile.TemporaryDirectory() as folder:
        cubins = {name: _cubin(name, pathlib.Path(folder)) for name in CUDA_SOURCES}
        found = [kernel for name, cubin in cubins.items() for kernel in _kernels_of(name, cubin)]
    return sorted(found, key=lambda kernel: kernel.name)


def _kernels_of(source: str, cubin: pathlib.Path) -> Iterator[Kernel]:
    for name, items in _disassemble(cubin).items():
        if "bfloat16" not in name or not any(isinstance(i, Instruction) and PRODUCTS.match(i.opcode) for i in items):
            continue
        numbers = list(map(int, re.findall(r"Li(\d+)E", name)))
        if source == "attention_forward_wgmma":
            d, m, n = numbers[:3]
            seen = "windowed" if re.search(r"Lb(\d)E", name)[1] == "1" else "full"
            label, groups = f"cuda forward D {d} {seen} {m}x{n}", m // 64
            yield Kernel(label, main_loop(items), groups, groups, 2 * n * d * 2, sources_of(label))  # keys and values
        elif source == "attention_backward_wgmma":
            d, m = numbers[:2]
            loaded = 2 * m * d * 2 + m * 8 + m * d * 4  # queries, their gradients, statistics; dQ goes out
            label = f"cuda backward D {d} {m}x128"
            yield Kernel(label, main_loop(items), 2, 2, loaded, sources_of(label))
        elif numbers[0] in (64, 128) and re.search(r"Li2ELi64ELb0E|SideE\dELb0ELNS1_6WantedE0E", name):
            side = re.search(r"SideE(\d)", name)
            part = f"backward_{('query', 'key')[int(side[1])]}" if side else "forward"
            label = f"cuda mma {part} D {numbers[0]}"
            # Blocks of four warps; shared memory has room for three.
            blocks = min(3, 65536 // (-(-_registers(cubin, name) // 8) * 8 * 128))
            loop = main_loop(items)
            if loop.count("MUFU"):  # else an inner loop along a wide head, of which the model sees only a part
                yield Kernel(label, loop, blocks, 1, 0, sources_of(label))


def _registers(cubin: pathlib.Path, kernel: str) -> int:
    usage = subprocess.run([_tool("cuobjdump"), "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
    return int(re.search(rf"Function {kernel}:\s+REG:(\d+)", usage)[1])


def _tool(name: str) -> str:
    spec = importlib.util.find_spec("triton")  # Triton's package contains the tools
    shipped = pathlib.Path(spec.origin).parent / "backends/nvidia/bin" / name if spec and spec.origin else None
    return shutil.which(name) or str(shipped)


def triton_kernels(only: str = "", dims=(64, 128), features=("plain", "causal")) -> list[Kernel]:
    """The Triton kernels of plain and causal calls on sm_90 in bfloat16, as the installed Triton compiles them."""
    import torch
    import triton
    from triton.backends.compiler import GPUTarget

    def load(path: pathlib.Path):
        spec = importlib.util.spec_from_file_location(path.stem, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    aot = load(ROOT / "tests" / "triton_aot.py")
    import sys

    sys.modules["triton_aot"] = aot
    attention = load(ROOT / "tests" / "native" / "test_triton_attention_aot.py")
    found = []
    for head_dim in dims:
        for feature in features:
            with aot.recorded() as launches:
                attention._launch(90, torch.bfloat16, head_dim, feature)
            for launch in launches:
                kernel = launch.kernel.fn.__name__.strip("_").removesuffix("_kernel").removeprefix("attention_")
                if kernel not in ("forward", "backward_key", "backward_query") or only not in kernel:
                    continue
                source, options = aot._source(launch)
                compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
                with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
                    file.write(compiled.asm["cubin"])
                    file.flush()
                    (items,) = _disassemble(pathlib.Path(file.name)).values()
                    tool = pathlib.Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
                    usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True).stdout
                warps, registers = compiled.metadata.num_warps, int(re.search(r"REG:(\d+)", usage)[1])
                blocks = min(65536 // (registers * warps * 32), 232448 // max(1, compiled.metadata.shared), 16)
                constants = {p.name: launch.kwargs.get(p.name) for p in launch.kernel.params}
                tile = f"{constants['BLOCK_M']}x{constants['BLOCK_N']}"
                label = f"triton {triton.__version__} {kernel} D {head_dim} {feature} {tile}"
                groups = max(1, blocks) * warps // 4, warps // 4
                found.append(Kernel(label, main_loop(items), *groups, 0, sources_of(label)))
    return found


def sources_of(label: str) -> str:
    """A hash of the sources of a kernel of the record, without their comments and layout."""
    side = "forward" if "forward" in label else "backward"
    if label.startswith("cuda"):
        kind = "mma" if label.startswith("cuda mma") else "wgmma"
        first, include = ROOT / "csrc" / "cuda" / f"attention_{side}_{kind}.cu", r'#include "([\w./]+)"'
    else:
        first, include = ROOT / "kernels" / f"attention_{side}.py", r"from \.(\w+) import"
    found: dict[pathlib.Path, str] = {}
    left = [first]
    while left:
        path = left.pop()
        if path in found:
            continue
        text = path.read_text()
        for name in re.findall(include, text):
            near = (path.parent / name, ROOT / "csrc" / name, (path.parent / name).with_suffix(".py"))
            left += [p.resolve() for p in near if p.is_file()][:1]
        comments = r'#[^\n]*|""".*?"""' if path.suffix == ".py" else r"//[^\n]*"
        found[path] = "".join(re.sub(comments, "", text, flags=re.DOTALL).split())
    code = "".join(found[path] for path in sorted(found, key=lambda p: p.name))
    return hashlib.sha256(code.encode()).hexdigest()[:12]


def read() -> list[dict[str, str]]:
    """The rows of the record."""
    with RECORD.open(newline="") as file:
        return list(csv.DictReader(file))


def merged(before: list[dict], rows: list[dict]) -> list[dict]:
    """The record with new rows: those of the same compiler are replaced, the others kept."""
    compilers = {_compiler(row["kernel"]) for row in rows}
    return sorted(
        [row for row in before if _compiler(row["kernel"]) not in compilers] + rows, key=lambda row: row["kernel"]
    )


def _compiler(label: str) -> str:
    return label.split(" forward")[0].split(" backward")[0]  # cuda, or triton and its version


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--record", action="store_true", help=f"write {RECORD.relative_to(ROOT)}")
    parser.add_argument("--cuda-only", action="store_true", help="leave Triton's kernels out")
    parser.add_argument("--triton-only", action="store_true", help="leave the CUDA kernels out")
    args = parser.parse_args()
    found = [] if args.triton_only else cuda_kernels()
    rows = [predict(kernel) for kernel in found + ([] if args.cuda_only else triton_kernels())]
    for row in rows:
        print(*(f"{name}={value}" for name, value in row.items()))
    if args.record:
        RECORD.parent.mkdir(parents=True, exist_ok=True)
        rows = merged(read() if RECORD.exists() else [], rows)
        with RECORD.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
