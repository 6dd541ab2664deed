"""``python -m bench.suite``: everything, in about ten minutes; ``--quick`` in one."""

from __future__ import annotations

import json
import os
import warnings
from typing import Any

from .. import common
from . import report, scaling, steps, training


def measure(quick: bool) -> dict[str, Any]:
    """All sections; ``quick`` takes two rounds of the smaller sizes, to see that it works."""
    rounds, seconds = (2, 1.0) if quick else (None, 15.0)
    result: dict[str, Any] = {"machine": common.machine()}
    result["steps"], notes = steps.measure(rounds, 3 * seconds)
    curves, left_out = scaling.coordinates(rounds, seconds, 10**5 if quick else 10**8)
    curves += scaling.tensors(rounds, seconds) + scaling.threads(rounds, seconds / 2)
    result["curves"] = curves + scaling.lengths(rounds, seconds)
    result["training"] = training.measure(rounds, seconds / 2)
    result["notes"] = [
        *notes,
        *left_out,
        "TorchOpt has no learned optimizers of these kinds to compare with: the meta-gradient's "
        "baseline is a loop over torch's own LSTM cells, or over the reference, under autograd",
        "on the CPU 'calls a step' are the ops that the step calls, on a GPU kernel launches; "
        "those of a compiled step, and all that JAX does, are not seen from outside",
        f"load after {os.getloadavg()[0]:.2f}",
    ]
    return result


def main() -> None:
    """Parse arguments, measure, print and write."""
    parser = common.report_parser("bench.suite", __doc__)
    arguments = parser.parse_args()
    common.set_threads(arguments.threads)
    with warnings.catch_warnings():
        # torch.compile imports half of torch; its deprecation warnings are not about this package.
        warnings.simplefilter("ignore", DeprecationWarning)
        result = measure(arguments.quick)
    arguments.out.mkdir(parents=True, exist_ok=True)
    text = report.markdown(result)
    print(text)
    (arguments.out / "suite.md").write_text(text, encoding="utf-8")
    (arguments.out / "suite.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    report.plots(result, arguments.out)


if __name__ == "__main__":
    main()
