"""The same bits whatever the number of threads."""

from __future__ import annotations

import pytest
import torch

from fastl2o import LearnedOptimizer
from tests.common import present_backends
from tests.optimizers import (
    RANDOM,
    OptimizerCase,
    assert_same_bits,
    on_backend,
    run_steps,
    snapshot,
)


@pytest.mark.parametrize("backend", present_backends())
@pytest.mark.parametrize("case", RANDOM, ids=repr)
def test_the_number_of_threads_does_not_change_a_bit(case: OptimizerCase, backend: str) -> None:
    results, threads = [], torch.get_num_threads()
    for count in (1, 2):
        params = [torch.nn.Parameter(torch.linspace(-1, 1, n)) for n in (40_000, 7, 1500)]
        optimizer = LearnedOptimizer(params, case.rule(0))
        with on_backend(backend):
            torch.set_num_threads(count)
            try:
                run_steps(optimizer, 2)
            finally:
                torch.set_num_threads(threads)
        results.append(snapshot(optimizer))
    if backend == "reference":
        # The bits of torch's own means and matrix products depend on the threads.
        torch.testing.assert_close(*results)
    else:
        assert_same_bits(*results)
