"""Evaluation with the real lm-evaluation-harness: scores, local data, resuming, and what is refused."""

import json
import runpy
import shlex
import shutil
import subprocess
import sys

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.models.huggingface import HFLM

from utils.evaluation.harness import identify_base
from utils.evaluation.lm_eval_model import MoDLM
from utils.evaluation.tasks import find_tasks, prepare_hub_tasks, prepare_local_tasks, read_table
from utils.io.errors import UserError
from utils.model.checkpoint import load_mod_model, load_tokenizer, make_settings, read_config, write_checkpoint
from utils.model.configuration_mod import MoDSettings

RTE = [
    ("The bridge was closed in March for repairs.", "The bridge was open all spring.", 1),
    ("Anna sold her boat to her brother.", "Anna's brother bought a boat.", 0),
    ("No ship left the harbour during the storm.", "Ships left the harbour in the storm.", 1),
    ("The library lends maps, books and games.", "Maps can be borrowed from the library.", 0),
    ("Rain is expected in the north tomorrow.", "It will rain in the north.", 0),
]
PIQA = [
    ("To dry a wet book,", "stand it open near a fan.", "put it into a bucket of water.", 0),
    ("To see in the dark,", "close both eyes.", "switch on a torch.", 1),
    ("To keep soup warm,", "leave it uncovered on the balcony in winter.", "put a lid on the pot.", 1),
    ("To sharpen a pencil", "turn it in a sharpener.", "turn it in a cup of tea.", 0),
]
SAYINGS = [  # short contexts, long continuations
    ("Tides", " rise and fall twice a day, because the moon draws the water of the oceans towards itself"),
    ("12", " + 30 = 42, and 42 / 6 = 7, so that 7 * 6 - 30 is 12 again"),
    ("def", " add(first, second):\n    return first + second  # of two numbers"),
]
MMLU = {
    "anatomy": [("Which organ pumps blood?", 2), ("How many lungs has a person?", 1), ("Which is a bone?", 0)],
    "astronomy": [("Which body is a star?", 3), ("What orbits the Earth?", 0)],
}
GSM8K = [("Tom has 2 apples and buys 3. How many has he?", "2 + 3 = 5\n#### 5"), ("What is 6 times 7?", "#### 42")]


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    """Local files as a user would have them; examples for GSM8K only."""
    root = tmp_path_factory.mktemp("data")

    def write(name, rows):
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    write("rte", [{"sentence1": a, "sentence2": b, "label": label} for a, b, label in RTE])
    write("piqa", [{"goal": goal, "sol1": a, "sol2": b, "label": label} for goal, a, b, label in PIQA])
    choices = ["the first", "the second", "the third", "the fourth"]
    write(
        "mmlu",
        [
            {"subject": subject, "question": question, "choices": choices, "answer": answer}
            for subject, items in MMLU.items()
            for question, answer in items
        ],
    )
    write("gsm8k", [{"question": question, "answer": answer} for question, answer in GSM8K])
    write("gsm8k_shots", [{"question": f"What is {n} plus 1?", "answer": f"#### {n + 1}"} for n in range(6)])
    return root


def with_routers(source, directory, settings, scale, seed=1, num_experts=1):
    """Write a checkpoint whose routers decide differently for different inputs."""
    generator = torch.Generator().manual_seed(seed)
    size = read_config(source)["hidden_size"]
    routers = {
        f"model.layers.{layer}.router.weight": scale * torch.randn(num_experts, size, generator=generator)
        for layer in settings.layers
    }
    write_checkpoint(directory, source, settings, routers)
    return directory


@pytest.fixture(scope="module")
def checkpoint(workplace):
    settings = make_settings(read_config(workplace / "ckpt/tiny-mod"))
    return with_routers(workplace / "base", workplace / "ckpt/mixed", settings, scale=1.0)


def test_an_adapter_makes_another_base(checkpoint, tmp_path):
    adapted = shutil.copytree(checkpoint, tmp_path / "adapted")
    assert identify_base(adapted) == identify_base(checkpoint)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (adapted / name).write_text("{}")
    assert identify_base(adapted) != identify_base(checkpoint)


