"""Capturing a step in a CUDA graph: what is refused. (Without a GPU the capture is pretended.)"""

from __future__ import annotations

from typing import Any

import pytest

import fastl2o
from fastl2o import LearnedOptimizer, LSTMRule, _optim_capture
from tests.optimizers import make_params, run_steps, set_grads, unchanged


@pytest.fixture
def capturing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_optim_capture, "capturing", lambda params: True)


@pytest.mark.usefixtures("capturing")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "graph capture of step.. for an instance of LSTM but .* capturable is False"),
        ({"capturable": True}, "nonfinite='raise' cannot be captured.*'skip' or 'pass'"),
        ({"nonfinite": "skip"}, "capturable is False"),
    ],
    ids=str,
)
def test_a_capture_that_could_not_be_replayed_is_refused(
    options: dict[str, Any], message: str
) -> None:
    optimizer = fastl2o.LSTM(make_params(), rule=LSTMRule(2), **options)
    set_grads(optimizer.param_groups[0]["params"], 0)
    with unchanged(optimizer), pytest.raises(RuntimeError, match=message):
        optimizer.step()


@pytest.mark.usefixtures("capturing")
@pytest.mark.parametrize("policy", ["skip", "pass"])
def test_other_captures_are_let_through(policy: str) -> None:
    optimizer = LearnedOptimizer(make_params(), LSTMRule(2), nonfinite=policy, capturable=True)
    run_steps(optimizer, 1)
    assert optimizer.state


def test_nothing_is_captured_on_the_cpu() -> None:
    assert not _optim_capture.capturing(make_params())
    for capturable in (False, True):
        run_steps(LearnedOptimizer(make_params(), LSTMRule(2), capturable=capturable), 1)
