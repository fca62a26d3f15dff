"""A table of the paper for real: SmolLM2 is trained, evaluated and put into it, in a copy of the repository."""

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
from commands import run

QUESTIONS = [
    ("What do bees make?", ["honey", "coal", "glass", "salt"]),
    ("What is ice?", ["water", "wood", "oil", "sand"]),
]


def write_items(folder):
    """Two items of each task of the small scale."""
    folder.mkdir()
    labels = ["A", "B", "C", "D"]
    rows = {"arc_easy": [], "openbookqa": [], "hellaswag": [], "piqa": []}
    for question, answers in QUESTIONS:
        choices = {"text": answers, "label": labels}
        rows["arc_easy"].append({"question": question, "choices": choices, "answerKey": "A"})
        rows["openbookqa"].append({"question_stem": question, "choices": choices, "answerKey": "A"})
        context = {"activity_label": "Nature", "ctx_a": question, "ctx_b": "it is"}
        rows["hellaswag"].append(context | {"endings": answers, "label": "0"})
        rows["piqa"].append({"goal": question, "sol1": answers[0], "sol2": answers[1], "label": 0})
    for task, some in rows.items():
        (folder / f"{task}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))


@pytest.mark.slow
def test_a_table_is_made_once_and_what_fails_stops_nothing_else(tmp_path, repository):
    root = tmp_path / "repository"
    ignored = shutil.ignore_patterns(
        ".git", ".venv", ".venv-serve", ".cache", "__pycache__", "*.safetensors*", "outputs", "raw"
    )
    shutil.copytree(repository, root, ignore=ignored)
    for name in ("reformatted", "mixed"):
        shutil.rmtree(root / "data" / name, ignore_errors=True)
    write_items(tmp_path / "items")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"

    def reproduce(*arguments, check=True):
        settings = ["--max_train_samples", "24", "--limit", "2", "--data_dir", "items", "--output_dir", "out"]
        command = ["bash", root / "scripts/reproduce/table3.sh", *settings, "--publish", "kept", *arguments]
        return run(*command, cwd=tmp_path, PATH=path, check=check)

    done = reproduce("--runs", "router_tuning", "random")
    folder = tmp_path / "kept/small/table3"
    assert (folder / "table.md").read_text() == (tmp_path / "out/small/table3/table.md").read_text()
    assert done.stdout.strip().splitlines()[-1] == str(tmp_path / "out/small/table3/table.md")
    rows = {row["name"]: row["ours"] for row in json.loads((folder / "result.json").read_text())["rows"]}
    assert list(rows) == ["router_tuning", "random"]
    for numbers in rows.values():
        assert {"average", "loss", "capacity", "loss_increase", "piqa"} <= numbers.keys()
    table = (folder / "table.md").read_text()
    assert str(tmp_path) not in table
    assert "--runs router_tuning random --data_dir FOLDER`" in table
    assert "Trained on the embedded sample." in table

    again = reproduce("--runs", "router_tuning", "random")
    assert again.stderr.count("done before") == 8
    assert "about" not in again.stderr

    # a file in the way of the baseline: its run fails, the other two are in the table, and nothing is published
    listed = reproduce("--dry_run", check=False).stdout
    (baseline,) = (line for line in listed.splitlines() if "build_baseline.py cosine" in line)
    checkpoint = Path(baseline.split("--output_dir ")[1].split()[0])
    checkpoint.mkdir(parents=True)
    (checkpoint / "other").touch()
    before = (folder / "table.md").read_bytes()
    failed = reproduce(check=False)
    assert failed.returncode == 1
    assert failed.stderr.strip().splitlines()[-1].startswith("error: 1 of ")
    assert (folder / "table.md").read_bytes() == before
    table = (tmp_path / "out/small/table3/table.md").read_text()
    assert "**Failed**: layer_drop." in table
    assert "| random | " in table