def requests():
    """Log-likelihood requests of many lengths; two differ in their last token alone, one continuation is long."""
    pairs = [(f"{a}\nQuestion: {b} True or False?\nAnswer:", c) for a, b, _ in RTE for c in (" True", " False")]
    pairs += [(f"Question: {goal}\nAnswer:", f" {answer}") for goal, *answers, _ in PIQA for answer in answers]
    pairs += SAYINGS
    return [Instance("loglikelihood", {}, pair, index) for index, pair in enumerate(pairs)]


def scores(model, some=None):
    return [score for score, _ in model.loglikelihood(requests()[:some], disable_tqdm=True)]


@pytest.mark.parametrize("granularity", ["attn_sequence", "mlp_sequence", "block_sequence", "block_token"])
def test_at_any_batch_size_scores_are_those_of_hf_at_batch_size_one(workplace, tmp_path, granularity):
    settings = MoDSettings(granularity, (2, 3, 4))
    directory = with_routers(workplace / "base", tmp_path / "mod", settings, scale=1.0)
    model, tokenizer = load_mod_model(directory).eval(), load_tokenizer(directory)
    expected = scores(HFLM(model, tokenizer=tokenizer, batch_size=1))
    for batch_size in (1, 4, 16):
        routed = MoDLM(model, tokenizer, batch_size=batch_size)
        found = scores(routed)
        capacity = routed.meter.read()
        routed.meter.close()
        assert 0.1 < capacity["capacity"] < 0.9
        assert found == pytest.approx(expected, abs=1e-4)
    if settings.level == "sequence":
        assert scores(HFLM(model, tokenizer=tokenizer, batch_size=16)) != pytest.approx(expected, abs=1e-2)
    dense = scores(MoDLM(model, tokenizer, batch_size=4, route=False))
    assert dense == pytest.approx(scores(MoDLM(workplace / "base", device="cpu", batch_size=1)), abs=1e-4)
    assert dense != pytest.approx(expected, abs=1e-2)


@pytest.mark.parametrize("granularity", ["attn_sequence", "block_sequence"])
def test_pooling_the_context_decides_as_generation_does(workplace, tmp_path, granularity):
    directory = with_routers(workplace / "base", tmp_path / "mod", MoDSettings(granularity, (2, 3, 4)), scale=1.0)
    model, tokenizer = load_mod_model(directory).eval(), load_tokenizer(directory)
    expected = []
    for request in requests():
        context = tokenizer(request.args[0]).input_ids
        continuation = tokenizer(request.args[0] + request.args[1]).input_ids[len(context) :]
        with torch.no_grad():
            output = model(torch.tensor([context]), use_cache=True)
            logits = [output.logits[0, -1]]
            for token in continuation[:-1]:
                output = model(torch.tensor([[token]]), past_key_values=output.past_key_values)
                logits.append(output.logits[0, -1])
        log_probabilities = torch.stack(logits).log_softmax(dim=-1)
        expected.append(float(log_probabilities[range(len(continuation)), continuation].sum()))
    for batch_size in (1, 4, 16):
        assert scores(MoDLM(model, tokenizer, pool="context", batch_size=batch_size)) == pytest.approx(
            expected, abs=1e-4
        )
    assert scores(MoDLM(model, tokenizer, batch_size=4)) != pytest.approx(expected, abs=1e-2)


def test_requests_that_are_too_long_are_cut_as_the_harness_cuts_them(checkpoint, caplog):
    model, tokenizer = load_mod_model(checkpoint).eval(), load_tokenizer(checkpoint)
    some = -len(SAYINGS)  # whose continuations are too long themselves
    expected = scores(HFLM(model, tokenizer=tokenizer, batch_size=1, max_length=24), some)
    for batch_size in (1, 4):
        found = scores(MoDLM(model, tokenizer, batch_size=batch_size, max_length=24), some)
        assert found == pytest.approx(expected, abs=1e-4)
    assert "requests are cut on the left to 24 tokens" in caplog.text


def test_the_harness_makes_it_by_its_registered_name(checkpoint):
    model = get_model("mod").create_from_arg_string(
        f"pretrained={checkpoint},pool=context", {"batch_size": 2, "max_batch_size": None, "device": "cpu"}
    )
    assert isinstance(model, MoDLM)
    model.loglikelihood(requests()[:3], disable_tqdm=True)
    assert model.meter.read()["inputs"] == 2  # two requests have one context
    for arguments, message in (("pool=contxt", "pool 'contxt'"), ("batch_size=auto", "batch_size 'auto'")):
        with pytest.raises(UserError, match=message):
            get_model("mod").create_from_arg_string(f"pretrained={checkpoint},{arguments}", {"device": "cpu"})


