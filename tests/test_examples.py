"""The examples in examples/ train: each runs as a user would run it, with few steps."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
# What each of them needs besides fastl2o, and steps after which its loss must have fallen.
NEEDS = {
    "accelerate_digits": ("accelerate", 60),
    "lightning_digits": ("lightning", 60),
    "timm_digits": ("timm", 100),
    "transformers_sequences": ("transformers", 100),
}


def test_every_example_is_in_the_table() -> None:
    assert {path.stem for path in EXAMPLES.glob("*_*.py")} == set(NEEDS)


@pytest.mark.parametrize("name", NEEDS)
def test_an_example_trains(name: str, tmp_path: Path) -> None:
    library, steps = NEEDS[name]
    extra = "examples-timm" if library == "timm" else "examples"
    if find_spec(library) is None:
        pytest.skip(f"{library} is not installed: pip install 'fastl2o[{extra}]', make {extra}")
    ran = subprocess.run(
        [sys.executable, str(EXAMPLES / f"{name}.py"), "--steps", str(steps)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    found = re.search(r"loss of the first \d+ steps ([\d.]+), of the last ([\d.]+)", ran.stdout)
    assert found, ran.stdout
    first, last = map(float, found.groups())
    assert last < 0.9 * first
