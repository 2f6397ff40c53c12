"""README and docs: their code runs unchanged, their links resolve, and the README is short."""

import contextlib
import csv
import io
import json
import pathlib
import re
import warnings

import doc_checkpoints
import pytest
from typer.testing import CliRunner

ROOT = pathlib.Path(__file__).resolve().parent.parent
PAGES = [page for page in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))] if page.exists()]
TOUR = ROOT / "docs" / "tour.md"
# A block that cannot run here is preceded by a line with the reason: <!-- not run: reason -->
_BLOCK = re.compile(
    r"(?:<!-- not run: (?P<why>[^>]+) -->\n+)?^(?P<pad> *)```(?P<kind>\w+)[^\n]*\n(?P<code>.*?)^ *```$", re.M | re.S
)

pytestmark = pytest.mark.skipif(not (ROOT / "mkdocs.yml").exists(), reason="README and docs lie only in a checkout")


def blocks(page: pathlib.Path, kind: str):
    """(line, code) of each block of this kind that must run."""
    text = page.read_text(encoding="utf-8")
    for found in _BLOCK.finditer(text):
        if found["kind"] == kind and not found["why"]:
            code = re.sub(f"^{found['pad']}", "", found["code"], flags=re.M)
            yield text.count("\n", 0, found.start("code")), code


def _name(page: pathlib.Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    root = tmp_path_factory.mktemp("hub")
    doc_checkpoints.save_all(root)
    return root


@pytest.fixture
def here(hub, tmp_path, monkeypatch):
    """A folder in which the names of hub models are folders."""
    for owner in hub.iterdir():
        (tmp_path / owner.name).symlink_to(owner)
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("page", [p for p in PAGES if p != TOUR and any(blocks(p, "python"))], ids=_name)
def test_code_runs(page, here):
    """Run the blocks of a page one after the other, as a reader would paste them."""
    scope = {"__name__": "__main__"}
    for line, code in blocks(page, "python"):
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            exec(compile("\n" * line + code, str(page), "exec"), scope)


@pytest.mark.quick
def test_tour_and_notebook_are_in_step():
    """The page's blocks are the first cells of the notebook, which test_tour_runs runs, and its pictures are those that
    the cells save."""
    cells = json.loads((ROOT / "docs" / "tour.ipynb").read_text(encoding="utf-8"))["cells"]
    written = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    found = [code.rstrip("\n") for _, code in blocks(TOUR, "python")]
    assert len(found) >= 7 and written[: len(found)] == found
    page = TOUR.read_text(encoding="utf-8")
    headings = re.findall(r"^## \d\. .*", page, re.M)
    told = [line for cell in cells if cell["cell_type"] == "markdown" for line in cell["source"]]
    assert headings == [line.strip() for line in told if re.match(r"## \d\. ", line)]
    saved = set(re.findall(r'"(tour_\w+\.png)"', page)) - {"tour_attention.png"}  # this picture comes from the demo
    assert saved == set(re.findall(r"images/tour/(tour_\w+\.png)", page)) and len(headings) == len(saved) + 1


@pytest.mark.quick
def test_times_of_the_tour_are_measured():
    page = TOUR.read_text(encoding="utf-8")
    (name,) = re.findall(r"benchmarks/results/tour/[\w.-]+\.csv", page)
    with (ROOT / name).open(encoding="utf-8") as file:
        measured = [f"| {row['station']} | {row['cpu_seconds']} s |" for row in csv.DictReader(file)][1:]
    assert measured == re.findall(r"^\| \d\..*", page, re.M)


def test_tour_runs(here, monkeypatch):
    """Run every cell, with two training steps each."""
    examples = pathlib.Path("examples")
    examples.symlink_to(ROOT / "examples")
    scope = {"__name__": "__main__"}
    notebook = json.loads((ROOT / "docs" / "tour.ipynb").read_text(encoding="utf-8"))
    for number, cell in enumerate(cell for cell in notebook["cells"] if cell["cell_type"] == "code"):
        assert not cell["outputs"] and cell["execution_count"] is None, "it is kept without outputs"
        code = "".join(cell["source"]).replace("STEPS = 60", "STEPS = 2")
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            exec(compile(code, f"tour.ipynb, cell {number}", "exec"), scope)
    assert pathlib.Path("tour_attention.png").stat().st_size > 1000


def _commands(page: pathlib.Path):
    for _, code in blocks(page, "bash"):
        for line in code.replace("\\\n", " ").splitlines():
            yield line.split("#")[0].split()


@pytest.mark.quick
@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_commands_exist(page):
    """Targets of make, commands and options of transformer-fast, and scripts for python or bash exist."""
    from transformer_fast.commands import app

    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
    for words in _commands(page):
        program = words[0] if words else ""
        if program == "make":
            assert {w for w in words[1:] if "=" not in w and not w.startswith("-")} <= set(targets), words
        if program == "transformer-fast" and len(words) > 1:
            assert CliRunner().invoke(app, [words[1], "--help"]).exit_code == 0, words
        if program == "transformer-fast" and words[1:2] != ["bench"]:
            usage = CliRunner(env={"COLUMNS": "200"}).invoke(app, [words[1], "--help"]).output
            assert all(word in usage for word in words if word.startswith("--")), words
        for word in words[1:]:
            if program in ("python", "bash") and word.endswith((".py", ".sh")):
                assert (ROOT / word).exists(), words


@pytest.mark.quick
@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if not target.startswith(("http", "#", "mailto:")):
            assert (page.parent / target.split("#")[0]).exists(), target


@pytest.mark.quick
def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


@pytest.mark.quick
def test_every_page_is_in_the_navigation():
    listed = re.findall(r"[\w/-]+\.md", (ROOT / "mkdocs.yml").read_text())
    assert sorted(listed) == sorted(str(p.relative_to(ROOT / "docs")) for p in PAGES if "docs" in p.parts)


@pytest.mark.quick
def test_the_reference_has_every_name():
    """Every public name that transformers does not document. mkdocstrings leaves a function out silently if a module
    has its name, so each is named with its module."""
    import transformers

    import transformer_fast

    text = "".join(page.read_text(encoding="utf-8") for page in (ROOT / "docs" / "reference").glob("*.md"))
    said = {path.rpartition(".")[2] for path in re.findall(r"^::: (\S+)", text, re.M)}
    said |= {name.strip() for names in re.findall(r"members: \[(.*)\]", text) for name in names.split(",")}
    names = [name for name in transformer_fast.__all__ if not name.startswith("_") and not hasattr(transformers, name)]
    assert not set(names) - said and len(names) > 50


@pytest.mark.quick
def test_blocks_are_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "a\n```python\nx = 1\n```\n<!-- not run: needs a GPU -->\n```python\ny\n```\n    ```python\n    z\n    ```\n"
    )
    assert list(blocks(page, "python")) == [(2, "x = 1\n"), (9, "z\n")]
