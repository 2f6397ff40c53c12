"""Results on disk: their CSV schema, the description of the machine, and the folders."""

import csv
import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import re
import subprocess

import torch

from transformer_fast import __version__

from .case import OURS

__all__ = [
    "COLUMNS",
    "ROOT",
    "ceilings",
    "device_slug",
    "machine",
    "newest",
    "of_all_runs",
    "read",
    "result_folder",
    "write",
]

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE / "results"
CHECKOUT = (HERE.parent / "setup.py").exists()  # False: an installed copy, where nothing may be written
COLUMNS = [
    "case", "group", "candidate", "peer", "device", "dtype", "threads", "shape", "median_s", "p20_s", "p80_s",
    "ratio_to_peer", "ratio_p20", "ratio_p80", "tflops", "gbps", "share_of_ceiling", "peak_memory_mb", "bar", "met",
    "memory_met", "note",
]  # fmt: skip
_PACKAGES = ["torch", "transformers", "triton", "numpy", "onnxruntime", "openvino", "ctranslate2"]

# (vendor, family, models) -> microarchitecture, for folder names that tell processors apart.
_MICROARCHITECTURES = [
    ("AuthenticAMD", 26, range(0x00, 0x100), "zen5"),
    ("AuthenticAMD", 25, [*range(0x10, 0x20), *range(0x60, 0x80), *range(0xA0, 0xB0)], "zen4"),
    ("AuthenticAMD", 25, range(0x00, 0x100), "zen3"),
    ("AuthenticAMD", 23, range(0x30, 0x100), "zen2"),
    ("GenuineIntel", 6, [85], "skylake-sp"),
    ("GenuineIntel", 6, [106, 108], "ice-lake-sp"),
    ("GenuineIntel", 6, [143], "sapphire-rapids"),
    ("GenuineIntel", 6, [207], "emerald-rapids"),
    ("GenuineIntel", 6, [173, 174], "granite-rapids"),
]


def _cpuinfo() -> dict[str, str]:
    try:
        block = pathlib.Path("/proc/cpuinfo").read_text().split("\n\n")[0]
    except OSError:
        return {}
    pairs = (line.split(":", 1) for line in block.splitlines() if ":" in line)
    return {key.strip(): value.strip() for key, value in pairs}


def _slugify(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower().replace("(r)", "").replace("(tm)", "")).strip("-")


def device_slug(device: str) -> str:
    """A folder name for the kind of machine, without its host name: cpu-amd-epyc-zen4-2c."""
    if device == "cuda":
        return f"cuda-{_slugify(torch.cuda.get_device_name())}"
    info = _cpuinfo()
    vendor = {"AuthenticAMD": "amd", "GenuineIntel": "intel"}.get(info.get("vendor_id", ""), "")
    numbers = info.get("cpu family", ""), info.get("model", "")
    micro = ""
    if vendor and all(n.isdigit() for n in numbers):
        family, model = map(int, numbers)
        micro = next(
            (name for v, f, models, name in _MICROARCHITECTURES
             if v == info["vendor_id"] and f == family and model in models), ""
        )  # fmt: skip
    brand = _slugify(re.sub(r"(?i)\b(amd|intel|cpu|processor|\d+-core)\b|@.*", "", info.get("model name", "")))
    parts = ["cpu", vendor, brand or _slugify(platform.machine()), micro, f"{os.cpu_count()}c"]
    return "-".join(part for part in parts if part)


