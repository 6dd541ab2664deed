"""Fixtures for every test: seeds, threads, no forced backend, poisoned uninitialised memory."""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Callable, Iterator
from typing import Any

import hypothesis
import numpy as np
import pytest
import torch
from torch.utils._device import _device_constructors

from fastl2o import backends

hypothesis.settings.register_profile(
    "fastl2o", derandomize=True, deadline=None, max_examples=60, database=None
)
hypothesis.settings.load_profile("fastl2o")
# Cached at its first call: it must hold torch's own functions, not the wrappers made below.
_device_constructors()
# Workers side by side take a core each; what they start does too.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
else:
    torch.set_num_threads(min(2, torch.get_num_threads()))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002  (libraries under test may use the global generator)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _no_forced_backend(set_variable: Callable[[str, str | None], None]) -> None:
    set_variable("FASTL2O_BACKEND", None)


@pytest.fixture
def set_variable(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, str | None], None]]:
    """Set an environment variable, or remove it, as if the process had started so."""

    def set_it(name: str, value: str | None) -> None:
        backends.from_environment.cache_clear()
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)

    yield set_it
    backends.from_environment.cache_clear()


@pytest.fixture(autouse=True)
def _poison_uninitialised_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill what fastl2o allocates uninitialised with NaN, so that a read before a write shows."""

    def poisoned(allocate: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            tensor = allocate(*args, **kwargs)
            caller = sys._getframe(1).f_globals.get("__name__", "")
            if caller.split(".")[0] == "fastl2o" and tensor.is_floating_point():
                with torch.no_grad():
                    tensor.fill_(torch.nan)
            return tensor

        return wrapper

    for name in ("empty", "empty_like", "empty_strided"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))
    for name in ("new_empty", "new_empty_strided"):
        monkeypatch.setattr(torch.Tensor, name, poisoned(getattr(torch.Tensor, name)))
