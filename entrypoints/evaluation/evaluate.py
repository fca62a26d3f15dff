#!/usr/bin/env python3
"""Evaluate a MoD checkpoint or a dense base on the paper's nine tasks (Table 1) with lm-evaluation-harness.

    python entrypoints/evaluation/evaluate.py path/to/output --tasks piqa openbookqa --limit 200 --data_dir my/data

Prints a table, in percent: a MoD checkpoint stands beside its dense base (with a LoRA adapter: beside itself unrouted),
with the share of inputs that each task executed. Writes JSON whose path is printed last. Every task's result is kept
when it is done: an interrupted evaluation goes on when the same command is given again, and a dense base is evaluated
once for all its checkpoints.

Data comes from the hub, or with --data_dir from local files: TASK.jsonl holds the rows of the task's data set as the
hub has them, TASK_shots.jsonl the examples for few-shot prompts. Prompts, metrics and splits are the harness's own.
"""

import argparse
import functools
import hashlib
import json
import logging
import platform
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from utils.io.devices import choose_device
from utils.io.errors import UserError, run_command


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    default = ROOT / "ckpt/smollm2-135m-mod"
    parser.add_argument(
        "checkpoint", nargs="?", default=str(default), help=f"MoD checkpoint or dense base, local or hub ({default})"
    )
    parser.add_argument("--tasks", nargs="+", help="only these tasks of the config (all)")
    parser.add_argument(
        "--config",
        type=Path,
        default=ROOT / "configs/evaluation/table1.yaml",
        help="table of tasks (configs/evaluation/table1.yaml)",
    )
    parser.add_argument("--data_dir", type=Path, help="local data instead of the hub's")
    parser.add_argument("--limit", type=int, help="the first so many items of each task (all)")
    parser.add_argument("--batch_size", type=int, default=8, help="requests at once; changes no result (8)")
    parser.add_argument(
        "--pool",
        choices=("all", "context"),
        help="what a sequence decision sees in a log-likelihood request: context and continuation as published, or "
        "the context alone as in generation (what the checkpoint was calibrated for; all where it doesn't say)",
    )
    parser.add_argument(
        "--capacity", type=float, help="another share to execute that it was calibrated for, or between (its own)"
    )
    parser.add_argument("--no_dense", action="store_true", help="leave the dense base out")
    parser.add_argument("--device", help="cpu or cuda (cuda where there is one)")
    parser.add_argument("--dtype", choices=("auto", "float32", "float16", "bfloat16"), default="auto", help="(auto)")
    parser.add_argument("--threads", type=int, help="threads of a CPU (torch's default)")
    parser.add_argument(
        "--output_dir", type=Path, default=ROOT / "outputs/evaluation", help="where results go (outputs/evaluation)"
    )
    parser.add_argument("--output", type=Path, help="JSON file (OUTPUT_DIR/NAME-TIME.json)")
    arguments = parser.parse_args()
    for name in ("limit", "batch_size", "threads"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            parser.error(f"--{name} {value} must be at least 1")
    return arguments


def main() -> None:
    """Find, evaluate, print and write."""
    arguments = parse_arguments()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("utils").setLevel(logging.INFO)
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of a loaded model, and of defaults of its own tasks

    from utils.evaluation.tasks import find_tasks, prepare_hub_tasks, prepare_local_tasks, read_table
    from utils.model.base_models import resolve_base_model
    from utils.model.checkpoint import is_mod, read_config, read_settings

    table = read_table(arguments.config, arguments.tasks)
    checkpoint = resolve_base_model(arguments.checkpoint)
    routed = is_mod(read_config(checkpoint))
    settings = read_settings(checkpoint, arguments.capacity)

    import torch
    import transformers
    from datasets.exceptions import DatasetNotFoundError

    from utils.evaluation.harness import average, evaluate_columns, identify_base, identify_routing, render
    from utils.evaluation.lm_eval_model import MoDLM, choose_pool, load_model
    from utils.io.files import dated_name, write_json
    from utils.model.checkpoint import load_tokenizer
    from utils.model.lora import holds_adapter

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    device = choose_device(arguments.device)

    manager = find_tasks(table.columns)
    if arguments.data_dir:
        source = hashlib.sha256(str(arguments.data_dir.resolve()).encode()).hexdigest()[:8]
        folder = (arguments.output_dir / f"local_tasks-{source}").resolve()
        prepared = prepare_local_tasks(table.columns, manager, arguments.data_dir, folder)
        manager = find_tasks(table.columns, include=folder)
    else:
        prepared = prepare_hub_tasks(table.columns, manager)

    identity = {
        "base": identify_base(checkpoint),
        "routing": None,
        "dtype": arguments.dtype,
        "device": device.split(":")[0],
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    # without its routing, a checkpoint with an adapter is the adapted model and not the dense base
    plain = "unrouted" if holds_adapter(checkpoint) else "dense"
    models = {plain: identity} if not (routed and arguments.no_dense) else {}
    pool = choose_pool(settings, arguments.pool)
    if routed:
        models["routed"] = identity | {"routing": identify_routing(checkpoint, settings, pool)}
    rows = {}

    @functools.cache
    def load() -> tuple:
        return load_model(checkpoint, arguments.dtype, arguments.capacity).to(device), load_tokenizer(checkpoint)

    def make_model(route: bool) -> MoDLM:
        return MoDLM(*load(), pool=pool, route=route, batch_size=arguments.batch_size)

    for name, model_identity in models.items():
        logging.getLogger("utils").info("--- %s", name)

        try:
            rows[name] = evaluate_columns(
                functools.partial(make_model, name == "routed"),
                model_identity,
                table.columns,
                prepared,
                manager,
                arguments.output_dir / "tasks",
                limit=arguments.limit,
                data_dir=arguments.data_dir,
            )
        except (ConnectionError, DatasetNotFoundError) as error:
            raise UserError(
                f"the hub's data cannot be had: {error}; name a folder of local files with --data_dir"
            ) from None

    print(render(table, rows))
    if routed and settings.level == "sequence":
        what = {"all": "context and continuation", "context": "the context alone, as generation does"}[pool]
        print(f"sequences were decided on {what} (--pool)")
    output = arguments.output
    if output is None:
        output = arguments.output_dir / dated_name(checkpoint.resolve().name, ".json")
    harness = f"lm_eval run --model hf --batch_size 1 --model_args pretrained={checkpoint},trust_remote_code=True"
    if routed and (pool == "context" or arguments.capacity is not None):  # what the checkpoint doesn't do by itself
        harness = "python entrypoints/evaluation/harness.py run --model mod --batch_size 8 --model_args "
        harness += f"pretrained={checkpoint},pool={pool}"
        harness += "" if arguments.capacity is None else f",capacity={arguments.capacity}"
    write_json(
        output,
        {
            "arguments": json.loads(json.dumps(vars(arguments), default=str)),
            "checkpoint": str(checkpoint),
            "identity": models,
            "target_capacity": settings.target_capacity if routed else None,
            "pool": pool if routed else None,
            "python": platform.python_version(),
            "rows": rows,
            "averages": {name: [average(a, results) for a in table.averages] for name, results in rows.items()},
            "lm_eval": {
                task: f"{harness} --tasks {ready.task}"
                + (f" --include_path {folder}" if arguments.data_dir else f" --num_fewshot {ready.num_fewshot}")
                + (f" --limit {ready.limit_of_each(arguments.limit)}" if arguments.limit else "")
                for task, ready in prepared.items()
            },
        },
    )
    print(output)


if __name__ == "__main__":
    run_command(main)