def test_capacity_counts_each_decision_once_and_no_padding(workplace, tmp_path):
    for granularity in ("attn_sequence", "attn_token"):
        settings = MoDSettings(granularity, (2, 3, 4))
        directory = with_routers(workplace / "base", tmp_path / granularity, settings, scale=1.0)
        model, tokenizer = load_mod_model(directory).eval(), load_tokenizer(directory)
        inputs = {tuple(tokenizer(r.args[0] + r.args[1]).input_ids[:-1]) for r in requests()}
        with torch.no_grad():
            gates = [model(torch.tensor([list(tokens)])).router_gates.flatten(1) for tokens in sorted(inputs)]
        for pool in ("all", "context") if granularity == "attn_token" else ("all",):
            routed = MoDLM(model, tokenizer, pool=pool, batch_size=4)
            scores(routed)
            counted = routed.meter.read()
            routed.meter.close()
            joined = torch.cat(gates, dim=1)
            assert counted["inputs"] == joined.shape[1]
            assert list(counted["layers"]) == [2, 3, 4]
            assert list(counted["layers"].values()) == pytest.approx(joined.mean(dim=1).tolist(), abs=1e-6)
            assert routed.meter.read() is None


@pytest.fixture
def evaluate(repository, data_dir, tmp_path, monkeypatch, capfd, caplog):
    """Runs the command in this process; returns its exit code, what it printed, and errors with what it logged."""

    def start(checkpoint, *arguments, data=True, output_dir=tmp_path / "out"):
        entrypoint = repository / "entrypoints/evaluation/evaluate.py"
        command = [entrypoint, checkpoint, "--device", "cpu", "--output_dir", output_dir, *arguments]
        command += ["--data_dir", data_dir] if data else []
        monkeypatch.setattr(sys, "argv", [str(part) for part in command])
        with pytest.raises(SystemExit) as exit_code:
            runpy.run_path(str(entrypoint), run_name="__main__")
        printed, logged = capfd.readouterr(), caplog.text
        caplog.clear()
        return exit_code.value.code, printed.out, logged + printed.err

    return start


def written(out):
    with open(out.strip().splitlines()[-1], encoding="utf-8") as file:
        return json.load(file)


def test_the_command_prints_the_columns_goes_on_and_keeps_the_dense_base(evaluate, checkpoint, workplace, tmp_path):
    code, out, error = evaluate(checkpoint, "--tasks", "rte")
    assert code == 0, error
    first = written(out)["rows"]

    code, out, error = evaluate(checkpoint, "--tasks", "rte", "mmlu", "gsm8k", "piqa", "--output", tmp_path / "r.json")
    assert code == 0, error
    assert error.count("RTE: done before") == 2  # dense and routed
    heads = out.splitlines()[0].split()
    assert heads == ["MMLU", "PIQA", "RTE", "GSM8K", "average", "(3)", "without", "RTE", "(2)"]
    assert [line.split()[0] for line in out.splitlines()[1:9]] == [
        *("dense", "+-", "routed", "+-", "capacity", "skipped", "shots", "items")
    ]
    result = written(out)
    for name, row in result["rows"].items():
        assert row["rte"] == first[name]["rte"]
        assert {task: values["items"] for task, values in row.items()} == {"mmlu": 5, "piqa": 4, "rte": 5, "gsm8k": 2}
        assert row["mmlu"]["shots"] == 1
        assert row["mmlu"]["data"] == "a local file; examples are other items"
        assert row["gsm8k"]["shots"] == 5
        assert row["piqa"]["stderr"] > 0
    mean = result["averages"]["routed"][0]
    values = [result["rows"]["routed"][task]["value"] for task in ("mmlu", "piqa", "rte")]
    assert mean["value"] == pytest.approx(sum(values) / 3)
    assert result["rows"]["dense"]["rte"]["capacity"] is None
    executed = [task["capacity"]["capacity"] for task in result["rows"]["routed"].values()]
    assert 0 < min(executed) < max(executed) <= 1
    # the dense base itself has been evaluated by now; another pool is another evaluation
    code, out, error = evaluate(workplace / "base", "--tasks", "rte", "piqa")
    assert code == 0, error
    assert error.count("done before") == 2
    assert written(out)["rows"]["dense"] == {task: result["rows"]["dense"][task] for task in ("rte", "piqa")}
    code, out, error = evaluate(checkpoint, "--tasks", "piqa", "--pool", "context", "--no_dense", "--limit", 3)
    assert code == 0, error
    assert "done before" not in error
    assert written(out)["rows"]["routed"]["piqa"]["items"] == 3
    assert written(out)["lm_eval"]["piqa"].endswith(" --limit 3")


