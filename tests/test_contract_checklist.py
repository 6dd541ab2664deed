"""The torch tests an optimizer must answer to: each is mirrored by one of ours or exempt."""

from __future__ import annotations

from tests import (
    test_contract,
    test_contract_state,
    test_hierarchical_differentiable,
    test_optim_differentiable,
    test_optim_errors,
)
from tests.optimizers import MIRRORED

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

EXEMPT = {
    "foreach_large_tensor": "2^32 coordinates need 1.3 TB of state; index arithmetic is 64-bit",
    "fused_large_tensor": "as foreach_large_tensor",
    "fused_cpu_matches_cuda": "there are no CUDA kernels yet; the CPU's are held to the reference",
    "state_dict_with_cuda_params": "needs a GPU; moving state between dtypes is tested instead",
}


def test_every_torch_test_is_mirrored_or_exempt_with_a_reason() -> None:
    modules = (
        *(test_contract, test_contract_state, test_optim_errors),
        *(test_optim_differentiable, test_hierarchical_differentiable),
    )
    for tests in MIRRORED.values():  # noted when the modules were imported
        assert all(any(hasattr(module, name) for module in modules) for name in tests)
    assert not set(EXEMPT) & set(MIRRORED)
    assert sorted(CHECKLIST) == sorted({*EXEMPT, *MIRRORED})
    assert all(EXEMPT.values())
