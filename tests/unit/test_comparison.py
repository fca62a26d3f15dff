"""Runs put together over seeds, and compared with static dropping at equal capacity."""

import pytest

from utils.evaluation.comparison import best_of, comparison_table, increase_at, static_curve, summarize


def line(kind, capacity, increase, granularity="attn_sequence", target=0.75, seed=1, **more):
    return {
        "name": f"{kind}-{seed}",
        "kind": kind,
        "granularity": granularity,
        "target": target,
        "seed": seed,
        "settings": {},
        "capacity": capacity,
        "loss": 1.5 + increase,
        "loss_increase": increase,
    } | more


COSINE = [line("cosine", 0.9, 0.1, target=0.9), line("cosine", 0.7, 0.5)]


def test_static_dropping_is_one_line_through_the_dense_model():
    curve = static_curve(COSINE, "cosine", "attn_token")
    assert curve == [(0.7, 0.5), (0.9, 0.1), (1.0, 0.0)]
    assert increase_at(curve, 0.8) == pytest.approx(0.3)
    assert increase_at(curve, 0.95) == pytest.approx(0.05)
    assert increase_at(curve, 0.6) is None
    assert static_curve(COSINE, "cosine", "mlp_token") == static_curve(COSINE, "greedy", "attn_token") == []


def test_seeds_are_put_together_and_compared_at_the_capacity_they_reached():
    runs = [line("routed", 0.8, 0.15, seed=1), line("routed", 0.7, 0.30, seed=2), *COSINE]
    (routed,) = (s for s in summarize(runs) if s["kind"] == "routed")
    assert routed["seeds"] == [1, 2]
    assert routed["capacity"] == pytest.approx({"mean": 0.75, "min": 0.7, "max": 0.8})
    # each against dropping at its own capacity: 0.15 / 0.3 and 0.30 / 0.5
    assert routed["of_cosine"] == pytest.approx({"mean": 0.55, "min": 0.5, "max": 0.6})
    assert "of_greedy" not in routed
    table = comparison_table(summarize(runs))
    assert "| `attn_sequence` | routed | 0.75 | 2 | 0.750 (0.700 to 0.800) | +0.225 (+0.150 to +0.300) | 0.55" in table


def test_other_settings_are_other_rows_and_the_best_one_stands_in_the_figure():
    runs = [line("routed", 0.75, gain, settings={"learning rate": rate}) for rate, gain in ((1e-5, 0.4), (1e-4, 0.2))]
    runs.append(line("routed", 0.99, 0.01, settings={"learning rate": 0.0}))  # skips nothing, and is no better
    summaries = summarize([*runs, *COSINE])
    assert len(summaries) == 5
    assert "learning rate" in comparison_table(summaries).splitlines()[0]
    routed, *static = best_of(summaries)
    assert routed == {"name": "routed", "granularity": "attn_sequence", "capacity": 0.75, "loss_increase": 0.2}
    assert [(point["name"], point["granularity"]) for point in static] == [("cosine", "attn")] * 2


def test_tasks_are_compared_with_the_dense_model():
    runs = [line("routed", 0.75, 0.2, average=50.0, average_dense=52.0), line("routed", 0.9, 0.1, target=0.9)]
    table = comparison_table(summarize(runs))
    assert "| 50.0 | -2.0 |" in table
    assert "| - | - |" in table
