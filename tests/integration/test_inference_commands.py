"""The benchmark and the terminal generation as commands, on a tiny model: what they print, write and refuse."""

import json
import re
import subprocess
import sys

import pytest
from commands import run


@pytest.fixture
def benchmark(workplace, repository):
    def start(*arguments, check=True):
        program = repository / "entrypoints/evaluation/benchmark.py"
        return run(sys.executable, program, workplace / "ckpt/tiny-mod", *arguments, cwd=workplace, check=check)

    return start


@pytest.fixture
def generate(workplace, repository):
    def start(*arguments, stdin=""):
        program = repository / "entrypoints/inference/generate.py"
        command = [sys.executable, program, workplace / "ckpt/tiny-mod", *arguments]
        return subprocess.run([str(part) for part in command], input=stdin, capture_output=True, text=True)

    return start


@pytest.mark.parametrize("granularity", ["attn_sequence", "block_token"])
def test_the_benchmark_writes_all_columns_of_each_cell(benchmark, tmp_path, granularity):
    output = tmp_path / "result.json"
    result = benchmark(
        *("--grid", "1x24", "4x16", "--decode_tokens", 9, "--repeats", 2, "--threads", 1),
        *("--granularity", granularity, "--random_share", 0.5, "--output", output),
    )
    assert result.stdout.strip().splitlines()[-1] == str(output)
    assert result.stdout.count("prefill, batch") == result.stdout.count("decode, batch") == 2
    assert "sparse equals dense" in result.stderr
    written = json.loads(output.read_text())
    assert written["routing"]["granularity"] == granularity
    assert [(cell["batch"], cell["length"]) for cell in written["cells"]] == [(1, 24), (4, 16)]
    for cell in written["cells"]:
        assert list(cell["columns"]) == [
            "dense",
            "all_kept",
            "tuned",
            "random",
            "share_alone",
            "all_skipped",
            "oracle",
        ]
        for column in cell["columns"].values():
            assert column["kv_bytes"] > 0
            assert column["peak_memory_bytes"] > 0
            for phase in ("prefill", "decode"):
                assert len(column[phase]["raw_seconds"]) == 2
                interval = column[phase]["to_dense"]
                assert interval["low"] <= interval["median"] <= interval["high"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--text_file", "nowhere.txt"), "nowhere.txt: no such file"),
        (("--grid", "1x99999"), "give a longer text_file"),
        (("--granularity", "attn_sentence"), "granularity 'attn_sentence' is not one of"),
        (("--grid", "512"), "'512' is not of the form BATCHxLENGTH"),
        (("--random_share", "2"), "2 is not between 0 and 1"),
        (("--repeats", "0"), "--repeats 0 must be at least 1"),
    ],
)
def test_the_benchmark_refuses_in_one_line(benchmark, arguments, message):
    result = benchmark(*arguments, check=False)
    assert result.returncode != 0
    assert message in result.stderr.strip().splitlines()[-1]
    assert "Traceback" not in result.stderr


def test_an_answer_is_followed_by_what_each_layer_executed_and_by_speed(generate):
    result = generate("--prompt", "Hi", "--max_new_tokens", 5, "--compare_dense")
    assert result.returncode == 0, result.stderr
    routed, dense = result.stdout.split("--- dense\n")
    assert routed.startswith("--- routed\n")
    assert [line.split()[:2] for line in routed.splitlines() if re.match(r" +\d", line)] == [
        [layer, "1.00"] for layer in ("2", "3", "4")
    ]
    # routers at zero keep everything: the same text, and as many bytes
    assert re.search(r"KV cache (\d+) bytes", routed)[1] == re.search(r"KV cache (\d+) bytes", dense)[1]
    assert "generated at" in dense


def test_a_chat_goes_on_until_an_empty_line(generate):
    result = generate("--max_new_tokens", 3, "--temperature", 0.8, stdin="Hi\nAnd now?\n\nunread\n")
    assert result.returncode == 0, result.stderr
    read = [int(count) for count in re.findall(r"(\d+) tokens read", result.stdout)]
    assert len(read) == 2
    assert read[1] > read[0] + 3


def test_a_raw_prompt_is_continued_as_it_is(generate):
    result = generate("--prompt", "one two three", "--raw", "--max_new_tokens", 2)
    assert "3 tokens read" in result.stdout, result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--raw",), "--raw continues a --prompt"),
        (("--prompt", "x", "--max_new_tokens", "0"), "--max_new_tokens 0 must be at least 1"),
        (("--prompt", "x", "--temperature", "-1"), "--temperature -1.0 must not be negative"),
    ],
)
def test_generation_refuses_in_one_line(generate, arguments, message):
    result = generate(*arguments)
    assert result.returncode != 0
    assert message in result.stderr.strip().splitlines()[-1]


def test_a_missing_checkpoint_is_one_line(repository, tmp_path):
    for program in ("evaluation/benchmark.py", "inference/generate.py"):
        result = run(sys.executable, repository / "entrypoints" / program, tmp_path / "none", check=False)
        assert result.returncode == 1
        assert result.stderr.strip() == f"error: {tmp_path / 'none'}: no such model directory"