def _git(*args: str) -> str:
    if not CHECKOUT:  # an installed copy may be inside an unrelated repository
        return ""
    try:
        done = subprocess.run(["git", "-C", str(HERE), *args], capture_output=True, text=True)
    except OSError:  # there is no git
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _changed() -> bool:
    """Whether files of the checkout differ from its commit, apart from results and what is made from them."""
    return bool(_git("status", "--porcelain", "--", ":/", ":!/benchmarks/results", ":!/README.md"))


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def machine(device: str) -> dict:
    """Facts about the machine that a reader needs to judge the numbers."""
    from transformer_fast.backends import native

    reason = native.load()
    # Of sources that were copied from a checkout; it ends in -dirty if they were changed there.
    given = os.environ.get("TRANSFORMER_FAST_COMMIT", "")
    described = {
        "device": device_slug(device),
        "cpu": _cpuinfo().get("model name", platform.processor()),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "isa": reason or native.current_isa(),
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in _PACKAGES},
        "commit": given or _git("rev-parse", "--short=10", "HEAD") or f"v{__version__}",
        "dirty": given.endswith("-dirty") if given else _changed(),
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }
    if device == "cuda":
        described |= {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    return described


def result_folder(about: dict, root: pathlib.Path | None = None) -> pathlib.Path:
    """root: by default benchmarks/results in a checkout, ./transformer_fast_results of an installed package."""
    root = root or (ROOT if CHECKOUT else pathlib.Path("transformer_fast_results"))
    return root / about["device"] / f"{about['time'][:10]}-{about['commit']}"


def write(folder: pathlib.Path, rows: list[dict], ceilings: dict, about: dict) -> None:
    """Write a run. Rows of an earlier run in the same folder are kept, unless they were measured again."""
    folder.mkdir(parents=True, exist_ok=True)
    kept = {(row["case"], row["candidate"]): row for row in (read(folder) if (folder / "results.csv").exists() else [])}
    measured = {row["case"] for row in rows}
    kept = {key: row for key, row in kept.items() if key[0] not in measured}
    with open(folder / "results.csv.new", "w", newline="") as file:  # renamed when complete
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows([*kept.values(), *rows])
    os.replace(folder / "results.csv.new", folder / "results.csv")
    (folder / "ceilings.json").write_text(json.dumps(ceilings, indent=2) + "\n")
    (folder / "machine.json").write_text(json.dumps(about, indent=2) + "\n")


def ceilings(folder: pathlib.Path) -> dict | None:
    """The ceilings that an earlier run in the folder measured."""
    file = folder / "ceilings.json"
    return json.loads(file.read_text()) if file.exists() else None


def read(folder: pathlib.Path) -> list[dict[str, str]]:
    with open(folder / "results.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    if rows and list(rows[0]) != COLUMNS:
        raise ValueError(f"{folder / 'results.csv'}: columns {list(rows[0])}, wanted {COLUMNS}")
    return rows


def of_all_runs(newest: pathlib.Path, among: set[pathlib.Path] | None = None) -> list[dict]:
    """The rows of each case from the newest folder beside `newest` that has it; "commit" where that is another. `among`
    restricts the folders."""
    folders = [path.parent for path in newest.parent.glob("*/machine.json")]
    about = {f: json.loads((f / "machine.json").read_text()) for f in folders if among is None or f in among}
    found: dict[str, list[dict]] = {}
    for folder in sorted(about, key=lambda f: about[f]["time"]):
        older = {} if folder == newest else {"commit": about[folder]["commit"][:7]}
        rows = [row | older for row in read(folder)]
        timed = {row["case"] for row in rows if row["candidate"] == OURS and row["median_s"]}
        for case in dict.fromkeys(row["case"] for row in rows):
            if case in timed or case not in found:
                found[case] = [row for row in rows if row["case"] == case]
    return [row for rows in found.values() for row in rows]


def newest(device: str, root: pathlib.Path = ROOT, among: set[pathlib.Path] | None = None) -> pathlib.Path | None:
    """The newest results of a device type ("cpu", "cuda") or of a slug with this prefix; `among` restricts them."""
    folders = [path.parent for path in root.glob("*/*/machine.json") if path.parent.parent.name.startswith(device)]
    if among is not None:
        folders = [folder for folder in folders if folder in among]
    return max(folders, key=lambda f: json.loads((f / "machine.json").read_text())["time"], default=None)
