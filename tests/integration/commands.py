"""How the tests run a command as a user would."""

import os
import subprocess


def run(*command, cwd=None, check=True, **environment):
    """Run a command, on one thread; fail with all it printed if it fails and `check` is set."""
    result = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
    )
    assert not check or result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
    return result
