"""How a command ends when the user, and not the program, made a mistake.

A library function raises `UserError` with one line that names what is wrong, where, and the way out. An entrypoint
wraps its `main` in `run_command`, which turns that into the line on stderr and a non-zero exit code. Anything else is
a bug and keeps its traceback.
"""

import difflib
import importlib.util
import os
import sys
from collections.abc import Callable, Iterable


class UserError(ValueError):
    """A mistake that the user can mend; its message is one line and says how."""


def suggest(value: str, allowed: Iterable[str]) -> str:
    """Return ` (did you mean X?)` for the nearest of `allowed`, or an empty string where none is near."""
    near = difflib.get_close_matches(value, list(allowed), n=1, cutoff=0.6)
    return f" (did you mean {near[0]!r}?)" if near else ""


def run_command(main: Callable[[], int | None]) -> None:
    """Run an entrypoint's `main` and exit: 0 done, 1 user's mistake or full disk and the like, 130 interrupted."""
    try:
        code = main() or 0
    except UserError as error:
        # every process of a launch makes the same mistake: the first one of each machine says so
        code = _fail(str(error)) if os.environ.get("LOCAL_RANK", "0") == "0" else 1
    except ModuleNotFoundError as error:
        package = (error.name or "utils").split(".")[0]
        if package == "utils" or importlib.util.find_spec(package):  # it is there, and the program asks wrongly
            raise
        hint = "`source .venv/bin/activate` first (`bash scripts/setup_env.sh` makes that environment)"
        code = _fail(f"{error.name} is not installed for {sys.executable}: {hint}")
    except OSError as error:
        if error.filename is None and error.errno is None:
            raise
        name = f"{error.filename}: " if error.filename else ""
        code = _fail(f"{name}{error.strerror or error}")
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    sys.stdout.flush()
    sys.exit(code)


def _fail(message: str) -> int:
    line = "error: " + " ".join(message.split("\n"))
    if "tqdm" in sys.modules:
        sys.modules["tqdm"].tqdm.write(line, file=sys.stderr)  # on a line of its own beside a progress bar
    else:
        print(line, file=sys.stderr)
    return 1
