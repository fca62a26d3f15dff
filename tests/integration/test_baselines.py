"""Baselines are ordinary checkpoints that leave out what they say."""

import json
import logging
import sys

import pytest

from entrypoints.checkpoint.build_baseline import main
from utils.evaluation.inspection import inspect_checkpoint
from utils.io.errors import UserError
from utils.model.checkpoint import load_mod_model, read_units

STATIC = ("cosine", "greedy")


@pytest.fixture
def build(workplace, tmp_path, monkeypatch):
    """Run the command in this process; its output is `tmp_path / "out"`."""

    def start(kind, *arguments):
        given = ("--model_name_or_path", workplace / "ckpt/tiny-mod", "--output_dir", tmp_path / "out")
        text = ("--train_file", workplace / "data/alpaca/data.jsonl", "--rows", 12, "--max_seq_length", 96)
        monkeypatch.setattr(sys, "argv", ["build_baseline.py", kind, *map(str, (*given, *text, *arguments))])
        main()

    return start


@pytest.mark.parametrize("kind", ["cosine", "greedy", "random", "dlo", "skip_transformer"])
def test_a_baseline_is_a_checkpoint_at_its_capacity(build, tmp_path, capsys, caplog, kind):
    caplog.set_level(logging.INFO)
    build(kind, "--capacity", 0.667, *(("--granularity", "mlp_token") if kind in ("dlo", "skip_transformer") else ()))
    assert capsys.readouterr().out.strip().splitlines()[-1] == str(tmp_path / "out")
    mod = json.loads((tmp_path / "out/config.json").read_text())["mod"]
    assert mod["target_capacity"] == 0.667
    results = json.loads((tmp_path / "out/results.json").read_text())["held_out"]
    assert results["routed"]["eval_capacity"] == pytest.approx(2 / 3, abs=1e-6 if kind in STATIC else 0.2)
    layers = inspect_checkpoint(tmp_path / "out", [96])["trained"]["layers"]
    assert sum(layers.values()) / len(layers) == pytest.approx(results["routed"]["eval_capacity"])
    routers = load_mod_model(tmp_path / "out").router_modules().values()
    if kind not in STATIC:
        assert any(router.weight.any() for router in routers)
        assert f"{kind} routers execute 0.6" in caplog.text
        assert set(read_units(tmp_path / "out")) == {2, 3, 4}
    else:
        assert sorted(mod["threshold"]) == [0.5, 0.5, 0.75]
        assert not any(router.weight.any() for router in routers)


@pytest.mark.parametrize(
    ("arguments", "message"), [(("--capacity", "2"), "capacity 2.0 must lie"), (("--rows", "0"), "rows 0 must be")]
)
def test_a_mistake_ends_in_one_line(build, tmp_path, arguments, message):
    with pytest.raises(UserError, match=message):
        build("cosine", *arguments)
    assert not (tmp_path / "out").exists()
