"""Meta-training: the outer loop that trains a rule on runs of tasks."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ..rules import Rule, from_config
from ._checks import check_number, check_seed, check_type
from ._groups import (
    Groups,
    GroupStarter,
    Outcome,
    check_groups,
    check_optimizer,
    check_tasks,
    check_weights,
)
from ._log import FitResult, TrainingLog
from ._outer import OuterUpdate, SignalToNoise
from ._saved import check_alike, check_counters, differences
from .checkpoint import CheckpointError, CheckpointWriter, load_checkpoint
from .distributed import Ranks
from .estimators import Estimator, TruncatedBPTT
from .imitation import Imitation
from .schedules import Horizon, LRSchedule, as_horizon, longest
from .tasks import Task
from .validation import Validation

__all__ = ["FitResult", "MetaTrainer"]

_COUNTERS = (
    *("outer_step", "inner_steps", "skipped", "_skipped_in_a_row"),
    *("best_score", "last_score", "best_step"),
)
# So many skipped updates in a row mean that the rule, not one unlucky run, is broken.
_MAX_SKIPPED_IN_A_ROW = 100


class MetaTrainer:
    """Trains a rule's meta-parameters on tasks.

    One outer step is one window of one batch of runs, or of several, and one update.

    A batch of runs is carried from window to window until its horizon; then new runs are drawn. A
    window whose losses or meta-gradient are not finite is not used: the update is skipped and
    counted, and new runs are drawn.

    Where torch.distributed is initialised, the processes share the windows of an outer step and
    take the same update, bit for bit that of one process; the first writes files.

    Everything random comes from ``seed``. With a ``checkpoint_dir`` the whole training state is
    saved, and the same training started again after a kill continues to the same bits as one that
    was never interrupted.

    Args:
        rule: the rule; its parameters are trained in place.
        tasks: what to train on; every new batch of runs is of one of them.
        estimator: how a window becomes a meta-gradient; ``TruncatedBPTT()`` by default.
        horizon: inner steps of a run: an int, a (low, high) pair drawn log-uniformly for each batch
            of runs, an ``Exponential``, a ``Curriculum`` or the list of its stages.
        optimizer: a ``torch.optim`` optimizer over ``rule.parameters()``; Adam at 1e-3 by default.
        seed: of tasks, runs and minibatches. Initialise the rule with a generator of your own.
        unroll: inner steps of a window, given or drawn for each batch of runs as ``horizon`` is;
            the estimator's by default.
        runs: R, the runs of a batch, which share every kernel call.
        accumulate: windows, each of another batch of runs, whose mean meta-gradient makes an
            update; a multiple of the number of processes.
        groups: batches of runs in flight, one window each in turn: a multiple of ``accumulate``,
            the default. With more, successive updates are less alike.
        clip_grad: largest 2-norm of the meta-gradient; None for no limit.
        average: decay, in [0, 1), of an exponential moving average of the meta-parameters; then
            validation scores the average and ``best_rule`` is one. None for no averaging.
        schedule: factor on the optimizer's rates by outer step, such as
            ``LRSchedule("cosine", total=1000)``.
        task_weights: relative frequency of each task.
        validation: when and how to score the rule; None for never (there is then no best-so-far
            selection).
        imitation: mix in imitation of Adam, with its own copy of the optimizer, as published.
        log_snr: also log the meta-gradients' signal-to-noise ratio.
        divergence: a loss beyond this factor times the first counts as non-finite; None: allowed.
        checkpoint_dir: where checkpoints and ``log.csv`` go; None for neither.
        logs: what to write there besides: ``"tensorboard"`` events, ``"curves"`` (a picture).
        checkpoint_every: outer steps between checkpoints; the end of a ``fit`` writes one too.
        progress: show a progress bar; None shows it on a terminal.

    Example:
        >>> import fastl2o
        >>> from fastl2o import meta
        >>> rule = fastl2o.LSTMRule(hidden_size=4, num_layers=1, preprocess="identity")
        >>> trainer = meta.MetaTrainer(rule, tasks=[meta.tasks.Quadratic(dim=3)], horizon=20,
        ...                            estimator=meta.TruncatedBPTT(unroll=5), progress=False)
        >>> trainer.fit(outer_steps=4).outer_steps
        4
    """

    def __init__(
        self,
        rule: Rule,
        tasks: Sequence[Task],
        estimator: Estimator | None = None,
        horizon: Any = 100,
        optimizer: torch.optim.Optimizer | None = None,
        seed: int = 0,
        *,
        unroll: Any = None,
        runs: int = 8,
        accumulate: int = 1,
        groups: int | None = None,
        clip_grad: float | None = None,
        average: float | None = None,
        schedule: LRSchedule | Callable[[int], float] | None = None,
        task_weights: Sequence[float] | None = None,
        validation: Validation | None = None,
        imitation: Imitation | None = None,
        log_snr: bool = False,
        divergence: float | None = 1e6,
        checkpoint_dir: str | os.PathLike[str] | None = None,
        checkpoint_every: int = 500,
        logs: Sequence[str] = (),
        progress: bool | None = None,
    ) -> None:
        check_type("rule", rule, Rule, "fastl2o.LSTMRule()")
        self.rule, self.tasks = rule, check_tasks(tasks)
        counts = {"runs": runs, "accumulate": accumulate, "checkpoint_every": checkpoint_every}
        for name, count in counts.items():
            check_number(name, count, minimum=1, integer=True)
        for name, limit in (("clip_grad", clip_grad), ("divergence", divergence)):
            if limit is not None:
                check_number(name, limit, minimum=0, exclusive=True)
        if average is not None:
            check_number("average", average, minimum=0, below=1)
        check_seed(seed)
        self.estimator = TruncatedBPTT() if estimator is None else estimator
        check_type("estimator", self.estimator, Estimator, "TruncatedBPTT(unroll=20)")
        self.estimator.check_runs(runs)
        self.estimator.check_rule(rule)
        for task in self.tasks:
            self.estimator.check_task(task)
        self.horizon: Horizon = as_horizon(horizon)
        unroll = self.estimator.unroll if unroll is None else unroll
        self.unroll = None if unroll is None else as_horizon(unroll, "unroll")
        if optimizer is None:
            optimizer = torch.optim.Adam(rule.parameters(), lr=1e-3)
        check_optimizer(optimizer, rule)
        if validation is not None:
            check_type("validation", validation, Validation, "Validation(every=100)")
        if imitation is not None:
            check_type("imitation", imitation, Imitation, "Imitation(probability=0.3)")
            imitation.check_rule(rule)
        if schedule is not None:
            check_type("schedule", schedule, Callable, 'LRSchedule("cosine", total=1000)')
        self.optimizer, self.schedule, self.seed, self.average = optimizer, schedule, seed, average
        self.clip_grad, self.divergence, self.accumulate = clip_grad, divergence, accumulate
        self.validation, self.imitation = validation, imitation
        self._ranks = Ranks()
        self.progress = progress if self._ranks.main else False
        self.checkpoint_every = checkpoint_every
        self.checkpoint_dir = None if checkpoint_dir is None else Path(checkpoint_dir)
        count = check_groups(groups, accumulate, self._ranks.size, imitation)
        self._outer = OuterUpdate(
            rule, optimizer, schedule, clip_grad, average, imitation is not None
        )
        self._snr = SignalToNoise() if log_snr else None
        self._dtype = next(rule.parameters()).dtype
        weights = check_weights(task_weights, len(self.tasks))
        self._starter = GroupStarter(
            *(self.tasks, weights, runs, self.estimator, self.horizon, self.unroll),
            *(imitation, self._dtype),
        )
        self._groups = Groups(self._starter, count, seed, divergence, self._ranks)
        self._writer: CheckpointWriter | None = None
        self._log = TrainingLog(self.checkpoint_dir if self._ranks.main else None, logs)
        self.outer_step, self.inner_steps, self.skipped, self._skipped_in_a_row = 0, 0, 0, 0
        self.best_score, self.last_score = math.inf, math.inf
        self.best_step: int | None = None
        self._best_parameters: dict[str, Tensor] | None = None
        self._started = False

    @property
    def best_rule(self) -> Rule:
        """A copy of the rule at its best validation so far, or as it is where none was made.

        With ``average``, of the averaged rule.
        """
        best = from_config(self.rule.family, self.rule.config()).to(self._dtype)
        best.load_state_dict(
            self._outer.candidate.state_dict()
            if self._best_parameters is None
            else self._best_parameters
        )
        return best

    def fit(self, outer_steps: int) -> FitResult:
        """Train until ``outer_steps`` outer steps are done, counted from the start of training.

        A second call with a larger number goes on from where the first ended. A checkpoint in
        ``checkpoint_dir`` is picked up by the first call.

        Raises:
            CheckpointError: if a checkpoint can be neither read nor written.
            ValueError: if the checkpoint in ``checkpoint_dir`` is of another training.
            RuntimeError: after 100 skipped updates in a row.
        """
        check_number("outer_steps", outer_steps, minimum=0, integer=True)
        begun = time.perf_counter()
        self.resume()
        meta_loss, before = math.nan, self.inner_steps
        writer: AbstractContextManager[object] = nullcontext()
        if self.checkpoint_dir is not None and self._ranks.main:
            writer = self._writer = CheckpointWriter(self.checkpoint_dir)
        with (
            writer,
            tqdm(
                total=max(outer_steps, self.outer_step),
                initial=self.outer_step,
                unit="step",
                desc="meta-training",
                disable=None if self.progress is None else not self.progress,
            ) as bar,
        ):
            while self.outer_step < outer_steps:
                meta_loss = self._outer_step(outer_steps, begun)
                last = self.last_score if math.isfinite(self.last_score) else None
                rate = (self.inner_steps - before) / (time.perf_counter() - begun)
                shown = {"inner/s": f"{rate:.4g}", "loss": f"{meta_loss:.4g}"}
                bar.set_postfix(shown, score=last, best=self.best_step, refresh=False)
                bar.update()
        return FitResult(
            self.outer_step,
            self.best_step,
            self.best_score,
            self.last_score,
            meta_loss,
            self.skipped,
            self.inner_steps,
            time.perf_counter() - begun,
        )

    def _outer_step(self, outer_steps: int, begun: float) -> float:
        """The windows of one update, the update, and what is due after it; the mean meta-loss."""
        outcome = self._groups.advance(
            self.rule, self.estimator, self.imitation, self.outer_step, self.accumulate
        )
        usable = outcome.usable and self._outer.apply(
            outcome.gradient, self.outer_step, imitating=outcome.imitating
        )
        if outcome.usable and not usable:
            self._groups.drop(self.outer_step, self.accumulate)
        self._skipped_in_a_row = 0 if usable else self._skipped_in_a_row + 1
        self.skipped += not usable
        lr = self._outer.lr(self.outer_step)
        self.outer_step += 1
        self.inner_steps += outcome.inner_steps
        self._log_step(outcome, lr, self._validate(), begun)
        due = self.outer_step % self.checkpoint_every == 0 or self.outer_step == outer_steps
        broken = self._skipped_in_a_row >= _MAX_SKIPPED_IN_A_ROW
        if self.checkpoint_dir is not None and (due or broken):
            state = self.state_dict()
            if self._writer is not None:
                self._writer.save(state)
                self._log.refresh()
        if broken:
            raise RuntimeError(
                f"{_MAX_SKIPPED_IN_A_ROW} updates in a row were skipped for non-finite or diverged "
                f"losses, up to outer step {self.outer_step}; lower the optimizer's lr or set "
                "clip_grad. best_rule is the best validated rule, or else the last one"
            )
        return outcome.meta_loss

    def _log_step(self, outcome: Outcome, lr: float, score: float | None, begun: float) -> None:
        snr = None
        if self._snr is not None and outcome.usable:
            snr = self._snr.update(outcome.gradient)
        self._log.append(
            outer_step=self.outer_step,
            **outcome.described,
            gradient_norm=float(torch.linalg.vector_norm(outcome.gradient)),
            snr=snr,
            lr=lr,
            skipped=self.skipped,
            validation=score,
            inner_steps=self.inner_steps,
            seconds=round(time.perf_counter() - begun, 3),
        )

    def _validate(self) -> float | None:
        if self.validation is None or self.outer_step % self.validation.every != 0:
            return None
        rule, score = self._outer.candidate, math.inf
        if self._ranks.main:
            score = self.validation.score(rule, self.tasks, longest(self.horizon), self._dtype)
        score = self._ranks.agree(score)
        self.last_score = score
        if score < self.best_score:
            self.best_score, self.best_step = score, self.outer_step
            self._best_parameters = {k: v.detach().clone() for k, v in rule.state_dict().items()}
        return score

    def fingerprint(self) -> dict[str, Any]:
        """What must be the same for a checkpoint to be continued, JSON-able."""
        # Of a schedule that is not an LRSchedule, no more can be said than that there is one.
        known = self.schedule is None or isinstance(self.schedule, LRSchedule)
        return {
            "rule": [self.rule.family, self.rule.config()],
            "tasks": [repr(task) for task in self.tasks],
            "task_weights": self._starter.weights.tolist(),
            "estimator": repr(self.estimator),
            "horizon": repr(self.horizon),
            "unroll": repr(self.unroll),
            "optimizer": [type(self.optimizer).__name__, self._outer.settings],
            "seed": self.seed,
            "runs": self._starter.runs,
            "accumulate": self.accumulate,
            "groups": self._groups.count,
            "clip_grad": self.clip_grad,
            "average": self.average,
            "divergence": self.divergence,
            "log_snr": self._snr is not None,
            "schedule": repr(self.schedule) if known else "function",
            "validation": None if self.validation is None else self.validation.config(),
            "imitation": None if self.imitation is None else self.imitation.config(),
            "dtype": str(self._dtype),
        }

    def state_dict(self) -> dict[str, Any]:
        """The whole training state: tensors, numbers and text that ``weights_only`` accepts.

        Of several processes all must call it, and the first one's is whole.
        """
        return {
            "fingerprint": json.dumps(self.fingerprint()),
            "outer": self._outer.state_dict(),
            "best": self._best_parameters,
            "groups": self._groups.state_dict(),
            "snr": None if self._snr is None else self._snr.state_dict(),
            "counters": {name: getattr(self, name) for name in _COUNTERS},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue the training that ``state`` was saved from.

        Raises:
            ValueError: if it was another training, when the message lists what differs, or is
                damaged. Nothing is changed.
            TypeError: if it is no state of a training.
        """
        if not isinstance(state, dict) or "fingerprint" not in state:
            raise TypeError("state is not of a MetaTrainer: give what its state_dict() returned")
        different = differences(state["fingerprint"], self.fingerprint())
        if different:
            raise ValueError(
                f"the checkpoint is of another training ({'; '.join(different)}); "
                "give the saved settings, or choose another checkpoint_dir (--out). A schedule "
                "ends at a recipe's last outer step: with one, --outer-steps must stay as it was"
            )
        try:
            counters = check_counters(state["counters"], _COUNTERS)
            if state["best"] is not None:
                check_alike("best", state["best"], self.rule.state_dict())
            snr = None if self._snr is None else SignalToNoise.from_state_dict(state["snr"])
            groups = self._groups.parsed(self.rule, state["groups"])
            self._outer.load_state_dict(state["outer"])
        except Exception as error:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise ValueError(
                f"a damaged state of a MetaTrainer ({reason}); give what its state_dict() returned"
            ) from error
        self._best_parameters, self._snr = state["best"], snr
        self._groups.take(groups)
        for name, value in counters.items():
            setattr(self, name, value)

    def resume(self) -> None:
        """Go on from the checkpoint in ``checkpoint_dir``, if there is one; ``fit`` does it too."""
        if self._started or self.checkpoint_dir is None:
            return
        # The first process's word counts: another may look before that one has written.
        found = load_checkpoint(self.checkpoint_dir) if self._ranks.main else None
        saved = self._ranks.agree(found)
        if saved is not None:
            try:
                self.load_state_dict(saved)
            except TypeError as error:
                raise CheckpointError(
                    f"the checkpoint in {str(self.checkpoint_dir)!r} is not one of a MetaTrainer "
                    f"({error}); delete the directory to start over, or choose another"
                ) from error
        self._log.open_at(self.outer_step)
        self._started = True
