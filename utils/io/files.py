"""Writes that are never seen half done: everything goes to a temporary name in the same folder, then is renamed."""

import fcntl
import glob
import json
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from .errors import UserError


def read_json(path: str | Path) -> dict[str, Any]:
    """Return the JSON object that a file holds.

    Raises:
        UserError: it holds something else.
        OSError: it cannot be read.
    """
    path = Path(path)
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: not a JSON object")
    return value


@contextmanager
def atomic_file(path: str | Path, mode: str = "w") -> Iterator[IO[Any]]:
    """Open a temporary file beside `path` for writing and rename it to `path` when the block ends without an error.

    What an earlier process left when it was killed is removed: the lock on a temporary file goes with its process.

    Args:
        path: final name; its folder is made if it is not there.
        mode: `"w"` (UTF-8 text, newlines as written) or `"wb"`.

    Raises:
        OSError: the folder cannot be written to; `path` is then as it was before.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(path)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    _lock(handle)
    text = {} if "b" in mode else {"encoding": "utf-8", "newline": ""}
    try:
        with os.fdopen(handle, mode, **text) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            os.chmod(temporary, 0o666 & ~_umask())
            os.replace(temporary, path)  # before the file is closed, which gives up its lock
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


@contextmanager
def atomic_directory(path: str | Path) -> Iterator[Path]:
    """Yield a temporary folder beside `path` and rename it to `path` when the block ends without an error.

    Raises:
        FileExistsError: `path` exists and is not an empty folder.
    """
    path = Path(path)
    if path.is_dir() and not any(path.iterdir()):
        path.rmdir()
    elif path.exists():
        raise FileExistsError(17, "already exists", str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
    try:
        yield temporary
        os.chmod(temporary, 0o777 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as indented JSON with a final newline, atomically."""
    with atomic_file(path) as file:
        file.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def dated_name(name: str, ending: str) -> str:
    """Return `NAME-DATE-TIME-RANDOM` and the ending: another one each time, for files that nobody named."""
    return f"{name}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}{ending}"


def link_or_copy(source: str | Path, target: str | Path, copy: bool = False) -> str:
    """Make `target` the same file as `source` without using its space a second time, where the file system allows.

    Tries a hard link (it outlives the source's name), then a symbolic link (other file systems), then copies.

    Returns:
        `"hard link"`, `"symbolic link"` or `"copy"`: what was made.
    """
    source, target = Path(source).resolve(), Path(target)
    if not copy:
        for make, made in ((os.link, "hard link"), (os.symlink, "symbolic link")):
            try:
                make(source, target)
                return made
            except OSError:
                continue
    shutil.copyfile(source, target)
    return "copy"


def _remove_abandoned(path: Path) -> None:
    for temporary in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        try:
            with open(temporary, "rb") as file:
                status = os.stat(temporary)
                just_made = status.st_size == 0 and time.time() - status.st_mtime < 60  # perhaps not locked yet
                if not just_made and _lock(file.fileno()):
                    temporary.unlink()
        except OSError:
            continue  # gone meanwhile, or somebody else's


def _lock(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False  # held by another process, or a file system without locks
    return True


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
