"""The example of recurrent PPO in a short form: the policies with an LSTM learn, the one without memory does not."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
SHORT = {
    "memory-length": 5,
    "num-envs": 32,
    "rollout-steps": 48,
    "hidden-size": 32,
    "num-updates": 40,
    "learning-rate": 3e-3,
}


@pytest.mark.slow
def test_recurrent_ppo_learns_what_a_memoryless_policy_cannot(tmp_path):
    """The return of a memoryless policy is 1 or -1 with equal chance, whatever it does.

    The last 10 updates have 2,560 episodes, so 0.1 is five standard deviations of their mean.
    """
    pytest.importorskip("gymnax")
    options = [text for name, value in SHORT.items() for text in (f"--{name}", str(value))]
    command = [sys.executable, "examples/recurrent_ppo.py", *options, "--out", str(tmp_path)]
    process = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert process.returncode == 0, process.stderr
    policies = json.loads((tmp_path / "results.json").read_text())["policies"]
    assert policies["jaxlstm.LSTM"]["final_return"] > 0.95
    assert policies["Flax ScannedRNN"]["final_return"] > 0.95
    assert abs(policies["no memory"]["final_return"]) < 0.1
    for policy in policies.values():
        assert abs(policy["returns"][0]) < 0.5  # chance at the start
        assert policy["steps_per_second"] > 0
    assert (tmp_path / "learning_curves.png").read_bytes().startswith(b"\x89PNG")
    assert process.stdout.count("rollout and replay agree") == 3