def test_the_harness_own_command_line_knows_the_model(evaluate, checkpoint, repository, tmp_path):
    code, out, error = evaluate(checkpoint, "--tasks", "rte", "--no_dense")
    assert code == 0, error
    result = written(out)
    command = result["lm_eval"]["rte"].replace("--model hf --batch_size 1", "--model mod --batch_size 4")
    assert "--model mod" in command
    arguments = [*shlex.split(command)[1:], "--device", "cpu", "--output_path", tmp_path / "own"]
    done = subprocess.run(
        [sys.executable, repository / "entrypoints/evaluation/harness.py", *arguments],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    (path,) = (tmp_path / "own").rglob("results_*.json")
    own = json.loads(path.read_text())["results"]["local_rte"]
    assert own["acc,none"] == result["rows"]["routed"]["rte"]["value"]


def test_local_tasks_are_the_built_in_ones_but_for_their_data(repository, data_dir, tmp_path):
    table = read_table(repository / "configs/evaluation/table1.yaml", ["rte", "mmlu", "gsm8k"])
    built_in = find_tasks(table.columns)
    prepared = prepare_local_tasks(table.columns, built_in, data_dir, tmp_path)
    local = find_tasks(table.columns, include=tmp_path)
    data = {"dataset_path", "dataset_name", "dataset_kwargs", "num_fewshot", "task", "tag"}
    splits = {"training_split", "validation_split", "test_split", "fewshot_split"}
    for name, entry in local.task_index.items():
        if name.startswith("local_") and entry.kind.name == "TASK":
            original = built_in.task_index[name.removeprefix("local_")].cfg
            for field in (entry.cfg.keys() | original.keys()) - data - splits:
                assert entry.cfg.get(field) == original.get(field)
            for split in splits - {"fewshot_split"}:
                assert entry.cfg[split] in (None, original.get(split))
    assert prepared["mmlu"].subtasks == 2
    assert {task: ready.subtasks for task, ready in prepare_hub_tasks(table.columns, built_in).items()} == {
        "rte": 1,
        "mmlu": 57,
        "gsm8k": 1,
    }

    anatomy = local.load("local_mmlu_anatomy")["tasks"]["local_mmlu_anatomy"]
    anatomy.set_fewshot_seed(1234)
    anatomy.build_all_requests(rank=0, world_size=1)
    for document, instances in zip(anatomy.eval_docs, anatomy.instances[::4], strict=True):
        prompt = instances.args[0]
        assert prompt.startswith("The following are multiple choice questions (with answers) about anatomy.")
        assert prompt.count(document["question"]) == 1
        assert all(prompt.count(question) == 1 for question, _ in MMLU["anatomy"])


def test_rows_that_are_the_same_are_no_examples_of_each_other(repository, data_dir, tmp_path):
    rows = (data_dir / "mmlu.jsonl").read_text().splitlines()
    anatomy = [row for row in rows if "anatomy" in row]
    (tmp_path / "mmlu.jsonl").write_text("\n".join([*anatomy, anatomy[0]]))
    table = read_table(repository / "configs/evaluation/table1.yaml", ["mmlu"])
    prepared = prepare_local_tasks(table.columns, find_tasks(table.columns), tmp_path, tmp_path / "tasks")
    assert prepared["mmlu"].shots == 2  # of four rows, two of them the same
    task = find_tasks(table.columns, include=tmp_path / "tasks").load("local_mmlu_anatomy")["tasks"][
        "local_mmlu_anatomy"
    ]
    task.set_fewshot_seed(1234)
    task.build_all_requests(rank=0, world_size=1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--tasks", "piqua"), "task 'piqua' (did you mean 'piqa'?)"),
        (("--tasks", "boolq"), "there is no boolq.jsonl; it has none of the tasks"),
        (("--config", "nowhere.yaml"), "nowhere.yaml: no such file"),
        (("--pool", "contxt"), "invalid choice: 'contxt'"),
        (("--limit", "0"), "--limit 0 must be at least 1"),
    ],
)
def test_a_mistake_is_one_line(evaluate, checkpoint, arguments, message):
    code, _, error = evaluate(checkpoint, *arguments)
    assert code != 0
    assert message in error.strip().splitlines()[-1]
    assert "Traceback" not in error


