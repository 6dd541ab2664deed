"""torch's ways to train in parallel give what one process gives, and so do their checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import parallel_child as child
from tests.ranks import needs_gloo, run_ranks
from tests.test_hierarchical_ops import close

pytestmark = needs_gloo
over_rules = pytest.mark.parametrize("name", list(child.RULES))
# torch.distributed.optim compiles functions when it is imported.
TORCH_WARNINGS = (
    "ignore:`torch.jit.script` is deprecated:DeprecationWarning",
    "ignore:`torch.jit.interface` is deprecated:DeprecationWarning",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the ranks leave results and checkpoints."""
    return tmp_path_factory.mktemp("parallel")


@pytest.fixture(scope="module")
def results(folder: Path) -> Any:
    """What two processes found, by scenario and rule."""
    return run_ranks("tests.parallel_child", folder, 2, warnings=TORCH_WARNINGS)


@pytest.fixture(scope="module")
def three(results: Any, folder: Path) -> Any:
    """What three processes made of the checkpoints of two, by rule."""
    return run_ranks("tests.parallel_child", folder, 3, warnings=TORCH_WARNINGS)


def one_process(name: str) -> dict[str, Tensor]:
    """The same training in this process."""
    model = child.network()
    optimizer = child.optimizer_of(model, name)
    child.train(model, optimizer, range(child.STEPS))
    return child.everything(model, optimizer)


def alike(name: str, found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Equal bit for bit; where ranks add up a hierarchical rule's sums, up to their order."""
    assert list(found) == list(expected)
    for key, tensor in expected.items():
        assert found[key].dtype == tensor.dtype
        if name == "hierarchical":
            close(found[key].double(), tensor.double(), 2e-6)
        else:
            assert torch.equal(found[key], tensor), key


def same_bits(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(found) == list(expected)
    assert [key for key in found if not torch.equal(found[key], expected[key])] == []


@over_rules
def test_ddp_trains_as_one_process_and_replicas_hold_the_same_bits(results: Any, name: str) -> None:
    found = results["replicated"][name]
    same_bits(found["found"], one_process(name))
    assert found["same"] == [True, True]


@over_rules
def test_fsdp2_goes_on_from_a_distributed_checkpoint_with_the_same_bits(
    results: Any, name: str
) -> None:
    found = results["checkpoint"][name]
    same_bits(found["read"], found["saved"])
    same_bits(found["again"], found["straight"])
    alike(name, found["straight"], one_process(name))


@over_rules
def test_a_distributed_checkpoint_of_two_ranks_loads_in_three(
    results: Any, three: Any, name: str
) -> None:
    same_bits(three[name], results["checkpoint"][name]["saved"])


@over_rules
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized")
def test_a_distributed_checkpoint_of_two_ranks_loads_in_one(
    results: Any, folder: Path, name: str
) -> None:
    model = child.network()
    optimizer = child.loaded(model, name, folder)
    same_bits(child.everything(model, optimizer), results["checkpoint"][name]["saved"])
    child.train(model, optimizer, range(child.BEFORE, child.STEPS))
    alike(name, child.everything(model, optimizer), results["checkpoint"][name]["straight"])


@over_rules
@pytest.mark.parametrize("form", ["full", "flattened"])
def test_states_go_through_both_forms_of_optimizer_state_dicts(
    results: Any, name: str, form: str
) -> None:
    found = results[form][name]
    same_bits(found["copied"], found["found"])
    alike(name, found["found"], one_process(name))


@pytest.mark.parametrize("name", ["lstm", "rnnprop"])
def test_zero_redundancy_trains_as_one_process(results: Any, name: str) -> None:
    found = results["redundant"][name]
    expected = child.network()
    groups = [{"params": list(expected.parameters())}]
    optimizer = child.LearnedOptimizer(groups, child.seeded(name), **child.OPTIONS)
    child.train(expected, optimizer, range(child.STEPS))
    same_bits(found["found"], dict(expected.state_dict()))


@over_rules
def test_zero_redundancy_is_consolidated_without_pickle_and_taken_up(
    results: Any, name: str
) -> None:
    found = results["redundant"][name]
    assert 0 < found["kept"] < 4, "each rank keeps the states of a part"
    assert sorted(found["saved"]["state"]) == [0, 1, 2, 3]
    same_bits(found["taken up"], found["found"])


@pytest.mark.parametrize("name", ["lstm", "rnnprop"])
def test_a_consolidated_state_dict_loads_in_one_process(results: Any, name: str) -> None:
    saved = results["redundant"][name]["saved"]
    model = child.network()
    optimizer = child.LearnedOptimizer(model.parameters(), child.seeded(name), **child.OPTIONS)
    optimizer.load_state_dict(saved)
    for index, param in enumerate(model.parameters()):
        assert torch.equal(optimizer.state[param]["planes"], saved["state"][index]["planes"])
