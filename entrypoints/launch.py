#!/usr/bin/env python3
"""Run `accelerate launch`, and end with the training command's own error line and exit code.

The launcher's tracebacks, which follow a worker's error, say nothing about it. SIGTERM goes to the workers, which save
and end in their own time; without this they would be killed after 30 seconds.
"""

import contextlib
import logging
import os
import signal
import sys
import tempfile
from pathlib import Path
from subprocess import CalledProcessError

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.io.errors import UserError, run_command
from utils.io.launched import ENGINE_VARIABLE, LAUNCHER_VARIABLE, PROCESSES_VARIABLE, SAID_VARIABLE

ENGINES_OF_SEVERAL = ("MULTI_GPU", "MULTI_CPU", "FSDP")


def main() -> int:
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed import DistError
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    parser = launch_command_parser()
    parser.prog = "launch.py"
    args = parser.parse_args()
    if args.config_file is not None:
        check_config(args)
    args.signals_to_handle = "SIGINT,SIGHUP,SIGQUIT"  # torch's launcher leaves SIGTERM to us
    signal.signal(signal.SIGTERM, tell_workers)
    os.environ[LAUNCHER_VARIABLE] = str(os.getpid())
    try:
        with tempfile.TemporaryDirectory(prefix="router-tuning-launch-") as folder:
            os.environ[SAID_VARIABLE] = folder
            launch_command(args)
    except KeyboardInterrupt:
        print("the same command with the same OUTPUT_DIR goes on from the last checkpoint", file=sys.stderr)
        return 130
    except CalledProcessError as error:
        return exit_code(error.returncode)
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        return exit_code(failure.exitcode)
    except ValueError as error:  # a config file or arguments that don't go together
        raise UserError(str(error)) from None
    except DistError as error:  # the other machines
        raise UserError(f"the processes can't find each other: {str(error).splitlines()[0]}") from None
    return 0


def check_config(args) -> None:
    """Compare the config file with the arguments, and hand what is asked for on to the workers, which check it.

    Raises:
        UserError: there is no such file, it can't be read, or it can't serve so many processes or on that port.
    """
    import yaml
    from accelerate.utils.other import is_port_in_use

    path = Path(args.config_file)
    if not path.is_file():
        raise UserError(f"config_file {path}: no such file; there are some in configs/accelerate")
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
        engine = str(config["distributed_type"])
    except (yaml.YAMLError, TypeError, KeyError, UnicodeDecodeError):
        raise UserError(f"config_file {path}: not an accelerate config; there are some in configs/accelerate") from None
    number = {}
    for name, default in (("num_processes", 1), ("num_machines", 1), ("machine_rank", 0)):
        value = getattr(args, name) or config.get(name) or default
        if not str(value).isdecimal():
            raise UserError(f"config_file {path}: {name} {value!r} is not a whole number")
        number[name] = int(value)
    processes, machines, rank = number.values()
    if engine in ENGINES_OF_SEVERAL and processes < 2:
        raise UserError(f"config_file {path}: {engine} is for two processes or more, and num_processes is {processes}")
    if engine == "NO" and processes > 1:
        raise UserError(f"config_file {path}: it is for one process, and num_processes is {processes}; try ddp.yaml")
    if processes % machines:
        raise UserError(f"num_processes {processes} (of all machines) does not divide over {machines} machines")
    port = args.main_process_port
    if port and rank == 0 and processes > 1 and is_port_in_use(port):
        free = "another" if machines > 1 else "another, or 0 for any free one"
        raise UserError(f"main_process_port {port} is in use; choose {free} (PORT of scripts/finetune_mod.sh)")
    os.environ[PROCESSES_VARIABLE] = str(processes)
    os.environ[ENGINE_VARIABLE] = engine


def tell_workers(signal_number, frame) -> None:
    """Pass a signal on to the processes that were started from here; end at once where there are none."""
    import psutil

    workers = psutil.Process().children()
    for worker in workers:
        with contextlib.suppress(psutil.NoSuchProcess):
            worker.send_signal(signal_number)
    if not workers:
        sys.exit(128 + signal_number)


def exit_code(code: int) -> int:
    """Return a worker's exit code as a shell would: 128 + the signal's number where one killed it, which is said."""
    if code < 0 and -code not in (signal.SIGTERM, signal.SIGINT):
        want = ", most likely for want of memory" if -code == signal.SIGKILL else ""
        print(f"error: a training process was killed by {signal.Signals(-code).name}{want}", file=sys.stderr)
    return 128 - code if code < 0 else max(1, code)


if __name__ == "__main__":
    run_command(main)