def test_what_is_no_checkpoint_and_what_is_no_row_are_one_line(evaluate, checkpoint, data_dir, tmp_path):
    (tmp_path / "letters").mkdir()
    for directory in (tmp_path / "nowhere", tmp_path / "letters"):
        code, _, error = evaluate(directory)
        assert code == 1
        assert str(directory) in error
        assert len(error.strip().splitlines()) == 1
    code, _, error = evaluate(checkpoint, "--tasks", "rte", data=False)
    assert code == 1
    assert error.strip().splitlines()[-1].endswith("name a folder of local files with --data_dir")
    assert "Traceback" not in error
    damaged = tmp_path / "damaged"
    shutil.copytree(data_dir, damaged)
    (damaged / "rte.jsonl").write_text('{"sentence1": "a", "sentence2": "b", "label": 0}\n{"sentence1": "a"}\n')
    code, _, error = evaluate(checkpoint, "--tasks", "rte", "--data_dir", damaged, data=False)
    assert code == 1
    assert error.strip().endswith("rte.jsonl, line 2: no 'sentence2'; a row has sentence1, sentence2, label")


@pytest.mark.slow
@pytest.mark.parametrize("granularity", ["dense", "attn_sequence", "mlp_token"])
def test_smollm2_is_evaluated_as_unmodified_lm_eval_does(evaluate, smollm2_dir, tmp_path, granularity):
    """At batch sizes 1, 4 and 16, against `lm_eval --model hf` at batch size 1 in a process of its own."""
    directory = smollm2_dir
    if granularity != "dense":
        settings = make_settings(read_config(smollm2_dir), granularity=granularity)
        directory = with_routers(smollm2_dir, tmp_path / "mod", settings, scale=0.05)
    column = "dense" if granularity == "dense" else "routed"
    assert_evaluated_as_unmodified(evaluate, directory, tmp_path, column, tasks=("rte", "piqa", "mmlu"))


@pytest.mark.slow
def test_a_mixture_is_evaluated_as_unmodified_lm_eval_does(evaluate, upcycled, tmp_path):
    settings = make_settings(read_config(upcycled))
    directory = with_routers(upcycled, tmp_path / "mod", settings, scale=0.7, num_experts=5)
    assert_evaluated_as_unmodified(evaluate, directory, tmp_path, "routed", tasks=("rte", "piqa"))


def assert_evaluated_as_unmodified(evaluate, directory, tmp_path, name, tasks):
    results = []
    for batch_size in (1, 4, 16):
        code, out, error = evaluate(
            *(directory, "--tasks", *tasks, "--batch_size", batch_size, "--no_dense"),
            output_dir=tmp_path / f"out{batch_size}",
        )
        assert code == 0, error
        results.append(written(out))
    if name == "routed":
        assert 0.2 < results[0]["rows"][name]["piqa"]["capacity"]["capacity"] < 0.8
    for task in tasks:
        command = shlex.split(results[0]["lm_eval"][task])
        subprocess.run(
            [sys.executable, "-m", *command, "--device", "cpu", "--output_path", tmp_path / "hf"],
            cwd=tmp_path,
            check=True,
            capture_output=True,
        )
        (path,) = (tmp_path / "hf").rglob("results_*.json")
        expected = json.loads(path.read_text())["results"][f"local_{task}"]
        shutil.rmtree(tmp_path / "hf")
        for result in results:
            found = result["rows"][name][task]["lm_eval"]
            assert {metric: value for metric, value in expected.items() if "," in metric} == {
                metric: value for metric, value in found.items() if "," in metric
            }
