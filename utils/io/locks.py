"""One writer for a folder: of several processes that would write the same one, the first does and the others are told.

The lock is the kernel's (`flock`), so it goes with its process however that ends; the file that carries it says who
holds it. It lies beside the folder, which may be made, moved and removed meanwhile; in it, where the user may not write
there.

What is assumed of network file systems: Linux' NFS, Lustre mounted with `flock`, GPFS and CephFS lock between machines,
and give a lock up when its process ends; where a whole machine dies the server does so once the machine's lease has
ended (NFSv4: 90 seconds) or it is up again (NFSv3). Where a file system has no locks that is said, and none is taken.
"""

import atexit
import errno
import fcntl
import json
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from .errors import UserError

logger = logging.getLogger(__name__)

LOCK_FILES = ".*.lock"
"""Pattern of what may lie in a folder that is written to, where it can't lie beside it."""

_HELD = {errno.EWOULDBLOCK, errno.EACCES}
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}


@contextmanager
def sole_writer(directory: str | Path, wait: bool = False) -> Iterator[None]:
    """Be the only process that writes a folder within this block; all that write it must ask here.

    Args:
        directory: the folder, which need not be there; a symbolic link is the folder it leads to.
        wait: where another process is at it, say so and wait until it is done, instead of raising.

    Raises:
        UserError: another process is at it; the message names it, its machine, and since when.
        OSError: the lock can't be written.
    """
    path = _lock_path(Path(directory))
    made = [folder for folder in path.parents if not folder.exists()]
    patience, told = time.monotonic() + 1, False
    while (handle := _take(path)) is None:
        holder = _holder(path)
        if holder is None and time.monotonic() < patience:  # it has not written its name yet, or is just done
            time.sleep(0.05)
            continue
        holder = holder or "another process"
        if not wait:
            raise UserError(f"{directory} is being written by {holder}: wait until it is done, or choose another")
        if not told:
            logger.warning("waiting for %s, which is writing %s", holder, directory)
            told = True
        time.sleep(0.5)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)  # while it is held: who takes it next looks whether it is still this file
        os.close(handle)
        for folder in made:
            with suppress(OSError):  # something was written there
                folder.rmdir()


def write_alone_until_exit(directory: str | Path) -> None:
    """Be the only process that writes a folder until this process ends; raises as `sole_writer` does."""
    stack = ExitStack()
    stack.enter_context(sole_writer(directory))
    atexit.register(stack.close)


def _lock_path(directory: Path) -> Path:
    directory = directory.resolve()
    there = next(path for path in (directory.parent, *directory.parent.parents) if path.exists())
    if os.access(there, os.W_OK) or not directory.is_dir():
        return directory.parent / f".{directory.name}.lock"
    return directory / f".{directory.name}.lock"


def _take(path: Path) -> int | None:
    """Return a handle that holds the lock, or None where another process does."""
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                os.close(handle)
                if error.errno in _HELD:
                    return None
                raise
            logger.warning("%s: this file system has no locks; let nothing else write there", path.parent)
        try:
            if os.path.samestat(os.fstat(handle), os.stat(path)):
                break
        except FileNotFoundError:
            pass
        os.close(handle)  # its holder was done, and has removed it, between opening and locking
    holder = {"process": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S %z")}
    os.ftruncate(handle, 0)
    os.write(handle, json.dumps(holder).encode())
    return handle


def _holder(path: Path) -> str | None:
    try:
        holder = json.loads(path.read_bytes())
        return f"process {holder['process']} on {holder['host']} since {holder['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return None
