"""The torch tests an optimizer must answer to: each is mirrored by one of ours."""

from __future__ import annotations

import pytest

from tests import (
    test_contract,
    test_contract_gpu,
    test_contract_state,
    test_hierarchical_differentiable,
    test_optim_differentiable,
    test_optim_errors,
    test_optim_memory,
)
from tests.optimizers import MIRRORED, RULES, OptimizerCase
from tests.torch_machinery import large

# Of pytorch's test/test_optim.py (TestOptimRenewed) and test/optim/test_optim.py, without test_.
CHECKLIST = (
    "forloop_goes_right_direction",
    "param_group_with_lrscheduler_goes_right_direction",
    "tensor_lr",
    "param_groups_lr",
    "param_groups_weight_decay",
    "foreach_matches_forloop",
    "fused_matches_forloop",
    "fused_cpu_matches_cuda",
    "mixed_device_dtype",
    "set_default_dtype_works_with_foreach",
    "defaults_changed_to_foreach",
    "foreach_large_tensor",
    "fused_large_tensor",
    "peak_memory_foreach",
    "fused_does_not_step_if_foundinf",
    "fused_error_on_params_on_meta",
    "step_is_noop_when_params_have_no_grad",
    "step_is_noop_for_zero_grads",
    "state_dict_deterministic",
    "can_load_older_state_dict",
    "can_load_from_to_named_state_dict",
    "save_load_equality_with_weights_only",
    "load_nontensor_step",
    "cpu_load_state_dict",
    "state_dict_with_cuda_params",
    "non_empty_state",
    "deepcopy_copies_all_public_attrs",
    "step_pre_hook",
    "step_post_hook",
    "step_all_hooks",
    "state_dict_pre_hook",
    "state_dict_post_hook",
    "load_state_dict_pre_hook",
    "load_state_dict_post_hook",
    "rosenbrock_sparse",
    "complex",
    "complex_2d",
    "optimizer_can_be_printed",
    "errors",
    "differentiable",
)

# The expectations that a learned rule may break; what is tested in their place is where they are
# mirrored. Everything else holds of every rule.
MAY_BREAK = {"forloop_goes_right_direction", "step_is_noop_for_zero_grads"}
MODULES = (
    *(test_contract, test_contract_gpu, test_contract_state, test_optim_errors, test_optim_memory),
    *(test_optim_differentiable, test_hierarchical_differentiable, large),
)


def test_every_torch_test_is_mirrored() -> None:
    for tests in MIRRORED.values():  # noted when the modules were imported
        assert all(any(hasattr(module, name) for module in MODULES) for name in tests)
    assert sorted(CHECKLIST) == sorted(MIRRORED)


@pytest.mark.parametrize("case", RULES, ids=repr)
def test_exemptions_are_of_the_two_kinds_and_have_a_reason(case: OptimizerCase) -> None:
    assert set(case.exempt) <= MAY_BREAK
    assert all(case.exempt.values())
    # a rule that equals a known optimizer has an oracle for its direction, others cannot have
    assert ("forloop_goes_right_direction" in case.exempt) == (case.oracle is None)
