"""Baselines are ordinary checkpoints that leave out what they say."""

import json
import logging
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file

from entrypoints.checkpoint.build_baseline import main
from utils.evaluation.inspection import inspect_checkpoint
from utils.io.errors import UserError
from utils.model.checkpoint import SUBSTITUTES_FILE, load_mod_model, read_units
from utils.pipeline.answers import SHORT_PROMPTS

STATIC = ("cosine", "greedy")
NO_USE = ("--max_use_prompts", 0)


@pytest.fixture
def build(workplace, tmp_path, monkeypatch):
    """Run the command in this process; its output is `tmp_path / "out"`."""

    def start(kind, *arguments):
        given = ("--model_name_or_path", workplace / "ckpt/tiny-mod", "--output_dir", tmp_path / "out")
        text = ("--train_file", workplace / "data/alpaca/data.jsonl", "--rows", 12, "--max_seq_length", 96)
        monkeypatch.setattr(sys, "argv", ["build_baseline.py", kind, *map(str, (*given, *text, *arguments))])
        main()

    return start


@pytest.mark.parametrize(
    "kind", ["cosine", pytest.param("greedy", marks=pytest.mark.slow), "random", "dlo", "skip_transformer"]
)
def test_a_baseline_is_a_checkpoint_at_its_capacity(build, tmp_path, capsys, caplog, kind):
    caplog.set_level(logging.INFO)
    build(
        kind,
        "--capacity",
        0.667,
        *NO_USE,
        *(("--granularity", "mlp_token") if kind in ("dlo", "skip_transformer") else ()),
    )
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


def test_what_a_static_baseline_skips_returns_a_fitted_map(build, tmp_path):
    build("greedy", "--capacity", 0.667, "--substitute", "linear", "--substitute_rank", 4, "--max_use_prompts", 2)
    mod = json.loads((tmp_path / "out/config.json").read_text())["mod"]
    assert mod["substitute"] == {"kind": "linear", "rank": 4}
    assert sorted(mod["threshold"]) == [0.5, 0.5, 0.75]
    maps = load_file(tmp_path / "out" / SUBSTITUTES_FILE)
    assert len(maps) == 3 * 3
    assert all(parameter.any() for parameter in maps.values())
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert results["held_out"]["routed"]["eval_capacity"] == pytest.approx(2 / 3, abs=1e-6)
    assert results["use"]["executed"]["mean"] == pytest.approx(2 / 3, abs=1e-6)
    assert 0 <= results["use"]["agreement"]["mean"] <= 1
    assert [set(answer) >= {"prompt", "dense", "routed"} for answer in results["answers"]] == [True, True]
    assert set(results["forward_tokens_per_second"]) == {"dense", "routed", "ratio"}
    model, layer = load_mod_model(tmp_path / "out"), mod["layers"][mod["threshold"].index(0.75)]
    assert torch.equal(model.substitute_modules()[layer].down, maps[f"model.layers.{layer}.substitute.down"])


@pytest.mark.parametrize("pooling", ["prompt", pytest.param("all", marks=pytest.mark.slow)])
def test_thresholds_are_set_on_answered_prompts_decided_on_as_the_label_says(
    build, workplace, tmp_path, monkeypatch, pooling
):
    import utils.pipeline.calibration as calibration

    seen, calibrate = [], calibration.calibrate

    def watched(model, batches, *arguments, **options):
        seen.extend(batches)
        return calibrate(model, batches, *arguments, **options)

    monkeypatch.setattr(calibration, "calibrate", watched)
    labelled = tmp_path / "labelled"
    shutil.copytree(workplace / "ckpt/tiny-mod", labelled)
    config = json.loads((labelled / "config.json").read_text())
    config["mod"] |= {"sequence_pooling": pooling} if pooling == "all" else {}
    (labelled / "config.json").write_text(json.dumps(config))
    build("random", "--model_name_or_path", labelled, *NO_USE)
    assert json.loads((tmp_path / "out/config.json").read_text())["mod"]["sequence_pooling"] == pooling
    prompts, dense = [], load_mod_model(labelled).eval()
    for batch in seen:
        real, answer = batch["attention_mask"].bool(), batch["labels"] != -100
        assert torch.equal(batch["token_mask"], real & ~answer if pooling == "prompt" else real)
        for ids, kept, mine in zip(batch["input_ids"], real, answer, strict=True):
            prompt = ids[kept & ~mine][None]
            prompts.append(prompt)
            options = {"max_new_tokens": 2, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
            written = dense.generate(prompt, attention_mask=torch.ones_like(prompt), route=False, **options)
            assert written[0, prompt.shape[1]] == ids[kept & mine][0]
    assert len(prompts) == SHORT_PROMPTS


@pytest.mark.slow
def test_a_checkpoint_with_substitutes_is_a_base_like_any_other(build, tmp_path):
    build("random", "--substitute", "linear", *NO_USE)
    assert "use" not in json.loads((tmp_path / "out/results.json").read_text())
    trained = tmp_path / "out"
    for arguments, rank in (((), None), (("--substitute", "linear", "--substitute_rank", 3), 3)):
        again = tmp_path / f"rank {rank}"
        build("cosine", "--model_name_or_path", trained, "--output_dir", again, *NO_USE, *arguments)
        settings = load_mod_model(again).mod_settings
        assert (settings.substitute or {}).get("rank") == rank
        assert (again / SUBSTITUTES_FILE).exists() == (rank is not None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--capacity", "2"), "capacity 2.0 must be above 0 and at most 1"),
        (("--capacity", "0"), "capacity 0.0 must be above 0 and at most 1"),
        (("--rows", "0"), "rows 0 must be"),
        (("--substitute", "linear", "--substitute_rank", "0"), "rank 0 must lie between 1 and the hidden size, 16"),
        (("--substitute", "linear", "--substitute_rank", "17"), "rank 17 must lie between 1 and the hidden size, 16"),
        (("--substitute_rank", "4"), "substitute_rank needs --substitute linear"),
        (("--max_use_prompts", "-1"), "max_use_prompts -1 must not be"),
    ],
)
def test_a_mistake_ends_in_one_line(build, tmp_path, arguments, message):
    with pytest.raises(UserError, match=message):
        build("cosine", *arguments)
    assert not (tmp_path / "out").exists()


def test_too_few_rows_to_fit_end_in_one_line(build, smollm2_dir, tmp_path):
    turns = [{"role": "user", "content": "Is it?"}, {"role": "assistant", "content": "No."}]
    rows = [json.dumps({"messages": [{"role": "system", "content": str(n)}, *turns]}) for n in range(3)]
    (tmp_path / "few.jsonl").write_text("\n".join(rows))
    given = ("--model_name_or_path", smollm2_dir, "--train_file", tmp_path / "few.jsonl", "--substitute", "linear")
    with pytest.raises(UserError, match=r"the 2 training rows have \d+ tokens, and a fit needs 576"):
        build("cosine", *given)
    assert not (tmp_path / "out").exists()


def test_methods_without_substitutes_refuse_them(build):
    with pytest.raises(UserError, match="substitute linear is not for dlo"):
        build("dlo", "--substitute", "linear")
