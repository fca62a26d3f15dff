"""The short table at the end of a run."""

from collections.abc import Mapping


def run_table(
    dense: Mapping[str, float], routed: Mapping[str, float], speed: Mapping[str, float], rows: int, tokens: int
) -> str:
    """Return the table as text.

    Args:
        dense: Trainer's metrics of the dense model, with `dense_loss`.
        routed: of the routed model, with `eval_loss`, `eval_capacity` and `eval_capacity/layer_i`.
        speed: what `forward_speed` returns, tokens per second.
        rows: held-out rows, and `tokens`: their supervised tokens.
    """
    prefix = "eval_capacity/layer_"
    layers = {name.removeprefix(prefix): value for name, value in routed.items() if name.startswith(prefix)}
    lines = [
        "",
        f"{'':<24}{'dense':>10}{'routed':>10}",
        f"{'held-out loss':<24}{dense['dense_loss']:>10.4f}{routed['eval_loss']:>10.4f}"
        f"   ({rows} rows, {tokens} supervised tokens)",
        f"{'forward tokens/s':<24}{speed['dense']:>10.0f}{speed['routed']:>10.0f}   ({speed['ratio']:.2f}x)",
        f"{'capacity':<24}{1:>10.2f}{routed['eval_capacity']:>10.2f}   (share executed, all routed layers)",
        "",
        "layer     " + "".join(f"{layer:>6}" for layer in layers),
        "capacity  " + "".join(f"{value:>6.2f}" for value in layers.values()),
        "",
    ]
    return "\n".join(lines)
