"""Run by test_optim_memory_failure.py with failing_allocations.cpp preloaded."""

from __future__ import annotations

import ctypes
import sys

import torch

import fastl2o
from fastl2o.rules import HierarchicalRule, LSTMRule, RNNPropRule

RULES = {"lstm": LSTMRule, "rnnprop": RNNPropRule, "hierarchical": HierarchicalRule}


def main() -> None:
    """Fail every allocation of the op once, at a first step and at a later one."""
    shim = ctypes.CDLL(None)
    shim.fastl2o_arm.argtypes = [ctypes.c_char_p, ctypes.c_long]
    shim.fastl2o_seen.restype = ctypes.c_long
    torch.set_num_threads(2)
    rule = RULES[sys.argv[1]]()
    rule.reset_parameters(torch.Generator().manual_seed(0))
    failed = 0
    for before in (0, 1):
        size = 1000  # grows, so that memory that is kept between steps is too small each time
        skip = 0
        while True:
            size += 500
            params = [torch.ones(n, requires_grad=True) for n in (size, 3)]
            optimizer = fastl2o.LearnedOptimizer(params, rule)
            for p in params:
                p.grad = torch.full_like(p, 0.1)
            for _ in range(before):
                optimizer.step()
            values = [p.detach().clone() for p in params]
            state = optimizer.state_dict()["state"]
            state = {k: {n: t.clone() for n, t in entry.items()} for k, entry in state.items()}
            shim.fastl2o_arm(b"_C.abi3", skip)
            try:
                optimizer.step()
            except (MemoryError, RuntimeError):
                shim.fastl2o_arm(b"_C.abi3", -1)
            else:
                made = shim.fastl2o_seen()
                shim.fastl2o_arm(b"_C.abi3", -1)
                assert made <= skip, "an allocation failed, and the step went on"
                break
            failed += 1
            skip += 1
            assert all(torch.equal(a, b.detach()) for a, b in zip(values, params, strict=True))
            after = optimizer.state_dict()["state"]
            assert after.keys() == state.keys()
            for key, entry in state.items():
                assert all(torch.equal(t, after[key][n]) for n, t in entry.items()), key
            optimizer.step()
            assert not torch.equal(values[0], params[0].detach())
    print("failed", failed)


if __name__ == "__main__":
    main()
