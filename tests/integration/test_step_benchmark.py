"""The benchmark of a training step, as a user runs it, on a tiny model."""

import json
import sys

from commands import run


def test_it_compares_the_step_with_the_straightforward_way_and_with_its_parts(workplace, repository, tmp_path):
    result = run(
        *(sys.executable, repository / "entrypoints/finetune/benchmark_step.py", workplace / "ckpt/tiny-mod"),
        *("--train_file", workplace / "data/alpaca/data.jsonl", "--grid", "2x64", "4x96", "--repeats", 2),
        *("--output", tmp_path / "step.json"),
        cwd=tmp_path,
    )
    assert result.stdout.strip().splitlines()[-1] == str(tmp_path / "step.json")
    written = json.loads((tmp_path / "step.json").read_text())
    assert [(cell["rows"], cell["length"]) for cell in written["cells"]] == [(2, 64), (4, 96)]
    for cell in written["cells"]:
        assert 0 < cell["supervised"] < cell["tokens"]
        assert all(seconds > 0 for seconds in cell["seconds"].values())
        # the head is nearly all there is of so small a model, and fewer than all positions are supervised
        assert cell["ratios"]["memory_to_straightforward"] < 0.7
