"""How a command ends when the user, and not the program, made a mistake.

A library function raises `UserError` with one line that names what is wrong, where, and the way out. An entrypoint
wraps its `main` in `run_command`, which turns that into the line on stderr and a non-zero exit code. Anything else is
a bug and keeps its traceback.
"""

import difflib
import errno
import hashlib
import importlib.util
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from .launched import SAID_VARIABLE, leave_other_launches


class UserError(ValueError):
    """A mistake that the user can mend; its message is one line and says how."""


def suggest(value: str, allowed: Iterable[str]) -> str:
    """Return ` (did you mean X?)` for the nearest of `allowed`, or an empty string where none is near."""
    near = difflib.get_close_matches(value, list(allowed), n=1, cutoff=0.6)
    return f" (did you mean {near[0]!r}?)" if near else ""


def run_command(main: Callable[[], int | None]) -> None:
    """Run an entrypoint's `main` and exit: 0 done, 1 user's mistake or full disk and the like, 130 interrupted.

    A process that no launcher started is one by itself, whatever its environment says, and says what it ignores.
    """
    if stray := leave_other_launches():
        more = f" and {len(stray) - 4} more" if len(stray) > 4 else ""
        print(
            f"this is one process: ignoring {', '.join(stray[:4])}{more} of the environment (several processes are "
            "started by scripts/finetune_mod.sh with NUM_PROCESSES, or by accelerate launch)",
            file=sys.stderr,
        )
    try:
        code = main() or 0
    except UserError as error:
        code = _fail(str(error))
    except ModuleNotFoundError as error:
        package = (error.name or "utils").split(".")[0]
        if package == "utils" or importlib.util.find_spec(package):  # it is there, and the program asks wrongly
            raise
        hint = "`source .venv/bin/activate` first (`bash scripts/setup_env.sh` makes that environment)"
        code = _fail(f"{error.name} is not installed for {sys.executable}: {hint}")
    except OSError as error:
        if error.filename is None and error.errno is None:
            raise
        code = _fail(name_failure(error))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    sys.stdout.flush()
    sys.exit(code)


def name_failure(error: OSError) -> str:
    """Return what failed for what reason, in one line.

    Of two files it is the second that a full disk is about: the first is what was read.
    """
    names = [str(name) for name in (error.filename, error.filename2) if name]
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS):
        names = names[-1:]
    return ": ".join([*([" -> ".join(names)] if names else []), error.strerror or str(error)])


def _fail(message: str) -> int:
    line = "error: " + " ".join(message.split("\n"))
    if _said_before(line):
        return 1
    if "tqdm" in sys.modules:
        sys.modules["tqdm"].tqdm.write(line, file=sys.stderr)  # on a line of its own beside a progress bar
    else:
        print(line, file=sys.stderr)
    return 1


def _said_before(line: str) -> bool:
    """Tell whether another process of this machine's launch has said the line: all of them may make one mistake."""
    folder = os.environ.get(SAID_VARIABLE)
    if folder is None:
        return False
    try:
        Path(folder, hashlib.sha256(line.encode()).hexdigest()).touch(exist_ok=False)
    except FileExistsError:
        return True
    except OSError:  # better twice than not at all
        return False
    return False
