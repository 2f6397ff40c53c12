"""The commands of `transformer-fast`. They need typer and rich; each command imports what else it needs."""

import functools
import importlib.metadata
import importlib.util
import pathlib
import platform
import shutil
import subprocess
import sys
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from ._version import TRANSFORMERS, old_transformers

app = typer.Typer(
    name="transformer-fast",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)

SAME, NOT_SAME, WRONG = 0, 1, 2


def _print_version(asked: bool) -> None:
    if asked:
        from . import __version__

        typer.echo(f"transformer-fast {__version__}")
        raise typer.Exit()


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="print the version", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Fast kernels for the transformers you already use."""


class _Problem(Exception):
    """An error that the user can fix, described in one line."""


def _command(**options):
    """Register a command. A `_Problem` in it is printed as one line on stderr, and the exit code is 2."""

    def register(function):
        @functools.wraps(function)
        def run(*args, **kwargs):
            try:
                function(*args, **kwargs)
            except _Problem as problem:
                Console(stderr=True).print(f"error: {problem}", markup=False, highlight=False, soft_wrap=True)
                raise typer.Exit(WRONG) from problem

        return app.command(**options)(run)

    return register


def _need(what: str, **packages: str) -> None:
    """Raise a `_Problem` that says how to install the packages that are missing."""
    missing = [pip for module, pip in packages.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise _Problem(f"{what} needs {', '.join(missing)}: pip install {' '.join(repr(m) for m in missing)}")
    if "transformers" in packages and (old := old_transformers()):
        raise _Problem(f"{what}: {old}")


# ---- info -----------------------------------------------------------------------------------------------
def _version(name: str, brings: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return f"missing (pip install {name}). It would bring {brings}" if brings else "not installed"


def _nvcc() -> str:
    path = shutil.which("nvcc")
    if path is None:
        return "not installed. It compiles the CUDA C++ kernels from source; the Triton kernels do not need it"
    try:
        text = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=20).stdout
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{path} does not run: {error}"
    release = text.partition("release ")[2].partition(",")[0]
    return f"{release or 'unknown version'} ({path})"


@_command()
def info() -> None:
    """What is active, what is missing, and what the missing parts would bring."""
    _need("info", torch="torch")
    import torch

    from . import __version__, backends

    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(no_wrap=True, style="bold")
    table.add_column(overflow="fold")  # do not truncate: the command to type may be at the end
    rows = {"transformer_fast": __version__, "Python": platform.python_version()}
    rows.update({name: value for name, value in backends.info().items() if name != "forced backend"})
    threads = torch.get_num_threads()
    rows["CPU"] = f"{torch.backends.cpu.get_cpu_capability()}, {threads} thread{'s' if threads > 1 else ''}"
    rows["transformers"] = _version(
        "transformers", 'the models, attn_implementation="transformer_fast", accelerate for its models and verify'
    )
    if old := old_transformers():
        rows["transformers"] += f". Too old: {old}"
    if torch.cuda.is_available():
        rows["triton"] = _version("triton", "fused kernels on NVIDIA GPUs")
        rows["nvcc"] = _nvcc()
    rows["forced backend"] = backends.info()["forced backend"]
    for name, value in rows.items():
        table.add_row(name, value)
    Console().print(table, markup=False)


# ---- explain --------------------------------------------------------------------------------------------
@_command()
def explain(
    checkpoint: Annotated[str, typer.Argument(help="a folder with config.json and weights, or a name on the hub")],
) -> None:
    """Load a checkpoint and say which parts of its model are fast here, which are not, and why."""
    _need("explain", torch="torch", transformers=TRANSFORMERS)
    from . import accelerate, is_ours
    from . import explain as explanation
    from .verify import VerifyError, load_as_named

    try:
        with Console(stderr=True).status("loading"):
            model = load_as_named(checkpoint, prefer_ours=True)
    except VerifyError as error:
        raise _Problem(str(error)) from error
    if is_ours(model):
        typer.echo(explanation(model))
        return
    typer.echo(
        f"{type(model).__name__} is transformers' own class; this package has none for it. With accelerate(model):"
    )
    typer.echo(str(accelerate(model, verbose=False)))


# ---- verify ---------------------------------------------------------------------------------------------
@_command()
def verify(
    checkpoint: Annotated[str, typer.Argument(help="a folder with config.json and weights, or a name on the hub")],
    dtype: Annotated[
        list[str] | None, typer.Option(help="fp32, bf16, fp16; may be repeated; default all three")
    ] = None,
    gradients: Annotated[bool, typer.Option(help="compare parameter gradients too")] = True,
    tokens: Annotated[bool, typer.Option(help="compare generated tokens too, if the model generates")] = True,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    precision: Annotated[
        str | None, typer.Option(help="int8 or bf16: measure what that costs in accuracy, and compare nothing else")
    ] = None,
) -> None:
    """Compare a checkpoint with Hugging Face: outputs, gradients and tokens, every row, both paddings, each dtype."""
    _need("verify", torch="torch", transformers=TRANSFORMERS)
    import torch

    if precision is not None:
        return _verify_precision(checkpoint, precision)

    from .verify import DTYPES, VerifyError
    from .verify import verify as compare

    if device not in ("cpu", "cuda") or (device == "cuda" and not torch.cuda.is_available()):
        why = "cuda, but torch sees no NVIDIA GPU here" if device == "cuda" else device
        raise _Problem(f"--device: wanted cpu or cuda, got {why}")
    errors = Console(stderr=True)
    try:
        with errors.status("starting") as status:
            result = compare(
                checkpoint,
                dtypes=dtype or list(DTYPES),
                gradients=gradients,
                tokens=tokens,
                device=device,
                progress=status.update,
            )
    except VerifyError as error:
        raise _Problem(str(error)) from error
    console = Console()
    console.print(
        f"{checkpoint}: {result.model} of transformers {result.release} against {result.through}",
        soft_wrap=True,
        markup=False,
    )
    table = Table("dtype", "padding", "compared", "our error", "theirs", "")
    for row in result.rows:
        verdict = {True: "same", False: "NOT THE SAME", None: "not compared"}[row.same]
        numbers = (f"{row.ours:.1e}", f"{row.theirs:.1e}") if row.same is not None and row.ours else ("", "")
        table.add_row(row.dtype, row.padding, row.what, *numbers, f"{verdict}{': ' if row.note else ''}{row.note}")
    console.print(table, markup=False)
    if not result.same:
        off = sum(row.same is False for row in result.rows)
        console.print(f"NOT the same: {off} of {len(result.rows)} comparisons are off")
        raise typer.Exit(NOT_SAME)
    generated = any(row.what.startswith("tokens") and row.same for row in result.rows)
    left = sum(row.same is None for row in result.rows)
    console.print(
        f"same: as close to float64 as Hugging Face is{', and the same tokens' if generated else ''}, on every row"
        + (f"; {left} of {len(result.rows)} comparisons could not be made" if left else ""),
        soft_wrap=True,
    )
    raise typer.Exit(SAME)


def _verify_precision(checkpoint: str, precision: str) -> None:
    from .verify import VerifyError
    from .verify_precision import verify_precision

    try:
        with Console(stderr=True).status("starting") as status:
            report = verify_precision(checkpoint, precision, progress=status.update)
    except VerifyError as error:
        raise _Problem(str(error)) from error
    console = Console()
    before, after = report.megabytes
    console.print(
        f"{checkpoint}: {report.model} in {precision} against itself in float32, on {report.text}; "
        f"{before:.1f} MB become {after:.1f} MB",
        soft_wrap=True,
        markup=False,
    )
    table = Table("compared", "", "")
    for cost in report.costs:
        table.add_row(cost.what, cost.value, cost.note)
    console.print(table, markup=False)
    for name, why in report.left.items():
        console.print(f"not in {precision}: {name}: {why}", markup=False)


# ---- demo, bench ----------------------------------------------------------------------------------------
@_command()
def demo(
    output: Annotated[pathlib.Path, typer.Argument(help="folder for the pictures")] = pathlib.Path("demo_output"),
) -> None:
    """Encode sentences with a real BERT by Hugging Face and by this package; compare results, time and memory."""
    _need("demo", torch="torch", transformers=TRANSFORMERS, tqdm="tqdm", matplotlib="matplotlib", psutil="psutil")
    from .demo import CheckpointMissing, run

    try:
        run(output)
    except (CheckpointMissing, OSError) as error:
        raise _Problem(str(error)) from error


@_command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []})
def bench(context: typer.Context) -> None:
    """Run the benchmarks; `bench --help` shows the options, `bench --list` the cases."""
    _need("bench", torch="torch", tqdm="tqdm", transformers=TRANSFORMERS)
    try:
        from .benchmarks import run
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("transformer_fast"):
            raise _Problem(f"bench needs {error.name}: pip install {error.name}") from error
        raise _Problem(
            "the benchmarks are not installed here: clone the repository and run `make bench` in it"
        ) from error
    raise typer.Exit(run.main(context.args, prog="transformer-fast bench"))


if __name__ == "__main__":
    sys.exit(app())
