"""Whether a process is one of several that a launcher started, or one by itself; and what ties it to its launcher.

The variables by which launchers number their processes are set in many shells that ask for one process: in a cluster's
job, in a notebook that torchrun started, in a container of a training platform. Libraries believe them, and wait for
processes that nobody started. So a process is one of several only where its parent says so: `entrypoints/launch.py`, or
a launcher that works as torchrun does (`accelerate launch`). Any other drops the variables before a library reads them.
"""

import ctypes
import os
import re
import signal
import sys

LAUNCHER_VARIABLE = "ROUTER_TUNING_LAUNCHER"
"""Process id of the launcher."""
PROCESSES_VARIABLE = "ROUTER_TUNING_PROCESSES"
ENGINE_VARIABLE = "ROUTER_TUNING_ENGINE"
"""Number of processes and distributed type that the launcher was asked for."""
SAID_VARIABLE = "ROUTER_TUNING_SAID"
"""Folder in which the processes of one machine note which errors have been said."""

OF_LAUNCHERS = re.compile(
    r"(LOCAL_|GROUP_|ROLE_|NODE_|CROSS_|SMDATAPARALLEL_LOCAL_)?RANK|(LOCAL_|GROUP_|ROLE_)?WORLD_SIZE|CROSS_SIZE|MASTER_(ADDR|PORT)"
    r"|(OMPI_COMM_WORLD|PMI|PMIX|MV2_COMM_WORLD)_\w*(RANK|SIZE)|MPI_LOCALN?RANK(S|ID)|PET_\w+"
    r"|TORCHELASTIC_(RUN_ID|RESTART_COUNT|MAX_RESTARTS|USE_AGENT_STORE|ERROR_FILE)"
    r"|SLURM_(PROCID|LOCALID|NODEID|NTASKS|NPROCS)|ACCELERATE_USE_(DEEPSPEED|FSDP|MEGATRON_LM)"
    r"|ROUTER_TUNING_(LAUNCHER|PROCESSES|ENGINE|SAID)"
)
"""What tells a process that it is one of several: torch's, accelerate's, DeepSpeed's, MPI's, Slurm's and our own."""

_PR_SET_PDEATHSIG = 1


def leave_other_launches() -> list[str]:
    """Drop launchers' variables from the environment of a process that none started; return their names."""
    if _of_our_launcher() or _of_torchrun():
        return []
    stray = sorted(name for name in os.environ if OF_LAUNCHERS.fullmatch(name))
    for name in stray:
        del os.environ[name]
    return stray


def die_with_launcher() -> None:
    """Let the kernel kill this process when its launcher is gone, so that none trains on unseen (Linux only).

    Launchers start their workers in sessions of their own, where a `kill -9` of the launcher doesn't reach them.
    Without `entrypoints/launch.py` nothing happens: a shell that ends shall not end what it has put in the background.
    """
    if not _of_our_launcher() or sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if not _of_our_launcher():  # it was gone before that
        sys.exit("error: the launcher is gone")


def _of_our_launcher() -> bool:
    return os.environ.get(LAUNCHER_VARIABLE) == str(os.getppid())


def _of_torchrun() -> bool:
    """Tell whether the parent is a launcher of torch's kind: one that has not itself the variable it gave us."""
    import psutil

    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return False
    try:
        return "TORCHELASTIC_RUN_ID" not in psutil.Process(os.getppid()).environ()
    except psutil.Error:  # a launcher of another user; nobody inherits a shell from one
        return True
