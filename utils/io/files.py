"""Writes that are never seen half done: everything goes to a temporary name in the same folder, then is renamed."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any


@contextmanager
def atomic_file(path: str | Path, mode: str = "w") -> Iterator[IO[Any]]:
    """Open a temporary file beside `path` for writing and rename it to `path` when the block ends without an error.

    Args:
        path: final name; its folder is made if it is not there.
        mode: `"w"` (UTF-8 text, newlines as written) or `"wb"`.

    Raises:
        OSError: the folder cannot be written to; `path` is then as it was before.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    text = {} if "b" in mode else {"encoding": "utf-8", "newline": ""}
    try:
        with os.fdopen(handle, mode, **text) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
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


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
