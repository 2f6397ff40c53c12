"""The logic of the offline tuner. Its timings need a GPU."""

import json
import pathlib
import time

import pytest
from scripts import load_script
from transformer_fast.kernels.attention_configurations import KERNELS

pytestmark = pytest.mark.quick
ROOT = pathlib.Path(__file__).resolve().parent.parent


@pytest.fixture
def tune():
    return load_script(ROOT / "benchmarks" / "tune.py")


def test_takes_the_fastest_that_runs_and_gains(tune):
    old, faster, close, broken = (tune.Config(n, 64, 4, 2) for n in (16, 32, 64, 128))
    times = {old: 1.0, faster: 0.9, close: 0.99}

    def seconds(config):
        if config == broken:
            raise RuntimeError("out of resource: shared memory")
        return times[config]

    assert tune.best(old, iter([broken, close, faster]), seconds) == faster
    assert tune.best(old, iter([broken, close]), seconds) == old


def test_rewrites_the_table_and_nothing_else(tune):
    source = (ROOT / "kernels" / "attention_configurations.py").read_text()
    table = dict(tune.configurations.TABLE)
    assert tune.rewrite(source, table) == source
    row = "forward", "sm_90", 64, False
    table[row] = (tune.Config(192, 128, 8, 4), tune.Config(64, 32, 4, 1, columns=128))
    changed: dict = {}
    exec(tune.rewrite(source, table), changed)
    assert changed["TABLE"] == table != tune.configurations.TABLE
    assert changed["select"]("forward", changed["Shape"]("sm_90", 64)) == tune.Config(192, 128, 8, 4)


@pytest.mark.parametrize("kernel", KERNELS)
def test_candidates_are_tiles_the_kernels_take(tune, kernel):
    found = list(tune.candidates(kernel))
    assert len(found) == len(set(found)) > 8
    assert all(m & (m - 1) == 0 and n & (n - 1) == 0 and m >= 16 and n >= 16 for m, n, *_ in found)


def test_what_never_runs_is_not_timed(tune):
    plain = tune.configurations.Shape("sm_90", 64)
    rich, relative, grouped = (plain._replace(kind=kind) for kind in ("rich", "relative", "grouped"))
    assert all(tune.needed("forward", shape) for shape in (plain, rich, relative))
    assert [tune.needed("backward_bias", shape) for shape in (plain, rich, relative)] == [False, True, False]
    assert tune.needed("backward_key", grouped) and not tune.needed("forward", grouped)
    assert [tune.needed("backward_table", shape) for shape in (plain, rich, relative)] == [False, False, True]


def test_few_candidates_are_near_the_table_s_and_noted_one_by_one(tune, tmp_path):
    shape = tune.configurations.Shape("sm_90", 64)
    for kernel in ("forward", "backward_key", "backward_query"):
        old = tune.configurations.select(kernel, shape)
        near = tune.nearest(kernel, old)
        assert 3 <= len(near) <= 8 and old not in near and len(set(near)) == len(near)
    file, calls = tmp_path / "tiles.json", []

    def timer(kernel, shape):
        def seconds(config):
            if calls:
                assert sum(len(entry["times"]) for entry in json.loads(file.read_text())) == len(calls)
            calls.append(config)
            if config.num_stages == 1:
                raise RuntimeError("wrong result")
            return 1.0 if config == tune.configurations.select(kernel, shape) else 0.5 + config.block_m / 1000

        return seconds

    tune.few("sm_90", file, time.monotonic() + 100, timer)
    found = json.loads(file.read_text())
    assert [(entry["kernel"], entry["width"]) for entry in found] == [
        (kernel, width) for width in (64, 128) for kernel in ("forward", "backward_key", "backward_query")
    ]
    assert all(t["ms"] is None and t["why"] for e in found for t in e["times"] if t["config"][3] == 1)
    tune.few("sm_90", tmp_path / "none.json", time.monotonic() - 1, timer)
    assert not (tmp_path / "none.json").exists()


def test_what_few_found_is_applied_where_it_gains(tune, tmp_path, monkeypatch):
    source = tune.pathlib.Path(tune.configurations.__file__).read_text()
    copy = tmp_path / "attention_configurations.py"
    copy.write_text(source)
    monkeypatch.setattr(tune.configurations, "__file__", str(copy))
    shape = tune.configurations.Shape("sm_90", 64)
    old = tune.configurations.select("forward", shape)
    new = old._replace(num_stages=old.num_stages + 1)
    times = [{"config": list(old), "ms": 1.0, "why": ""}, {"config": list(new), "ms": 0.99, "why": ""}]
    entry = {"kernel": "forward", "architecture": "sm_90", "width": 64, "times": times}
    tune.apply([entry])
    assert copy.read_text() == source, "a hundredth is noise"
    times[1]["ms"] = 0.9
    tune.apply([entry])
    changed: dict = {}
    exec(copy.read_text(), changed)
    rich = changed["Shape"]("sm_90", 64, kind="rich")
    assert changed["select"]("forward", changed["Shape"]("sm_90", 64)) == new
    assert changed["select"]("forward", rich) == tune.configurations.select("forward", shape._replace(kind="rich"))
