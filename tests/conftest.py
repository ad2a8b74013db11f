"""Fixtures of all tests."""

import os
import sys
from collections.abc import Iterator

# Threads that sleep while they wait: test workers share the cores, and a waiting thread that spins keeps one from work.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
from hypothesis import HealthCheck, settings

import fastconv

# The same examples in every run, and no clock: machines that build this are slow and shared.
settings.register_profile(
    "suite",
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("suite")


@pytest.fixture(autouse=True, scope="session")
def untuned(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep what has been measured on this machine out of the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTCONV_CACHE_DIR", str(tmp_path_factory.mktemp("tuning")))
        yield


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Draw the same weights in every run: gradients of some lie on a kink, where they cannot be checked."""
    fastconv.nn.manual_seed(0)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Fill fresh outputs and workspaces with NaN: what an algorithm does not write shows."""
    with fastconv.options(poison=True):
        yield
