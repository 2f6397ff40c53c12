"""Makes the files that a GPU machine needs, on a machine without a GPU: bash benchmarks/gpu.sh pack

build/flight-kit: the library with code for sm_90a, the Triton kernels of the plan compiled for sm_90, Python packages
that may be missing there, and the commit. Triton's cache is keyed by the bytes of the installed Triton, so the kernels
are compiled by the release that is installed there (--triton, --python). A kernel that is not in the cache is compiled
there.
"""

import argparse
import hashlib
import importlib.metadata
import importlib.util
import io
import lzma
import os
import pathlib
import shutil
import subprocess
import sys
import tarfile
import zipfile

ROOT = pathlib.Path(__file__).resolve().parent.parent
ARCHITECTURE = "90a"
# {module: what pip installs}, pure Python. liger_kernel is a peer in benchmarks.
PACKAGES = {
    "hypothesis": "hypothesis",
    "sortedcontainers": "sortedcontainers",
    "liger_kernel": "liger-kernel==0.8.5",
}
LARGEST = 64 << 20  # bytes of the kit
WHEELS = ROOT / "build" / "flight-triton"  # kept: a later call continues
LIBRARY = "triton/_C/libtriton.so"  # what differs between the wheels of one release
PLATFORMS = [f"--platform=manylinux_2_{n}_x86_64" for n in (28, 27, 17)]


def make(kit: pathlib.Path, kernels: str, arguments: list[str]) -> int:
    """Make the kit in a folder; kernels: the name of its archive of Triton kernels."""
    parser = argparse.ArgumentParser(prog="gpu.sh pack", description=__doc__.splitlines()[0])
    parser.add_argument("--triton", default="3.6.0", help="the release on the GPU machine (default: %(default)s)")
    parser.add_argument("--python", default="3.12", help="its Python (default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=30.0, help="for Triton kernels (default: %(default)g)")
    options = parser.parse_args(arguments)
    kit = ROOT / kit
    kit.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "TRANSFORMER_FAST_CUDA_ARCHS": ARCHITECTURE, "TRANSFORMER_FAST_NATIVE": "1"}
    subprocess.run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], check=True, env=environment, cwd=ROOT)
    shutil.copy2(ROOT / "transformer_fast" / "_C.abi3.so", kit)
    (kit / "commit").write_text(commit(ROOT) + "\n")
    for package, requirement in PACKAGES.items():
        _package(kit / "packages" / package, package, requirement)
    _triton_kernels(kit / kernels, options)
    size = sum(path.stat().st_size for path in kit.rglob("*") if path.is_file())
    print(
        f"{kit.relative_to(ROOT)}: {size / 2**20:.1f} MiB of {LARGEST >> 20}. Copy it together with the tracked files;"
    )
    print("there: bash benchmarks/gpu.sh first; bash benchmarks/gpu.sh second; bash benchmarks/gpu.sh tune")
    return int(size > LARGEST)


def commit(root: pathlib.Path) -> str:
    """The commit of a checkout, with -dirty behind it if files differ from it; "" without git."""

    def git(*command: str) -> str:
        return subprocess.run(["git", *command], capture_output=True, text=True, cwd=root).stdout.strip()

    changed = git("status", "--porcelain", "--", ".", ":!benchmarks/results", ":!README.md")
    name = git("rev-parse", "--short=10", "HEAD")
    return f"{name}-dirty" if name and changed else name


def _package(folder: pathlib.Path, name: str, requirement: str) -> None:
    """Copy an installed package, or have pip download it. Without both, it is left out."""
    shutil.rmtree(folder, ignore_errors=True)
    spec = importlib.util.find_spec(name)
    if spec is not None and spec.submodule_search_locations:
        ignore = shutil.ignore_patterns("__pycache__", "*.so")
        shutil.copytree(spec.submodule_search_locations[0], folder / name, ignore=ignore)
        return
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-compile", "--target", str(folder)]
    if subprocess.run([*command, requirement]).returncode:
        print(f"not installed, and not downloaded; left out: {name}")
        shutil.rmtree(folder, ignore_errors=True)


