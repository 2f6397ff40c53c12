"""Public docstrings have Google's sections, which tools parse, and their examples run."""

import doctest
import inspect
import io
import re

import pytest

import transformer_fast as tf

# Names of Hugging Face's classes are documented by Hugging Face.
NAMES = [
    name for name in tf.__all__
    if name != "__version__" and not re.search("^Auto|Model$|Pipeline$|For[A-Z]", name)
]  # fmt: skip
SECTIONS = r"^(Args|Attributes|Returns|Raises|Source|Examples|Yields):$"


@pytest.mark.quick
@pytest.mark.parametrize("name", NAMES)
def test_docstring_is_of_googles_form(name):
    thing = getattr(tf, name)
    text = inspect.getdoc(thing) or ""
    sections = {found[0]: text[found.end() :] for found in re.finditer(SECTIONS, text, re.M)}
    titles = {found.removesuffix(":") for found in sections}
    assert "Examples" in titles, f"{name}: no example"
    if inspect.isfunction(thing):
        assert {"Args", "Returns"} <= titles or not inspect.signature(thing).parameters, titles
        described = re.split(SECTIONS, sections.get("Args:", ""), flags=re.M)[0]
        known = re.findall(r"^    (\w+):", described, re.M)
        wanted = [p.name for p in inspect.signature(thing).parameters.values() if p.kind != p.VAR_KEYWORD]
        assert known == wanted, f"{name}: Args describes {known}, takes {wanted}"


@pytest.mark.parametrize("name", NAMES)
def test_examples_run(name):
    thing, said = getattr(tf, name), io.StringIO()
    for test in doctest.DocTestFinder(recurse=False).find(thing, name, globs={}):
        failed = doctest.DocTestRunner(verbose=False).run(test, out=said.write).failed
        assert not failed, said.getvalue()
