"""Tensors of more than 2^32 coordinates; run by ``make test-torch``, for the time they take."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bench.common import available_gib
from fastl2o import LearnedOptimizer, LSTMRule
from tests.common import needs_cpu_kernels
from tests.optimizers import mirrors

COORDINATES = 2**32 + 17
NEEDS_GIB = 12.0  # 8.6 GB of parameter; the gradient's zeros share a page of memory


@mirrors("foreach_large_tensor", "fused_large_tensor")
@needs_cpu_kernels
@pytest.mark.skipif(available_gib() < NEEDS_GIB, reason=f"needs {NEEDS_GIB:.0f} GiB of free memory")
def test_every_coordinate_of_a_tensor_beyond_32_bits_is_stepped() -> None:
    """By a rule without state, whose update is its bias: 1.3 TB of LSTM state fit nowhere."""
    rule = LSTMRule(num_layers=0, preprocess="identity", output_scale=1.0)
    with torch.no_grad():
        rule.readout.weight.zero_()
        rule.readout.bias.fill_(0.5)
    p = torch.nn.Parameter(torch.zeros(COORDINATES, dtype=torch.float16))
    p.grad = torch.from_numpy(np.zeros(COORDINATES, dtype=np.float16))
    LearnedOptimizer([p], rule).step()
    assert all(bool((part == 0.5).all()) for part in p.detach().split(2**26))
