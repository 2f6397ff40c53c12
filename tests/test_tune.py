"""The offline tuner's logic; its timings need a GPU."""

import importlib.util
import pathlib

import pytest
from transformer_fast.kernels.attention_configurations import KERNELS

pytestmark = pytest.mark.quick
ROOT = pathlib.Path(__file__).resolve().parent.parent


@pytest.fixture
def tune():
    spec = importlib.util.spec_from_file_location("tune", ROOT / "benchmarks" / "tune.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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
