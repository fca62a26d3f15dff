#!/usr/bin/env python3
"""Run `accelerate launch`, and end with the training command's own error line and exit code.

The launcher's tracebacks, which follow a worker's error, say nothing about it.
"""

import logging
import sys
from subprocess import CalledProcessError


def main() -> None:
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    parser = launch_command_parser()
    parser.prog = "launch.py"
    try:
        launch_command(parser.parse_args())
    except KeyboardInterrupt:
        print("the same command with the same OUTPUT_DIR goes on from the last checkpoint", file=sys.stderr)
        sys.exit(130)
    except CalledProcessError as error:
        sys.exit(error.returncode)
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        sys.exit(max(1, failure.exitcode))
    except ValueError as error:  # a config file or arguments that don't go together
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
