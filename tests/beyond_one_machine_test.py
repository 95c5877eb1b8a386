"""What needs other machines, or a cluster's scheduler, and is tried with those that this one can be made to play."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.two_hosts import ROOT


@pytest.mark.thorough
@pytest.mark.parametrize("trial", ["tests.two_hosts", "tests.slurm"])
def test_a_trial_sees_what_it_should(trial: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", trial],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=7200,
        check=False,
    )
    if done.stdout.startswith("not applicable: "):
        pytest.skip(done.stdout.strip())
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
