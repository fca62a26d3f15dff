"""What ties a training process to the launcher that started it."""

import ctypes
import os
import signal
import sys

LAUNCHER_VARIABLE = "ROUTER_TUNING_LAUNCHER"
"""Process id of the launcher."""
_PR_SET_PDEATHSIG = 1


def die_with_launcher() -> None:
    """Let the kernel kill this process when its launcher is gone, so that none trains on unseen (Linux only).

    Launchers start their workers in sessions of their own, where a `kill -9` of the launcher doesn't reach them.
    Without `entrypoints/launch.py` nothing happens: a shell that ends shall not end what it has put in the background.
    """
    launcher = os.environ.get(LAUNCHER_VARIABLE)
    if launcher is None or sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(launcher):  # it was gone before that
        sys.exit("error: the launcher is gone")
