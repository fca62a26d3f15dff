"""The short table at the end of a run."""

from collections.abc import Mapping
from typing import Any


def run_table(results: Mapping[str, Any]) -> str:
    """Return the table as text.

    Args:
        results: `held_out` with `rows` and Trainer's metrics of the `dense` model (`dense_loss`) and the `routed` one
            (`eval_loss`, `eval_capacity`, `eval_capacity/layer_i`); `forward_tokens_per_second` with `dense`,
            `routed` and their `ratio`, or None where it was not measured.
    """
    dense, routed, rows = (results["held_out"][name] for name in ("dense", "routed", "rows"))
    speed = results["forward_tokens_per_second"]
    prefix = "eval_capacity/layer_"
    layers = {name.removeprefix(prefix): value for name, value in routed.items() if name.startswith(prefix)}
    lines = [
        "",
        f"{'':<18}{'dense':>10}{'routed':>10}",
        f"{'held-out loss':<18}{dense['dense_loss']:>10.4f}{routed['eval_loss']:>10.4f}   ({rows} rows)",
        f"{'forward tokens/s':<18}{speed['dense']:>10.0f}{speed['routed']:>10.0f}   ({speed['ratio']:.2f}x)"
        if speed
        else f"{'forward tokens/s':<18}{'-':>10}{'-':>10}   (not measured where the weights are in parts)",
        f"{'capacity':<18}{1:>10.2f}{routed['eval_capacity']:>10.2f}   (share executed, all routed layers)",
        "",
        "layer     " + "".join(f"{layer:>6}" for layer in layers),
        "capacity  " + "".join(f"{value:>6.2f}" for value in layers.values()),
        "",
    ]
    return "\n".join(lines)
