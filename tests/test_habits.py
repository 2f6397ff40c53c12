"""Versions agree between files, and files for other programs can be parsed."""

import pathlib
import re

import pytest
import yaml

import transformer_fast
from transformer_fast._version import TRANSFORMERS

ROOT = pathlib.Path(__file__).resolve().parent.parent

pytestmark = [
    pytest.mark.quick,
    pytest.mark.skipif(not (ROOT / ".pre-commit-config.yaml").exists(), reason="these files lie only in a checkout"),
]


def _pins() -> dict[str, str]:
    return dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split())


def test_versions_agree():
    version = transformer_fast.__version__
    released = re.findall(r"^## \[(\d[^]]*)\]", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert released[0] == version
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == version
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    assert {pin for hook in hooks for pin in hook.get("additional_dependencies", [])} == {f"ruff=={_pins()['ruff']}"}
    assert f'"{TRANSFORMERS}"' in (ROOT / "pyproject.toml").read_text()
    assert re.search(r"^TORCH \?= (.*)", (ROOT / "Makefile").read_text(), re.M)[1] == _pins()["torch"]


def test_workflows_run_what_there_is():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))
    files = sorted((ROOT / ".github/workflows").glob("*.yml"))
    assert files
    for file in files:
        for job in yaml.safe_load(file.read_text())["jobs"].values():
            runs = [step["run"] for step in job["steps"] if "run" in step]
            assert runs and {name for run in runs for name in re.findall(r"^make ([\w-]+)", run, re.M)} <= targets
    for form in (ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml"):
        assert isinstance(yaml.safe_load(form.read_text()), dict)


def test_tests_whose_packages_make_does_not_install_run_every_night():
    """Such a file skips itself in `make test`."""
    nightly = (ROOT / ".github/workflows/full.yml").read_text()
    skipping = [f for f in ROOT.glob("tests/**/test_*.py") if "is not installed: see CONTRIBUTING.md" in f.read_text()]
    skipping.remove(pathlib.Path(__file__))
    assert len(skipping) == 2 and all(str(file.relative_to(ROOT)) in nightly for file in skipping)
    (installed,) = re.findall(r"pip install -q -c constraints.txt (.*)", nightly)
    assert set(installed.split()) <= set(_pins())


def test_make_help_describes_every_target():
    text = (ROOT / "Makefile").read_text()
    described = re.findall(r"^([a-z-]+):.*  ## \w", text, re.M)
    assert {*described, "help"} == set(re.search(r"^\.PHONY: (.*)", text, re.M)[1].split())


def test_ci_runs_everything():
    steps = (ROOT / ".ci/run").read_text().split("\n")
    assert [step for step in steps if step.startswith("make ")] == ["make lint", "make docs", "make test"]


def test_packages_that_make_installs_are_pinned():
    made = re.findall(r"pip install -q -c constraints.txt ((?:[\w\[\]\"-]+ ?)+)", (ROOT / "Makefile").read_text())
    names = {re.sub(r"\[.*|\"", "", name) for line in made for name in line.split()} - {"-e", "--no-build-isolation"}
    names = {name for name in names if name and not name.startswith("-")}
    assert names and names <= set(_pins())
