"""Private names of transformers are as _transformers.EXPECTED says, and every one that we use is listed."""

import ast
import importlib
import inspect
import os
import pathlib
import re

import pytest
import torch
import transformers

import transformer_fast
from transformer_fast import _transformers as hf
from transformer_fast._transformers import CACHE_NAME, EXPECTED

PACKAGE = pathlib.Path(transformer_fast.__file__).parent
LISTED = {part for e in EXPECTED for part in e.path.replace(":", ".").split(".")}


def _find(path: str):
    module, _, attributes = path.partition(":")
    found = importlib.import_module(f"transformers.{module}")
    for name in attributes.split("."):
        found = inspect.getattr_static(found, name) if inspect.isclass(found) else getattr(found, name)
    return getattr(found, "__func__", found)


@pytest.mark.quick
def test_release_is_the_one_that_is_asked_for():
    asked = os.environ.get("TRANSFORMER_FAST_TEST_RELEASE")  # set by tests/compat/releases.py
    assert asked is None or transformers.__version__ == asked
    assert hf.IS_TESTED


@pytest.mark.quick
@pytest.mark.parametrize("expected", EXPECTED, ids=lambda e: e.path)
def test_is_as_expected(expected):
    gone = f"{expected.path} is gone from transformers {transformers.__version__}: {expected.use}"
    try:
        found = _find(expected.path)
    except AttributeError:
        assert expected.parameters is None, gone
        owner, _, name = expected.path.rpartition(".")
        assert re.search(rf"\b{name}\b", inspect.getsource(_find(owner))), gone  # set on instances
    if expected.parameters is None:
        return
    seen = [name for name in inspect.signature(found).parameters if name != "cls"]
    wanted = [CACHE_NAME if name == "cache" else name for name in expected.parameters]
    in_order = [name for name in seen if name in wanted]
    assert in_order == wanted, f"{expected.path} takes {seen}, wanted {wanted} in this order: {expected.use}"


@pytest.mark.quick
def test_order_of_calls(monkeypatch):
    """generate prepares the special tokens and its cache before it calls the decoding loop, by the expected names."""
    calls = []
    names = [e.path.rpartition(".")[2] for e in EXPECTED if "GenerationMixin._" in e.path]
    mixin = transformers.GenerationMixin
    for name in [n for n in names if not n.startswith("_supports")]:
        original = getattr(mixin, name)

        def spy(self, *args, original=original, name=name, **kwargs):
            calls.append(name)
            if name in ("_sample", "_beam_search"):
                config = inspect.signature(original).bind(self, *args, **kwargs).arguments["generation_config"]
                assert hf.pad_token(config).tolist() == 0 and hf.end_tokens(config).tolist() == [2]
                assert isinstance(kwargs[CACHE_NAME], transformers.DynamicCache)
            return original(self, *args, **kwargs)

        monkeypatch.setattr(mixin, name, spy)
    config = transformers.GPT2Config(vocab_size=61, n_embd=32, n_layer=1, n_head=4, n_positions=40)
    model = transformers.GPT2LMHeadModel(config).eval()
    for beams, loop in ((1, "_sample"), (2, "_beam_search")):
        calls.clear()
        model.generate(torch.ones(1, 3, dtype=torch.long), num_beams=beams, max_new_tokens=2, do_sample=False,
                       pad_token_id=0, eos_token_id=2)  # fmt: skip
        assert calls == ["_extract_generation_mode_kwargs", "_prepare_cache_for_generation", loop]


@pytest.mark.quick
def test_configurations_hold_their_attention_where_expected():
    config = transformers.GPT2Config()
    assert hf.holds_attention(config) and hf.name_or_path(config) == ""
    hf.set_attention(config, "eager")
    assert hf.stored_attention(config) == "eager"
    assert hf.takes_attention(transformers.GPT2Model(transformers.GPT2Config(n_embd=8, n_layer=1, n_head=1)))
    assert hf.recorded_outputs(False) is None


def _classes():
    """Every class of ours that is derived from one of transformers'."""
    for name in [n for names in transformer_fast._EXPORTS.values() for n in names]:
        getattr(transformer_fast, name)
    importlib.import_module("transformer_fast.pipelines.factory")
    stack, seen = [object], set()
    while stack:
        for cls in type.__subclasses__(stack.pop()):
            if cls not in seen:
                seen.add(cls)
                stack.append(cls)
    return sorted((c for c in seen if str(c.__module__).startswith("transformer_fast.")), key=lambda c: c.__qualname__)


def _own(cls: type):
    """vars(cls), also for a class with its own attribute __dict__."""
    return type.__dict__["__dict__"].__get__(cls)


@pytest.mark.quick
def test_every_private_name_that_is_overridden_is_listed():
    missing = set()
    for cls in _classes():
        bases = [b for b in cls.__mro__ if str(b.__module__).partition(".")[0] == "transformers"]
        mixed = [transformers.GenerationMixin] if cls.__name__ == "GenerationMixin" else []
        for name in _own(cls):
            private = name.startswith("_") and not name.startswith(("__", "_abc_"))
            private = private and not name.endswith("_cached_value")  # set on classes by transformers itself
            if private and name not in LISTED and any(name in _own(b) for b in bases + mixed):
                missing.add(f"{cls.__module__}.{cls.__qualname__}.{name}")
    assert not missing, f"list them in _transformers.EXPECTED: {sorted(missing)}"


# Names of named tuples, of our own classes, of torch and importlib.
_OURS = {"_asdict", "_replace", "_fields", "_kind", "_original", "_version", "_initializing"}


@pytest.mark.quick
def test_every_private_name_that_is_read_is_reached_in_one_module():
    files = [p for p in PACKAGE.rglob("*.py") if p.name != "_transformers.py" and "kernels" not in p.parts]
    trees = {p: ast.parse(p.read_text()) for p in files}
    defined = {node.name for tree in trees.values() for node in ast.walk(tree)
               if isinstance(node, (ast.FunctionDef, ast.ClassDef))}  # fmt: skip
    for tree in trees.values():
        for node in ast.walk(tree):
            if isinstance(node, (ast.Assign, ast.AnnAssign)):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                for target in [t for outer in targets for t in ast.walk(outer)]:
                    defined.add(getattr(target, "attr", getattr(target, "id", "")))
    known_to_torch = {n for kind in (torch.Tensor, torch.nn.Module()) for n in dir(kind)}
    allowed = defined | known_to_torch | _OURS | LISTED
    missing = set()
    for path, tree in trees.items():
        if "transformers" not in path.read_text():
            continue
        for node in ast.walk(tree):
            name = getattr(node, "attr", "") if isinstance(node, ast.Attribute) else ""
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("getattr", "hasattr", "setattr"):
                name = getattr(node.args[1], "value", "")  # "" if it is not a literal
            if not isinstance(name, str) or not name.startswith("_") or name.startswith("__") or name in allowed:
                continue
            owner = ast.unparse(node.value) if isinstance(node, ast.Attribute) else ""
            if not owner.startswith(("torch.", "_aten", "torch_", "triton")) and owner != "torch":
                missing.add(f"{path.relative_to(PACKAGE)}:{node.lineno} {owner}.{name}")
    assert not missing, f"reach them in _transformers, and list them there: {sorted(missing)}"
