"""``python -m tests.fuzz --cases 100000``: damaged files and states, in processes of their own.

A process that dies or hangs is seen from outside, and the number of the case is printed; so is a
case that fails. ``--first N --cases 1`` tries one again.
"""

from __future__ import annotations

import argparse
import collections
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

_CHUNK = 2000  # cases of one process
_SECONDS = 600  # for all of them, a hundred times what they take
_BYTES = 16 << 30  # of address space: what asks for more has believed a damaged number


def _work(first: int, count: int, folder: Path) -> None:
    """Try the cases, writing down where it is; prints what came of them as JSON."""
    resource.setrlimit(resource.RLIMIT_AS, (_BYTES, _BYTES))
    import torch

    from .targets import attempt

    torch.set_num_threads(1)
    counts: collections.Counter[str] = collections.Counter()
    failures = []
    for case in range(first, first + count):
        (folder / "case").write_text(str(case))
        try:
            name, accepted = attempt(case, folder)
        except Exception as error:
            failures.append(f"case {case}: {type(error).__name__}: {str(error)[:200]}")
        else:
            counts[f"{name}: {'accepted' if accepted else 'refused'}"] += 1
    print(json.dumps({"counts": counts, "failures": failures}))


def main() -> int:
    """Run all cases; 1 if any failed, crashed or hung."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--cases", type=int, default=100_000)
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker is not None:
        _work(options.first, options.cases, options.worker)
        return 0
    counts: collections.Counter[str] = collections.Counter()
    failures: list[str] = []
    case, end = options.first, options.first + options.cases
    while case < end:
        size = min(_CHUNK, end - case)
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "tests.fuzz", "--worker", folder]
            command += ["--first", str(case), "--cases", str(size)]
            try:
                ran = subprocess.run(
                    command, capture_output=True, text=True, timeout=_SECONDS, check=False
                )
                died = f"died with {ran.returncode}: {ran.stderr[-500:]}" if ran.returncode else ""
            except subprocess.TimeoutExpired:
                died = "hangs"
            if died:
                at = int(Path(folder, "case").read_text())
                failures.append(f"case {at} {died}")
                print(failures[-1])
                case = at + 1
                continue
        result = json.loads(ran.stdout)
        counts.update(result["counts"])
        failures += result["failures"]
        case += size
        print(*result["failures"], sep="\n", end="\n" * bool(result["failures"]))
        print(
            f"{case - options.first:,} of {options.cases:,}, {len(failures)} failures", flush=True
        )
    for name, count in sorted(counts.items()):
        print(f"{name} {count:,}")
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
