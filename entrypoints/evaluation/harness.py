#!/usr/bin/env python3
"""Run lm-evaluation-harness's own command line, with the project's model `mod` known to it.

    python entrypoints/evaluation/harness.py run --model mod --model_args pretrained=path/to/output --tasks piqa \
        --batch_size 16

Everything is handed on to `lm_eval`, whose version 0.4.13 has no way of its own to name a model that is defined
elsewhere. `--model_args` takes `pool=context`, `capacity=0.75` and `route=False` too
(`utils/evaluation/lm_eval_model.py`).
"""

import sys
from pathlib import Path

# in place of this folder, whose evaluate.py would pass for the package of that name that some tasks import
sys.path[0] = str(Path(__file__).resolve().parents[2])

from utils.io.errors import run_command


def main() -> None:
    """Register the model, and run the harness."""
    from lm_eval.__main__ import cli_evaluate

    import utils.evaluation.lm_eval_model  # noqa: F401  registers `mod`

    cli_evaluate()


if __name__ == "__main__":
    run_command(main)
