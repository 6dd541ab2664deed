"""How a comparison is made: horizon, runs, seeds, grid, and what is read off the losses."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ._measures import log_spaced, steps_to_reach, trailing_mean

__all__ = ["LEARNING_RATES", "Setting"]

LEARNING_RATES = tuple(10.0 ** (k / 2) for k in range(-10, 3))
"""1e-5 to 10 in half decades: 13 values."""


@dataclass(frozen=True)
class Setting:
    """How a comparison is made.

    Attributes:
        horizon: inner steps.
        runs: runs reported, each with its own initial parameters and minibatches.
        tuning_runs: other runs, on which the learning rates are chosen.
        criterion: what a learning rate is chosen by: ``"sum"`` of the losses at the ``horizon``
            visited points, or ``"final"``, the mean loss of the last ``window`` points.
        steps: where to report the loss; by default a few up to the horizon.

    Raises:
        ValueError: for values that no comparison can be made with.

    Example:
        >>> setting = Setting(horizon=200, steps=(10, 200))
        >>> setting.window, setting.reported_steps, len(setting.learning_rates)
        (20, (10, 200), 13)
    """

    horizon: int = 100
    runs: int = 16
    tuning_runs: int = 8
    seed: int = 0
    criterion: str = "sum"
    steps: tuple[int, ...] = ()
    learning_rates: tuple[float, ...] = LEARNING_RATES

    def __post_init__(self) -> None:
        for name in ("horizon", "runs", "tuning_runs"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.criterion not in ("sum", "final"):
            raise ValueError(f"criterion must be 'sum' or 'final', got {self.criterion!r}")
        if not self.learning_rates:
            raise ValueError("learning_rates is empty: give at least one to tune over")
        if not all(0 < lr < float("inf") for lr in self.learning_rates):
            raise ValueError(
                f"learning_rates must be finite and above 0, got {list(self.learning_rates)}"
            )
        outside = [step for step in self.steps if not 0 <= step <= self.horizon]
        if outside:
            raise ValueError(f"steps must lie in 0..{self.horizon} (the horizon), got {outside}")

    @property
    def window(self) -> int:
        """Points that the final loss is averaged over: minibatch losses are noisy."""
        return max(1, min(100, self.horizon // 10))

    @property
    def tuning_seed(self) -> int:
        """Of the tuning runs: far from the reported one, and as reproducible."""
        return self.seed + 1_000_003

    @property
    def reported_steps(self) -> tuple[int, ...]:
        """Steps whose losses get columns."""
        quarters = {max(1, round(self.horizon * share)) for share in (0.1, 0.25, 0.5, 1.0)}
        return self.steps or tuple(sorted(quarters))

    @property
    def points(self) -> tuple[int, ...]:
        """Steps of the curves: log-spaced, and those reported."""
        return tuple(sorted({*log_spaced(self.horizon), *self.reported_steps}))

    def columns(self, losses: Tensor) -> dict[str, Tensor]:
        """Reported quantities of ``losses (horizon + 1, R)``, each per run ``(R,)``."""
        columns = {f"step {step}": losses[step] for step in self.reported_steps}
        columns[f"sum of {self.horizon}"] = losses[:-1].sum(0)
        columns[f"last {self.window}"] = losses[-self.window :].mean(0)
        return columns

    def tuning_score(self, losses: Tensor) -> float:
        """What a learning rate is chosen by, smaller is better; NaN if a run went non-finite."""
        columns = self.columns(losses)
        name = f"sum of {self.horizon}" if self.criterion == "sum" else f"last {self.window}"
        return columns[name].mean().item()

    def diverged(self, losses: Tensor) -> int:
        """Number of runs that went non-finite or ended above the loss they started from."""
        worse = losses[-self.window :].mean(0) > losses[0]
        return int((worse | ~losses.isfinite().all(0)).sum())

    def steps_to_final(self, losses: Tensor, baseline: Tensor) -> Tensor:
        """Steps after which ``losses`` are where ``baseline`` ends, run by run.

        Both are ``(horizon + 1, R)``, losses of the same runs under two optimizers, and are
        compared as means of ``window`` losses. Returns ``(R,)``, infinity where that never happens;
        the baseline itself needs ``horizon`` steps at most.
        """
        return steps_to_reach(losses, trailing_mean(baseline, self.window)[-1], self.window)
