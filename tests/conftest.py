import importlib.util
import os
import sys
import types
from unittest import mock

os.environ.setdefault("TRANSFORMER_FAST_POISON", "1")  # outputs are NaN until a kernel writes them
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import triton_interpreter  # noqa: F401, I001  before anything imports Triton

import pytest
import torch


def _without_hypothesis() -> types.ModuleType:
    """A stand-in if hypothesis is not installed (a GPU machine without network): drawn tests are skipped and say
    why."""
    stand_in = types.ModuleType("hypothesis")
    reason = "hypothesis is not installed"

    def given(*_, **__):
        def drawn(test):  # a test, or a function that a test calls
            skipping = lambda *_, **__: pytest.skip(reason)  # noqa: E731
            skipping.__name__ = test.__name__
            return pytest.mark.skip(reason=reason)(skipping)

        return drawn

    stand_in.given = given
    stand_in.settings = stand_in.example = lambda *_, **__: lambda test: test
    stand_in.strategies = stand_in.assume = stand_in.HealthCheck = mock.MagicMock()
    return stand_in


if importlib.util.find_spec("hypothesis") is None:
    sys.modules["hypothesis"] = _without_hypothesis()
else:
    import hypothesis

    # The same examples in every run, and no test fails because the machine is busy.
    hypothesis.settings.register_profile(
        "here", deadline=None, derandomize=True, suppress_health_check=[hypothesis.HealthCheck.too_slow]
    )
    hypothesis.settings.load_profile("here")

    # Hypothesis also draws constants that it finds in loaded modules. Draws would then depend on the tests that a
    # worker has run before.
    from hypothesis.internal.conjecture import providers

    if hasattr(providers, "_get_local_constants"):
        _no_constants = providers.Constants()
        providers._get_local_constants = lambda: _no_constants


def pytest_configure(config):
    # Under xdist the workers share the cores.
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))


@pytest.fixture(autouse=True)
def _no_launch_plans_of_other_tests():
    """Launch plans contain block sizes, which a test may have replaced."""
    if torch.cuda.is_available() and (module := sys.modules.get("transformer_fast.backends.triton_launch")):
        module.forget()


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def pytest_fixture_setup(fixturedef):
    """Seed fixtures of a module or session too: they run before _seed, after any other tests."""
    if fixturedef.scope != "function":
        torch.manual_seed(0)


@pytest.fixture
def one_thread():
    """For models so small that two threads are slower."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no NVIDIA GPU on this machine")
    return request.param
