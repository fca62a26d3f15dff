"""How many inputs each router saw and executed: written by the worker, read by the process that serves metrics.

They are different processes, and vLLM's statistics carry nothing of a model's own; so the counts lie in a small file
that both map into memory. One process writes it. Numbers of eight bytes are written whole.
"""

import atexit
import contextlib
import os
from pathlib import Path

import numpy as np

SERVED_VARIABLE = "ROUTER_TUNING_SERVED"
"""Environment variable by which an engine tells the processes it starts what is served (JSON)."""


class Counts:
    """Inputs seen and executed by router, and requests whose decisions are remembered; grows for ever.

    Args:
        path: of a file that `create` made.
        mode: `r` or `r+`.
    """

    def __init__(self, path: str | Path, mode: str = "r"):
        self._numbers = np.memmap(path, dtype=np.int64, mode=mode)
        routers = (len(self._numbers) - 1) // 2
        self.seen, self.executed = self._numbers[:routers], self._numbers[routers : 2 * routers]
        self.remembered = self._numbers[2 * routers :]

    @staticmethod
    def create(path: str | Path, routers: int) -> None:
        """Make the file, all zeros; it is removed when this process ends."""
        np.zeros(2 * routers + 1, dtype=np.int64).tofile(path)
        owner = os.getpid()

        def remove() -> None:
            if os.getpid() == owner:  # a forked child leaves it alone
                with contextlib.suppress(OSError):
                    os.unlink(path)

        atexit.register(remove)
