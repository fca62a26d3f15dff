"""Figures of use as a command, on a tiny model: what it prints, writes and refuses."""

import json
import runpy
import sys

import pytest


@pytest.fixture
def use(repository, monkeypatch, capsys):
    def start(*arguments):
        program = repository / "entrypoints/evaluation/use.py"
        monkeypatch.setattr(sys, "argv", [str(program), *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_code:
            runpy.run_path(str(program), run_name="__main__")
        return exit_code.value.code, capsys.readouterr()

    return start


def test_held_out_rows_of_the_sample_are_answered_and_written_down(use, workplace, tmp_path):
    output = tmp_path / "use.json"
    checkpoint = workplace / "ckpt/tiny-mod"
    code, printed = use(
        checkpoint, "--max_prompts", 3, "--max_new_tokens", 4, "--show", "--device", "cpu", "--output", output
    )
    assert code == 0, printed.err
    assert printed.out.splitlines()[-1] == str(output)
    assert printed.out.count("\ndense: ") == printed.out.count("\nrouted: ") == 3
    # routers at zero keep everything
    row = printed.out.splitlines()[-2].replace(" ± ", "±").split()
    assert row == ["tiny-mod", "1.000±0.000", "1.000±0.000", "0.000±0.000", "0.000±0.000", "3"]
    written = json.loads(output.read_text())
    assert written["arguments"]["max_new_tokens"] == 4
    assert set(written["versions"]) == {"python", "torch", "transformers"}
    found = written["checkpoints"][str(checkpoint)]
    assert found["use"]["prompts"] == len(found["answers"]) == 3
    assert found["use"]["agreement"] == {"mean": 1.0, "stderr": 0.0}


@pytest.mark.parametrize(
    ("checkpoint", "rows", "message"),
    [
        ("base", None, "base: a dense model routes nothing; name a MoD checkpoint"),
        ("nowhere", None, "nowhere: no such model directory"),
        ("ckpt/tiny-mod", [], "rows.jsonl: is empty"),
        ("ckpt/tiny-mod", [{"role": "assistant", "content": "Hi"}], "rows.jsonl: no prompts: 1 left out: no user's"),
        ("ckpt/tiny-mod", [{"role": "user", "content": "word " * 3000}], "rows.jsonl: prompt 1 of 1"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_line(use, workplace, tmp_path, checkpoint, rows, message):
    arguments = [workplace / checkpoint, "--device", "cpu", "--output", tmp_path / "use.json"]
    if rows is not None:
        (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": rows}) if rows else "")
        arguments += ["--prompts", tmp_path / "rows.jsonl"]
    code, printed = use(*arguments)
    assert code == 1
    (line,) = printed.err.strip().splitlines()
    assert message in line
    assert not (tmp_path / "use.json").exists()


def test_a_missing_file_is_one_line(use, workplace, tmp_path):
    code, printed = use(workplace / "ckpt/tiny-mod", "--device", "cpu", "--prompts", tmp_path / "none.jsonl")
    assert code == 1
    assert printed.err.startswith(f"error: {tmp_path / 'none.jsonl'}: no such file")
    assert len(printed.err.splitlines()) == 1