def _triton_kernels(archive: pathlib.Path, options) -> None:
    """Compile the kernels of the plan. If that fails, the kit has none, and the GPU machine compiles them."""
    cache = WHEELS / f"cache-{options.triton}"
    try:
        paths, more = _triton(options.triton, options.python)
        environment = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [*paths, str(ROOT), os.environ.get("PYTHONPATH", "")]))
        command = [sys.executable, str(ROOT / "benchmarks" / "flight_cache.py"), "--output", str(cache), *more]
        subprocess.run([*command, "--minutes", f"{options.minutes:g}"], check=True, env=environment, cwd=ROOT)
    except (OSError, subprocess.CalledProcessError, ValueError) as error:
        print(f"Triton kernels are left out: {error}")
        archive.unlink(missing_ok=True)
        return
    count = pack_kernels(cache, archive)
    print(f"{count} Triton kernels for sm_90, compiled by Triton {options.triton}, keyed for Python {options.python}")


def _triton(release: str, python: str) -> tuple[list[str], list[str]]:
    """(paths of the Triton to compile with, arguments of flight_cache.py). Raises ValueError if the wheel for the GPU
    machine's Python differs from the one for this Python in more than its library."""
    here = "{}.{}".format(*sys.version_info)
    if importlib.util.find_spec("triton") and (importlib.metadata.version("triton"), here) == (release, python):
        return [], []
    ours, theirs = (_wheel(release, version) for version in (here, python))
    folder = WHEELS / f"triton-{release}-python-{here}"
    if not folder.exists():
        fresh = folder.with_name(f"{folder.name}.new")
        shutil.rmtree(fresh, ignore_errors=True)
        with zipfile.ZipFile(ours) as wheel:
            wheel.extractall(fresh)
        for tool in fresh.glob("triton/backends/*/bin/*"):
            tool.chmod(0o755)
        fresh.rename(folder)
    return [str(folder)], ["--library-hash", library_hash(ours, theirs)]


def _wheel(release: str, python: str) -> pathlib.Path:
    tag = f"cp{python.replace('.', '')}"
    pattern = f"triton-{release}-{tag}-*.whl"
    if not list(WHEELS.glob(pattern)):
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", "-d", str(WHEELS)]
        about = [f"--python-version={python}", "--implementation=cp", f"--abi={tag}", *PLATFORMS]
        subprocess.run([*command, *about, f"triton=={release}"], check=True)
    return next(iter(WHEELS.glob(pattern)))


def library_hash(ours: pathlib.Path, theirs: pathlib.Path) -> str:
    """SHA-256 of libtriton.so in the wheel `theirs`, whose other files that the cache's key reads equal ours."""
    with zipfile.ZipFile(ours) as one, zipfile.ZipFile(theirs) as other:
        keyed = [{i.filename: i.CRC for i in wheel.infolist() if _is_keyed(i.filename)} for wheel in (one, other)]
        different = sorted(name for name, _ in keyed[0].items() ^ keyed[1].items())
        if different:
            raise ValueError(f"{theirs.name} differs from {ours.name} in {different[0]}")
        return hashlib.sha256(other.read(LIBRARY)).hexdigest()


def _is_keyed(name: str) -> bool:
    folders = ("triton/compiler/", "triton/backends/", "triton/language/", "triton/runtime/")
    return name.startswith(folders) and not name.endswith("/")


def pack_kernels(cache: pathlib.Path, target: pathlib.Path) -> int:
    """Write the compiled kernels of a cache, and how each is launched, without the paths that the cache contains.
    Returns their number."""
    groups = sorted(cache.glob("*/__grp__*.json"), key=lambda group: (group.name, group.parent))  # alike ones together
    compression = [{"id": lzma.FILTER_LZMA2, "preset": 4, "dict_size": 128 << 20}]
    with lzma.open(target, "wb", filters=compression) as file, tarfile.open(fileobj=file, mode="w|") as tar:
        for group in groups:
            about = group.with_name(group.name.removeprefix("__grp__"))
            for path in (about, about.with_suffix(".cubin")):
                content = path.read_bytes()
                entry = tarfile.TarInfo(f"{group.parent.name}/{path.name}")
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
    return len(groups)
