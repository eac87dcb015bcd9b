"""Fixtures that every test file shares: devices, poisoned memory, hypothesis profiles."""

import gc
import os
from collections.abc import Iterator
from unittest import mock

# For the programs that tests start, too; torch and Inductor read them when they are imported.
# Inductor compiles in half the time where it writes no vector instructions: they are its own, and
# so is whether they are right. `make test-all` has them.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "0")
# Else each starts processes to compile in, with a torch of their own, where cores are busy already.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

import pytest
import torch
from hypothesis import HealthCheck, settings

# Problems here are small, and beside other processes most of their time went into waking a second
# thread: 75 s against 5 s for 150 of them on two busy cores. A test of threads asks for `threads`.
torch.set_num_threads(1)

# CI draws the same bounded set of examples each time; SIMPLEX_FUZZ_EXAMPLES asks for others.
_EXAMPLES = int(os.environ.get("SIMPLEX_FUZZ_EXAMPLES", "0"))
settings.register_profile(
    "simplex",
    deadline=None,
    derandomize=not _EXAMPLES,
    max_examples=_EXAMPLES or 100,
    database=None,
    print_blob=False,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("simplex")

_finished = 0

if os.environ.get("TRITON_INTERPRET") == "1":
    from interpreted import search_once

    search_once()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if _EXAMPLES:  # as long as they take
        for item in items:
            item.add_marker(pytest.mark.timeout(0))
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs a GPU")
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(skip)


def pytest_collection_finish() -> None:
    """Keep what was imported out of every collection of garbage to come: a third of a second."""
    gc.freeze()


@pytest.hookimpl(trylast=True)
def pytest_runtest_logfinish(nodeid: str) -> None:
    """Do so with what compilers keep, every so many tests.

    After 4,000 of them a collection took 1.4 s, and refusals, which look through all objects, five
    times as long as in a process of their own.
    """
    global _finished
    _finished += 1
    if _finished % 50 == 0:
        gc.collect()
        gc.freeze()


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item) -> None:
    """Give back a card's memory, which other processes of the run take too."""
    if "gpu" in item.keywords and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


@pytest.fixture(scope="session", autouse=True)
def least_work_for_users() -> Iterator[int]:
    """Have the Hopper kernels serve small problems too; return what users' calls are held to."""
    from csrc_free.hopper import least_work

    of_users = least_work.LEAST
    with mock.patch.object(least_work, "LEAST", 0):
        yield of_users


@pytest.fixture
def small_problems_as_users_have_them(
    least_work_for_users: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Leave small problems to the portable kernels, as outside of tests."""
    from csrc_free.hopper import least_work

    monkeypatch.setattr(least_work, "LEAST", least_work_for_users)


@pytest.fixture(scope="session", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """Each device of this machine in turn."""
    return request.param


@pytest.fixture(params=[2, 3])
def threads(request: pytest.FixtureRequest):
    """Give PyTorch's CPU operators several threads."""
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def poisoned_memory():
    """Fill what torch.empty returns with NaN, so that no test passes on rows never written.

    That is what PyTorch does when deterministic algorithms are asked for.
    """
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(1).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)
