"""The data commands, run as a user runs them: their files, their words, their exit codes, and what a kill leaves."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

ROOT = Path(__file__).resolve().parents[2]
REFORMAT = ROOT / "entrypoints" / "data" / "reformat_datasets.py"
MIX = ROOT / "entrypoints" / "data" / "mix_datasets.py"
DOWNLOAD = ROOT / "entrypoints" / "data" / "download_datasets.py"
BENCHMARK = ROOT / "entrypoints" / "data" / "benchmark_data.py"


def command(script, *arguments):
    return [sys.executable, str(script), *map(str, arguments)]


def run(script, *arguments, cwd="/"):
    return subprocess.run(command(script, *arguments), capture_output=True, text=True, cwd=cwd, timeout=120)


def run_failing(script, *arguments):
    """Run a command that must fail as commands fail: one line on stderr."""
    done = run(script, *arguments)
    assert done.returncode == 1, done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    return done.stderr


def read_lines(path):
    return [json.loads(line) for line in path.read_bytes().decode().split("\n")[:-1]]


def names(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def chat(*senders):
    return [{"from": sender, "value": f"{sender} says {number}"} for number, sender in enumerate(senders)]


SHAREGPT = [
    {"id": "a_0", "conversations": chat("human", "gpt")},
    {"id": "a_1", "conversations": []},
    {"id": "a_0", "conversations": chat("gpt", "user", "bard")},
    {"id": "b_0", "conversations": chat("human", "bing")},
    {"id": "c_0", "conversations": chat("system", "human", "chatgpt", "gpt")},
]
EVOL = [{"idx": "x", "conversations": chat("human", "gpt")}, {"idx": "y", "conversations": chat("system", "human")}]
ORCA = [{"conversations": [{"weight": None, **turn} for turn in chat("system", "human", "gpt")]}]
MATH = [{"type": "t", "query": "1+1?", "original_question": "o", "response": "2"}]
CODE = [{"output": "pass", "instruction": "Do nothing in Python."}] * 2
ALPACA = [
    {"instruction": "Add.", "input": "1, 2", "output": "3", "text": "t"},
    {"instruction": "Say ü.", "input": "", "output": "ü\u2028", "text": "t"},
]


@pytest.fixture
def raw(tmp_path):
    """All six sets, as clones of their hub repositories look."""
    root = tmp_path / "raw"
    files = {
        "vicuna_sharegpt/ShareGPT_V3_unfiltered_cleaned_split_no_imsorry.json": json.dumps(SHAREGPT, indent=2),
        "vicuna_sharegpt/ShareGPT_V3_unfiltered_cleaned_split.json": "[]",
        "evol_instruct/WizardLM_evol_instruct_V2_143k.json": json.dumps(EVOL),
        "slim_orca/oo-labeled_correct.gpt4.sharegpt.jsonl": "".join(json.dumps(row) + "\n" for row in ORCA),
        "meta_math_qa/MetaMathQA-395K.json": json.dumps(MATH, indent=1),
        "evol_code_alpaca/train.jsonl": "\n".join(json.dumps(row) for row in CODE),
    }
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
        (root / name).with_name("README.md").write_text("---\nlicense: mit\n---\n")
    (root / "alpaca" / "data").mkdir(parents=True)
    shard = "train-00000-of-00001-a09b74b3ef9c3b56.parquet"
    pq.write_table(pa.Table.from_pylist(ALPACA), root / "alpaca" / "data" / shard)
    return root


@pytest.fixture
def endless(tmp_path):
    """A set that takes seconds to read: a small file of 1 GB of rows."""
    root = tmp_path / "raw"
    (root / "slim_orca").mkdir(parents=True)
    line = (json.dumps({"conversations": chat("human", "gpt")}) + "\n").encode()
    frame = zstandard.compress(line * 80_000)
    (root / "slim_orca" / "oo-labeled_correct.gpt4.sharegpt.jsonl.zst").write_bytes(frame * 100)
    return root


def test_reformat_writes_the_rows_of_all_six_sets_and_reports_the_others(raw, tmp_path):
    done = run(REFORMAT, "--raw_data_root", raw, "--save_path", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    rows = {name: read_lines(tmp_path / "out" / name / "data.jsonl") for name in os.listdir(raw)}
    ids = {name: [row["id"] for row in lines] for name, lines in rows.items()}
    assert ids == {
        "vicuna_sharegpt": [f"ShareGPT_Vicuna_unfiltered_{n}" for n in (0, 2, 4)],
        "evol_instruct": ["WizardLM_evol_instruct_V2_143k_0"],
        "slim_orca": ["SlimOrca_0"],
        "meta_math_qa": ["MetaMathQA_0"],
        "evol_code_alpaca": ["evol_codealpaca_v1_0", "evol_codealpaca_v1_1"],
        "alpaca": ["alpaca_0", "alpaca_1"],
    }
    assert rows["alpaca"][1] == {
        "dataset": "alpaca",
        "id": "alpaca_1",
        "messages": [{"role": "user", "content": "Say ü."}, {"role": "assistant", "content": "ü\u2028"}],
    }
    assert [m["role"] for m in rows["vicuna_sharegpt"][2]["messages"]] == ["system", "user", "assistant", "assistant"]
    report = json.loads((tmp_path / "out" / "report.json").read_text())["datasets"]
    assert report["vicuna_sharegpt"]["dropped"] == {"no_turns": 1, "bing_turn": 1}
    assert report["evol_instruct"]["dropped"] == {"system_turn": 1}
    assert report.pop("generic") == {"status": "absent"}
    assert {(entry["read"], entry["written"]) for entry in report.values()} == {(5, 3), (2, 1), (1, 1), (2, 2)}
    assert "bing_turn 1" in done.stdout
    assert done.stderr == ""


def test_reformat_lists_absent_sets_and_demands_named_ones(raw, tmp_path):
    for name in ("slim_orca", "alpaca"):
        for path in (raw / name).rglob("*.*"):
            path.unlink()
    done = run(REFORMAT, "--raw_data_root", "raw", "--save_path", "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "out" / "report.json").read_text())["datasets"]
    assert {name for name, entry in report.items() if entry["status"] == "absent"} == {
        *("slim_orca", "alpaca", "generic")
    }
    assert not (tmp_path / "out" / "alpaca").exists()

    error = run_failing(REFORMAT, "--raw_data_root", raw, "--save_path", tmp_path / "o", "--datasets", "alpaca")
    assert "alpaca: not there" in error
    error = run_failing(REFORMAT, "--raw_data_root", raw, "--save_path", tmp_path / "o", "--datasets", "alpacca")
    assert "did you mean 'alpaca'" in error
    assert "none of" in run_failing(REFORMAT, "--raw_data_root", ROOT / "configs", "--save_path", tmp_path / "o")
    assert not (tmp_path / "o").exists()


def test_a_damaged_set_is_an_error_with_its_place_and_the_others_are_written(raw, tmp_path):
    path = raw / "vicuna_sharegpt" / "ShareGPT_V3_unfiltered_cleaned_split_no_imsorry.json"
    path.write_text(path.read_text()[:-60])
    error = run_failing(REFORMAT, "--raw_data_root", raw, "--save_path", tmp_path / "out")
    assert f"{path}: row 4, byte {path.stat().st_size}: the file ends inside this row" in error
    others = {name for name in os.listdir(raw) if name != "vicuna_sharegpt"}
    assert names(tmp_path / "out") == sorted(["report.json", *(f"{name}/data.jsonl" for name in others)])
    report = json.loads((tmp_path / "out" / "report.json").read_text())["datasets"]
    assert {name for name, entry in report.items() if entry["status"] == "failed"} == {"vicuna_sharegpt"}

    options = ("--on_error", "skip", "--datasets", "vicuna_sharegpt")
    done = run(REFORMAT, "--raw_data_root", raw, "--save_path", tmp_path / "out", *options)
    assert done.returncode == 0, done.stderr
    entry = json.loads((tmp_path / "out" / "report.json").read_text())["datasets"]["vicuna_sharegpt"]
    assert (entry["read"], entry["written"], entry["faults"]) == (5, 2, {"truncated": 1})
    assert len(read_lines(tmp_path / "out" / "vicuna_sharegpt" / "data.jsonl")) == 2


def wait_for_output(folder):
    limit = time.monotonic() + 30
    while time.monotonic() < limit:
        if any(path.stat().st_size for path in folder.rglob(".data.jsonl.*.tmp")):
            return
        time.sleep(0.01)
    raise AssertionError("nothing was written")


def children(pid):
    found = subprocess.run(["ps", "-ww", "-o", "pid=,args=", "--ppid", str(pid)], capture_output=True, text=True).stdout
    return [int(line.split()[0]) for line in found.splitlines() if "spawn_main" in line]


@pytest.mark.parametrize(("kill", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_a_stopped_reformat_leaves_no_file_and_no_process(endless, tmp_path, kill, code):
    out = tmp_path / "out"
    arguments = ("--raw_data_root", endless, "--save_path", out)
    process = subprocess.Popen(
        command(REFORMAT, *arguments),
        start_new_session=True,
        stderr=subprocess.PIPE,
        text=True,
        # a shell starts its background jobs with Ctrl-C ignored, and the tests may run in one
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    wait_for_output(out)
    workers = children(process.pid)
    assert workers
    if kill == signal.SIGINT:
        os.killpg(process.pid, kill)  # as a terminal does
    else:
        process.send_signal(kill)
    _, error = process.communicate(timeout=30)
    assert process.returncode == code
    assert "Traceback" not in error
    limit = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in workers) and time.monotonic() < limit:
        time.sleep(0.05)
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)
    assert names(out) == []


def test_a_worker_that_is_killed_is_an_error_of_its_set(endless, tmp_path):
    out = tmp_path / "out"
    arguments = ("--raw_data_root", endless, "--save_path", out)
    process = subprocess.Popen(command(REFORMAT, *arguments), stderr=subprocess.PIPE, text=True)
    wait_for_output(out)
    (worker,) = children(process.pid)
    os.kill(worker, signal.SIGKILL)
    _, error = process.communicate(timeout=30)
    assert process.returncode == 1
    assert error.startswith("error: slim_orca: its process was killed by signal 9")
    assert not (out / "slim_orca" / "data.jsonl").exists()

    raw = endless / "slim_orca" / "oo-labeled_correct.gpt4.sharegpt.jsonl.zst"
    raw.write_bytes(zstandard.compress(json.dumps(ORCA[0]).encode()))
    assert run(REFORMAT, *arguments).returncode == 0
    assert names(out) == ["report.json", "slim_orca/data.jsonl"]  # and no longer what the killed worker had begun


@pytest.fixture
def reformatted(tmp_path):
    root = tmp_path / "reformatted"
    for name, count in {"vicuna_sharegpt": 10, "evol_instruct": 4, "slim_orca": 3, "meta_math_qa": 2}.items():
        (root / name).mkdir(parents=True)
        rows = [
            {"dataset": name, "id": f"{name}_{n}", "messages": [{"role": "user", "content": f"ü {n}"}]}
            for n in range(count)
        ]
        (root / name / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def test_mix_takes_each_row_as_often_as_its_portion_says(reformatted, tmp_path):
    portions = ("--portions", "vicuna_sharegpt=2.9", "evol_instruct=1", "slim_orca=0", "meta_math_qa=0.5")
    done = run(MIX, "--reformatted_dir", reformatted, "--save_path", tmp_path / "mixed", *portions)
    assert done.returncode == 0, done.stderr
    rows = read_lines(tmp_path / "mixed" / "data.jsonl")
    counts = Counter(row["id"] for row in rows)
    assert Counter(row["dataset"] for row in rows) == {"vicuna_sharegpt": 29, "evol_instruct": 4, "meta_math_qa": 1}
    assert sorted(counts[f"vicuna_sharegpt_{n}"] for n in range(10)) == [2] + [3] * 9
    manifest = json.loads((tmp_path / "mixed" / "manifest.json").read_text())
    assert manifest["rows"] == 34
    assert [entry["taken"] for entry in manifest["inputs"]] == [29, 4, 1]
    assert names(tmp_path / "mixed") == ["data.jsonl", "manifest.json"]


def test_mix_is_the_same_everywhere_and_follows_its_seed(reformatted, tmp_path):
    def mix(*arguments):
        done = run(MIX, "--reformatted_dir", reformatted, "--save_path", tmp_path / "mixed", *arguments)
        assert done.returncode == 0, done.stderr
        return json.loads((tmp_path / "mixed" / "manifest.json").read_text())["sha256"]

    portions = ("--portions", "vicuna_sharegpt=2.9", "evol_instruct=1")
    known = "549666d12ba91e7c685e30bcff86f0529d4a271cb980e4fbad1f25aa7a231bc8"
    assert mix(*portions) == known
    assert mix(*portions, "--seed", "233") == known
    assert mix(*portions, "--seed", "234") != known


def test_mix_dry_run_says_what_it_would_do_and_writes_nothing(reformatted, tmp_path):
    config = tmp_path / "mine.yaml"
    config.write_text("portions:\n  vicuna_sharegpt: 2.9\n  slim_orca: 1\n")
    done = run(MIX, "--reformatted_dir", reformatted, "--save_path", tmp_path / "m", "--config", config, "--dry_run")
    assert done.returncode == 0, done.stderr
    assert " 29\n" in done.stdout
    assert not (tmp_path / "m").exists()


def test_mix_without_one_of_its_sets_is_an_error_that_names_it(reformatted, tmp_path):
    error = run_failing(MIX, "--reformatted_dir", reformatted, "--save_path", tmp_path / "mixed")
    assert "evol_code_alpaca" in error  # the default mix has five sets
    assert not (tmp_path / "mixed").exists()


@pytest.mark.parametrize("script", [REFORMAT, MIX, DOWNLOAD, BENCHMARK], ids=lambda script: script.stem)
def test_help_explains_every_option_and_costs_no_seconds(script):
    start = time.monotonic()
    done = run(script, "--help")
    assert done.returncode == 0
    assert time.monotonic() - start < 5
    explained = done.stdout.split("options:")[1].split("\n  -")[1:]
    assert len(explained) >= 4
    assert all(len(option.split()) > 4 for option in explained)


def test_benchmark_measures_all_it_promises(tmp_path):
    small = ("--speed_mb", 1, "--repeats", 1, "--memory_mb", 1, "--mix_rows", 100)
    done = run(BENCHMARK, *small, "--work_dir", tmp_path, "--output", tmp_path / "results.json")
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    assert set(results["speed"]) == {"reformat", "plain json loop", "bare json.load"}
    assert len({way["rows"] for way in results["speed"].values()}) == 1
    assert 5 < results["reformat"]["peak_mib"] < 1024
    assert 5 < results["mix"]["peak_mib"] < 1024
    assert os.listdir(tmp_path) == ["results.json"]
