"""The short table at the end of a run."""

from collections.abc import Mapping, Sequence
from typing import Any

USE = ("agreement", "executed")


def quality_and_speed(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return agreement and forward speed, relative to dense, of the capacities: what a `pareto` figure is drawn from.

    Args:
        results: as of `run_table`.

    Returns:
        Records with `name`, `label`, `forward`, `agreement` and `agreement_stderr`, the dense model's first; none
        where speed or use was not measured, or at one capacity alone.
    """
    speed, own = results["forward_tokens_per_second"], results.get("use")
    others = {name: of for name, of in results.get("capacities", {}).items() if "forward_ratio" in of and "use" in of}
    if not (speed and own and others):
        return []
    measured = {"trained for": (speed["ratio"], own)}
    measured |= {name: (of["forward_ratio"], of["use"]) for name, of in others.items()}
    routed = [
        {
            "name": "routed",
            "label": name,
            "forward": ratio,
            "agreement": use["agreement"]["mean"],
            "agreement_stderr": use["agreement"]["stderr"],
        }
        for name, (ratio, use) in measured.items()
    ]
    return [{"name": "dense", "forward": 1.0, "agreement": 1.0}, *routed]


def run_table(results: Mapping[str, Any]) -> str:
    """Return the table as text.

    Args:
        results: `held_out` with `rows` and Trainer's metrics of the `dense` model (`dense_loss`) and the `routed` one
            (`eval_loss`, `eval_capacity`, `eval_skipped` and the like, `eval_capacity/layer_i`);
            `forward_tokens_per_second` with `dense`, `routed` and their `ratio`, or None where it was not measured;
            where they were measured, `use` with its figures (each `mean` and `stderr`) and `prompts`, and `answers`,
            each with `prompt`, `dense`, `routed` and its own `agreement`; `capacities`, capacity -> `held_out`, `use`
            and `forward_ratio` of the same checkpoint set to it; `dense_is`, where the model that is left where nothing
            is skipped is not the base: `adapted` or `trained`.
    """
    dense, routed, rows = (results["held_out"][name] for name in ("dense", "routed", "rows"))
    speed = results["forward_tokens_per_second"]
    prefix = "eval_capacity/layer_"
    layers = {name.removeprefix(prefix): value for name, value in routed.items() if name.startswith(prefix)}
    lines = [""]
    if "dense_is" in results:
        lines += [f"dense is the {results['dense_is']} model with nothing skipped, not the base", ""]
    lines += [
        f"{'':<18}{'dense':>10}{'routed':>10}",
        f"{'held-out loss':<18}{dense['dense_loss']:>10.4f}{routed['eval_loss']:>10.4f}   ({rows} rows)",
        f"{'forward tokens/s':<18}{speed['dense']:>10.0f}{speed['routed']:>10.0f}   ({speed['ratio']:.2f}x)"
        if speed
        else f"{'forward tokens/s':<18}{'-':>10}{'-':>10}   (not measured where the weights are in parts)",
        f"{'capacity':<18}{1:>10.2f}{routed['eval_capacity']:>10.2f}   (share executed of the held-out rows)",
        f"{'skipped':<18}{0:>10.1%}{routed['eval_skipped']:>10.1%}   (of the layers' parameters, for a token; "
        f"of a prefill's FLOPs {routed['eval_flops_saved_512']:.1%} at 512 tokens, "
        f"{routed['eval_flops_saved_2048']:.1%} at 2048)",
    ]
    if results.get("use"):
        lines += _use(results["use"])
    lines += [
        "",
        *_by_layer(layers),
        "",
    ]
    if results.get("capacities"):
        lines += _at_capacities(results)
    if results.get("answers"):
        shown = _typical(results["answers"])
        lines += [
            "To a prompt of the held-out rows, of middling agreement:",
            f"prompt  {_on_one_line(shown['prompt'])}",
        ]
        lines += [f"{name:<8}{_on_one_line(shown[name])}" for name in ("dense", "routed")] + [""]
    return "\n".join(lines)


def _by_layer(shares: Mapping[str, float]) -> list[str]:
    """Return the lines of what each router executes; where layers have two, a line for each branch."""
    by_branch: dict[str, dict[str, float]] = {}
    for name, share in shares.items():
        layer, _, branch = name.partition(".")
        by_branch.setdefault(branch or "capacity", {})[layer] = share
    lines = ["layer     " + "".join(f"{layer:>6}" for layer in next(iter(by_branch.values())))]
    for branch, of_layers in by_branch.items():
        lines.append(f"{branch:<10}" + "".join(f"{value:>6.2f}" for value in of_layers.values()))
    return lines


def _use(use: Mapping[str, Any]) -> list[str]:
    """Return the lines of the figures of use, each beside what the dense model has by definition."""
    said = {
        "agreement": (1, f"of the dense answers' tokens, {use['prompts']} prompts"),
        "executed": (1, "share executed of prompts and answers, in generation"),
        "skipped": (0, "share of the layers' parameters that is not computed with there, for a token"),
        "foreign": (0, "nats a token that the answers are stranger to the dense model than its own"),
    }
    lines = []
    for name, (dense, meaning) in said.items():
        error = use[name]["stderr"]
        error = "" if error is None else f"± {error:.2f}, "
        lines.append(f"{name:<18}{dense:>10.2f}{use[name]['mean']:>10.2f}   ({error}{meaning})")
    return lines


def _at_capacities(results: Mapping[str, Any]) -> list[str]:
    """Return the lines of what the same checkpoint is at other capacities, `model.set_capacity(...)`."""
    lines = [
        "The same checkpoint set to other capacities:",
        f"{'capacity':<12}{'of rows':>9}{'in use':>9}{'skipped':>9}{'loss':>9}{'agreement':>11}{'forward':>9}",
    ]
    for capacity, of in sorted(results["capacities"].items(), reverse=True):
        use = {name: f"{figure['mean']:.2f}" for name, figure in of.get("use", {}).items() if name in USE}
        skipped = f"{of['use']['skipped']['mean']:.1%}" if "use" in of else "-"
        ratio = f"{of['forward_ratio']:.2f}x" if "forward_ratio" in of else "-"
        lines.append(
            f"{capacity:<12}{of['held_out']['eval_capacity']:>9.2f}{use.get('executed', '-'):>9}{skipped:>9}"
            f"{of['held_out']['eval_loss']:>9.3f}{use.get('agreement', '-'):>11}{ratio:>9}"
        )
    return [*lines, ""]


def _typical(answers: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """Return the answers of the median agreement: neither the best nor the worst."""
    return sorted(answers, key=lambda answer: answer["agreement"])[len(answers) // 2]


def _on_one_line(text: str, width: int = 300) -> str:
    text = " ".join(text.split())
    return text if len(text) <= width else f"{text[: width - 1]}…"
