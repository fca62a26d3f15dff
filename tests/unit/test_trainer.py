"""The trainer on tiny random models: what trains, what the logged numbers mean, and that batching changes nothing."""

import os
import resource
import signal
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PrinterCallback,
    TrainerCallback,
)

from utils.io.errors import UserError
from utils.model.checkpoint import add_substitutes, load_mod_model, make_settings, read_config
from utils.pipeline.arguments import RouterTrainingArguments, accumulation_steps
from utils.pipeline.calibration import logits_of_routers
from utils.pipeline.customized_trainer import RouterTrainer, freeze_backbone
from utils.pipeline.losses import capacity_hinge, executed_inputs
from utils.pipeline.regression_control import GATE
from utils.pipeline.training_checkpoint import MANIFEST_FILE, last_whole_checkpoint

VOCABULARY = 96
LAYERS = [2, 3, 4]


@pytest.fixture(scope="module")
def base_dir(tmp_path_factory):
    return save_base(LlamaForCausalLM, LlamaConfig, tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def base_of(base_dir, tmp_path_factory):
    """Returns the base whose parts of a granularity can be routed."""
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2}
    mixture = save_base(MixtralForCausalLM, MixtralConfig, tmp_path_factory.mktemp("mixture"), **experts)
    return lambda granularity: mixture if granularity == "expert_token" else base_dir


def save_base(model_class, config_class, directory, **options):
    torch.manual_seed(1)
    config = config_class(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
        tie_word_embeddings=False,
        **options,
    )
    model_class(config).save_pretrained(directory)
    return directory


def make_rows(count: int = 16, seed: int = 3) -> list[dict[str, list[int]]]:
    """Rows of unequal length and unequally many supervised tokens."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(count):
        length = int(torch.randint(6, 15, (1,), generator=generator))
        prompt = int(torch.randint(1, length - 2, (1,), generator=generator))
        ids = torch.randint(0, VOCABULARY, (length,), generator=generator).tolist()
        rows.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
    return rows


def collate(rows):
    longest = max(len(row["input_ids"]) for row in rows)
    pad = [longest - len(row["input_ids"]) for row in rows]
    return {
        "input_ids": torch.tensor([r["input_ids"] + [0] * p for r, p in zip(rows, pad, strict=True)]),
        "attention_mask": torch.tensor([[1] * len(r["input_ids"]) + [0] * p for r, p in zip(rows, pad, strict=True)]),
        "labels": torch.tensor([r["labels"] + [-100] * p for r, p in zip(rows, pad, strict=True)]),
    }


def make_trainer(base_dir, output_dir, granularity="attn_sequence", rows=None, routers_seed=5, rank=None, **arguments):
    settings = make_settings(read_config(base_dir), mod_n=3, granularity=granularity)
    model = load_mod_model(base_dir, settings)
    if rank:
        add_substitutes(model, {"kind": "linear", "rank": rank})
    generator = torch.Generator().manual_seed(routers_seed or 0)
    with torch.no_grad():
        for router in model.router_modules().values() if routers_seed is not None else ():  # some kept, some dropped
            router.weight.copy_(0.3 * torch.randn(router.weight.shape, generator=generator))
    defaults = {
        "global_batch_size": 8,
        "per_device_train_batch_size": 8,
        "max_steps": 2,
        "warmup_steps": 0,
        "learning_rate": 1e-2,
        "capacity_control": "hinge",
        "distillation_weight": 0.0,
        "gradient_scale": 0.5,
        "sequence_pooling": "all",  # as the model decides by itself
        "train_sampling_strategy": "sequential",
        "report_to": "none",
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 0,
    }
    args = RouterTrainingArguments(output_dir=str(output_dir), **(defaults | arguments))
    if args.router_only:
        freeze_backbone(model)
    rows = rows or make_rows()
    return RouterTrainer(model=model, args=args, train_dataset=rows, eval_dataset=rows, data_collator=collate)


class StopAt(TrainerCallback):
    """Ends training at a step, as an interruption would."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step


class FullDisk(TrainerCallback):
    """Lets no file grow much beyond what the first checkpoint has: the growing trainer_state.json can't be written."""

    def on_save(self, args, state, control, **kwargs):
        files = Path(args.output_dir, f"checkpoint-{state.global_step}").iterdir()
        largest = max(path.stat().st_size for path in files)
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest + 1000, resource.RLIM_INFINITY))


class TerminateAt(TrainerCallback):
    """Sends this process SIGTERM in the middle of a step."""

    def __init__(self, step: int):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step - 1:
            os.kill(os.getpid(), signal.SIGTERM)


def logged(trainer, key="loss"):
    return [entry for entry in trainer.state.log_history if key in entry]


@pytest.mark.parametrize("granularity", ["attn_sequence", "attn_token", "mlp_sequence", "block_token"])
def test_a_step_changes_every_router_and_nothing_else(base_dir, tmp_path, granularity):
    trainer = make_trainer(base_dir, tmp_path, granularity, max_steps=1)
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    trainer.train()
    changed = {n for n, tensor in trainer.model.state_dict().items() if not torch.equal(tensor, before[n])}
    assert changed == {f"model.layers.{i}.router.weight" for i in LAYERS}


def test_no_activation_below_the_first_routed_layer_is_kept_for_backward(base_dir, tmp_path):
    trainer = make_trainer(base_dir, tmp_path)
    seen = {}
    for index, layer in enumerate(trainer.model.model.layers):
        layer.register_forward_hook(lambda _, __, output, index=index: seen.update({index: output.requires_grad}))
    trainer.train()
    assert seen == {0: False, 1: False, 2: True, 3: True, 4: True, 5: True}


@pytest.mark.parametrize("granularity", ["attn_sequence", "mlp_token"])
def test_logged_loss_and_capacity_are_the_means_of_the_accumulation_window(base_dir, tmp_path, granularity):
    """Against sums over single rows, with weights that differ from row to row."""
    rows = make_rows(8)
    trainer = make_trainer(
        base_dir, tmp_path, granularity, rows, max_steps=1, per_device_train_batch_size=2, target_capacity=0.25
    )
    model = trainer.model.eval()
    nll, tokens, hinge, executed, inputs = 0.0, 0, 0.0, torch.zeros(len(LAYERS)), 0
    for row in rows:
        with torch.no_grad():
            output = model(torch.tensor([row["input_ids"]]), execution="dense")
        labels = torch.tensor(row["labels"][1:])
        nll += F.cross_entropy(output.logits[0, :-1], labels, ignore_index=-100, reduction="sum").item()
        tokens += int((labels != -100).sum())
        gates = output.router_gates.reshape(len(LAYERS), -1)  # [layers, inputs of this row]
        hinge += max(0.0, gates.mean().item() - 0.25)
        executed += gates.sum(dim=1)
        inputs += gates.shape[1]
    trainer.train()
    (entry,) = logged(trainer)
    assert entry["task_loss"] == pytest.approx(nll / tokens, rel=1e-5)
    assert entry["mod_loss"] == pytest.approx(hinge / len(rows), rel=1e-5)
    assert entry["loss"] == pytest.approx(nll / tokens + 0.5 * hinge / len(rows), rel=1e-5)
    assert entry["capacity"] == pytest.approx((executed.mean() / inputs).item(), rel=1e-5)
    for index, layer in enumerate(LAYERS):
        assert entry[f"capacity/layer_{layer}"] == pytest.approx((executed[index] / inputs).item(), abs=1e-6)


@pytest.mark.parametrize("granularity", ["attn_sequence", "block_token"])
def test_one_row_eight_times_trains_as_eight_rows_once(base_dir, tmp_path, granularity):
    runs = []
    for size in (1, 2, 8):
        trainer = make_trainer(
            base_dir, tmp_path / str(size), granularity, per_device_train_batch_size=size, max_steps=3
        )
        trainer.train()
        runs.append((torch.cat(list(trainer.router_state().values())), [entry["loss"] for entry in logged(trainer)]))
    for routers, losses in runs[:2]:
        torch.testing.assert_close(routers, runs[2][0], rtol=0, atol=2e-5)  # Adam divides by small gradients
        assert losses == pytest.approx(runs[2][1], rel=1e-5)


def test_held_out_loss_is_the_mean_over_tokens_at_any_batch_size(base_dir, tmp_path):
    metrics = [
        make_trainer(base_dir, tmp_path, per_device_eval_batch_size=size, rows=make_rows(7)).evaluate()
        for size in (1, 3, 7)
    ]
    for name in ("eval_loss", "eval_capacity", "eval_capacity/layer_3"):
        assert [m[name] for m in metrics] == pytest.approx([metrics[0][name]] * 3, rel=1e-5)


def test_dense_evaluation_is_the_base_models(base_dir, tmp_path):
    rows = make_rows(4)
    trainer = make_trainer(base_dir, tmp_path, rows=rows)
    base = LlamaForCausalLM.from_pretrained(base_dir)
    batch = collate(rows)
    with torch.no_grad():
        expected = base(**batch).loss.item()
    with trainer.dense():
        metrics = trainer.evaluate(metric_key_prefix="dense")
    assert metrics["dense_loss"] == pytest.approx(expected, rel=1e-6)
    assert "dense_capacity" not in metrics
    assert trainer.evaluate()["eval_loss"] != pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("order", ["random", "sequential"])
def test_a_run_that_was_cut_short_goes_on_to_the_same_routers(base_dir, tmp_path, order):
    """In the second epoch, whose last step has fewer rows."""
    rows = make_rows(21)
    arguments = {"max_steps": -1, "num_train_epochs": 2, "train_sampling_strategy": order, "rows": rows}
    whole = make_trainer(base_dir, tmp_path / "whole", **arguments)
    whole.train()
    assert whole.state.global_step == 6

    save = {"save_strategy": "steps", "save_steps": 4}
    first = make_trainer(base_dir, tmp_path / "cut", **arguments, **save)
    first.add_callback(StopAt(4))
    first.train()
    checkpoint = last_whole_checkpoint(tmp_path / "cut")
    assert checkpoint.endswith("checkpoint-4")
    second = make_trainer(base_dir, tmp_path / "cut", routers_seed=99, **arguments, **save)
    second.train(resume_from_checkpoint=checkpoint)
    for name, router in whole.router_state().items():
        assert torch.equal(router, second.router_state()[name])


def test_a_checkpoint_holds_routers_and_optimizer_state_only(base_dir, tmp_path):
    trainer = make_trainer(base_dir, tmp_path, save_strategy="steps", save_steps=2)
    trainer.train()
    files = {path.name: path.stat().st_size for path in (tmp_path / "checkpoint-2").iterdir()}
    assert {"routers.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", MANIFEST_FILE} <= set(files)
    assert sum(files.values()) < 50_000
    state = torch.load(tmp_path / "checkpoint-2" / "optimizer.pt", weights_only=True)
    assert set(state) == {f"model.layers.{layer}.router.weight" for layer in LAYERS}
    assert all(entry["exp_avg"].shape == (1, 32) for entry in state.values())


@pytest.fixture
def checkpoints(base_dir, tmp_path):
    """A directory with checkpoints of steps 2, 4 and 6."""
    make_trainer(base_dir, tmp_path, max_steps=6, save_strategy="steps", save_steps=2, save_total_limit=3).train()
    return tmp_path


@pytest.mark.parametrize("name", ["routers.safetensors", "optimizer.pt", "trainer_state.json", MANIFEST_FILE])
@pytest.mark.parametrize("harm", ["missing", "cut short", "changed"])
def test_a_damaged_checkpoint_is_skipped_with_a_warning_for_the_one_before(checkpoints, caplog, name, harm):
    assert last_whole_checkpoint(checkpoints).endswith("checkpoint-6")
    path = checkpoints / "checkpoint-6" / name
    content = path.read_bytes()
    if harm == "missing":
        path.unlink()
    else:
        path.write_bytes(content[: len(content) // 2] if harm == "cut short" else b"\0" + content[1:])
    assert last_whole_checkpoint(checkpoints).endswith("checkpoint-4")
    (warning,) = [record.getMessage() for record in caplog.records]
    assert "checkpoint-6 is damaged" in warning
    assert name in warning


def test_with_no_whole_checkpoint_a_run_starts_anew_and_says_so(checkpoints, caplog):
    for path in checkpoints.glob(f"checkpoint-*/{MANIFEST_FILE}"):
        path.unlink()
    assert last_whole_checkpoint(checkpoints) is None
    assert "starting from the beginning" in caplog.records[-1].getMessage()


def test_the_last_checkpoints_are_kept_and_nothing_unfinished(base_dir, tmp_path):
    trainer = make_trainer(base_dir, tmp_path, max_steps=12, save_strategy="steps", save_steps=1, save_total_limit=3)
    trainer.train()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-11", "checkpoint-12"]


def test_a_checkpoint_that_cannot_be_written_leaves_the_earlier_ones_and_one_line(base_dir, tmp_path):
    """`RLIMIT_FSIZE` stands for a disk that fills up in the middle of a file."""
    trainer = make_trainer(base_dir, tmp_path, max_steps=80, save_strategy="steps", save_steps=40)
    trainer.remove_callback(PrinterCallback)  # what pytest captures is a file as well
    trainer.add_callback(FullDisk())
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(UserError, match=r"checkpoint-80 could not be written: File too large; .* goes on from"):
            trainer.train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-40"]
    assert last_whole_checkpoint(tmp_path).endswith("checkpoint-40")


def test_a_checkpoint_of_the_last_step_leaves_nothing_to_train(base_dir, tmp_path):
    arguments = {"max_steps": 3, "save_strategy": "steps", "save_steps": 3, "global_batch_size": 4}
    whole = make_trainer(base_dir, tmp_path, per_device_train_batch_size=4, **arguments)  # 4 steps make an epoch
    whole.train()
    again = make_trainer(base_dir, tmp_path, per_device_train_batch_size=4, **arguments)
    again.train(resume_from_checkpoint=last_whole_checkpoint(tmp_path))
    assert again.state.global_step == 3
    for name, router in whole.router_state().items():
        assert torch.equal(router, again.router_state()[name])


def test_sigterm_saves_the_step_and_ends_training(base_dir, tmp_path):
    trainer = make_trainer(base_dir, tmp_path, max_steps=6)
    trainer.add_callback(TerminateAt(2))
    before = signal.getsignal(signal.SIGTERM)
    trainer.train()
    assert trainer.termination.happened
    assert trainer.state.global_step == 2
    assert last_whole_checkpoint(tmp_path).endswith("checkpoint-2")
    assert signal.getsignal(signal.SIGTERM) is before


def test_router_only_false_trains_the_backbone_too(base_dir, tmp_path):
    trainer = make_trainer(base_dir, tmp_path, router_only=False, max_steps=1)
    before = trainer.model.lm_head.weight.clone()
    trainer.train()
    assert not torch.equal(trainer.model.lm_head.weight, before)


class TestCapacityLoss:
    def test_padding_is_no_input(self):
        gates = torch.tensor([[[1.0, 0.0, 1.0, 1.0]]])  # 1 layer, 1 sequence, 4 tokens of which 2 are padding
        executed, inputs = executed_inputs(gates, torch.tensor([[1, 1, 0, 0]]))
        assert executed.tolist() == [[1.0]]
        assert inputs.tolist() == [2.0]

    def test_the_target_steers_one_sequence_by_itself(self):
        """The published hinge, on one layer of one sequence, is blind to every target below 1."""
        gates = torch.tensor([[1.0], [1.0], [0.0], [0.0]], requires_grad=True)  # capacity 0.5
        executed, inputs = executed_inputs(gates, None)
        assert capacity_hinge(executed, inputs, 0.25).tolist() == [0.25]
        assert (
            torch.autograd.grad(capacity_hinge(executed, inputs, 0.25).sum(), gates)[0].flatten().tolist() == [0.25] * 4
        )
        assert not torch.autograd.grad(capacity_hinge(executed, inputs, 0.75).sum(), gates)[0].any()


class TestAccumulation:
    @pytest.mark.parametrize(("size", "device", "processes", "steps"), [(64, 1, 1, 64), (64, 4, 2, 8), (8, 8, 1, 1)])
    def test_steps_make_up_the_global_batch(self, size, device, processes, steps):
        assert accumulation_steps(size, device, processes) == steps

    def test_a_batch_that_does_not_divide_names_sizes_that_do(self):
        with pytest.raises(UserError, match=r"global_batch_size 10 .* 3 processes of 2 sequences .*; 6 or 12 would$"):
            accumulation_steps(10, 2, 3)
        with pytest.raises(UserError, match=r"2 processes of 8 sequences .*; 16 would, or 4 sequences each$"):
            accumulation_steps(8, 8, 2)

    def test_the_process_count_comes_from_the_launcher(self, tmp_path, monkeypatch):
        monkeypatch.setenv("WORLD_SIZE", "3")
        with pytest.raises(UserError, match="3 processes"):
            RouterTrainingArguments(output_dir=str(tmp_path), global_batch_size=8)


class TestControls:
    """The default recipe in the trainer: one row or eight at a time, cut short or not, the same routers."""

    ARGUMENTS = {"distillation_weight": 1.0, "target_capacity": 0.6, "max_steps": 4}

    @pytest.mark.parametrize(
        ("control", "granularity"),
        [
            ("budget", "attn_sequence"),
            ("budget", "attn_token"),
            ("budget", "mlp_token"),
            ("budget", "expert_token"),
            ("regression", "attn_sequence"),
            ("regression", "block_sequence"),
        ],
    )
    def test_one_row_eight_times_trains_as_eight_rows_once(self, base_of, tmp_path, control, granularity):
        states, settings = [], []
        for size in (8, 1):
            arguments = self.ARGUMENTS | {"per_device_train_batch_size": size, "capacity_control": control}
            trainer = make_trainer(
                base_of(granularity), tmp_path / str(size), granularity, make_rows(32), routers_seed=None, **arguments
            )
            trainer.train()
            trainer.finish()
            states.append(trainer.router_state())
            settings.append(trainer.model.config.mod_settings)
        for name, weight in states[0].items():
            assert weight.any()
            torch.testing.assert_close(states[1][name], weight, atol=2e-5, rtol=1e-3)
        thresholds = [torch.tensor(each.threshold) for each in settings]
        torch.testing.assert_close(*thresholds, atol=1e-4, rtol=0)

    @pytest.mark.parametrize("control", ["budget", "regression"])
    def test_activation_checkpointing_changes_nothing(self, base_dir, tmp_path, control):
        settings = []
        for again in (False, True):
            arguments = self.ARGUMENTS | {"capacity_control": control, "activation_checkpointing": again}
            trainer = make_trainer(base_dir, tmp_path / str(again), rows=make_rows(32), routers_seed=None, **arguments)
            trainer.train()
            trainer.finish()
            settings.append(trainer.model.config.mod_settings)
        assert settings[1].threshold == pytest.approx(settings[0].threshold, abs=1e-5)

    @pytest.mark.parametrize(("granularity", "control"), [("block_token", "budget"), ("attn_sequence", "regression")])
    def test_substitutes_are_fitted_then_trained_and_go_on_exactly(self, base_dir, tmp_path, granularity, control):
        arguments = {"save_strategy": "steps", "save_steps": 2, "capacity_control": control, "distillation_weight": 1.0}
        arguments = self.ARGUMENTS | arguments | {"substitute": "linear", "rank": 4}
        runs = {}
        for name, rate in (("whole", None), ("again", None), ("left", 0.0)):
            trainer = make_trainer(
                base_dir, tmp_path / name, granularity, make_rows(32), None, substitute_learning_rate=rate, **arguments
            )
            if rate == 0.0:
                for substitute in trainer.model.substitute_modules().values():
                    substitute.requires_grad_(False)
            trainer.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2") if name == "again" else None)
            runs[name] = trainer.substitute_state()
        assert all(value.any() for name, value in runs["left"].items())
        for name, value in runs["whole"].items():
            assert runs["again"][name].equal(value)
            assert not runs["left"][name].equal(value)

    @pytest.mark.parametrize("control", ["budget", "regression"])
    def test_a_run_that_was_cut_short_goes_on_to_the_same_routers_and_thresholds(self, base_dir, tmp_path, control):
        arguments = self.ARGUMENTS | {"save_strategy": "steps", "save_steps": 2, "capacity_control": control}
        whole = make_trainer(base_dir, tmp_path / "whole", rows=make_rows(32), routers_seed=None, **arguments)
        whole.train()
        again = make_trainer(base_dir, tmp_path / "again", rows=make_rows(32), routers_seed=None, **arguments)
        again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
        for trainer in (whole, again):
            trainer.calibrate_on(make_rows(8, seed=9))
            trainer.finish()
        for name, weight in whole.router_state().items():
            assert again.router_state()[name].equal(weight)
        assert again.model.config.mod_settings == whole.model.config.mod_settings
        assert len(set(whole.model.config.mod_settings.threshold)) > 1

    def test_a_run_whose_backbone_trains_goes_on_to_the_same_weights_and_thresholds(self, base_dir, tmp_path):
        # whoever writes the answers to calibrate on changes in training
        arguments = self.ARGUMENTS | {"save_strategy": "steps", "save_steps": 2, "capacity_control": "budget"}
        arguments |= {"router_only": False, "distillation_weight": 0.0, "router_learning_rate": 1e-2}
        runs = {}
        for name, start in (("whole", None), ("again", str(tmp_path / "whole" / "checkpoint-2"))):
            trainer = make_trainer(base_dir, tmp_path / name, "attn_token", make_rows(32), None, **arguments)
            trainer.calibrate_on(make_rows(8, seed=9), ends=range(0, VOCABULARY, 7))
            trainer.train(resume_from_checkpoint=start)
            trainer.finish()
            runs[name] = trainer
        whole, again = runs.values()
        for name, weight in whole.model.state_dict().items():
            assert again.model.state_dict()[name].equal(weight), name
        assert again.model.config.mod_settings == whole.model.config.mod_settings

    @pytest.mark.parametrize(
        ("control", "granularity"),
        [
            ("budget", "attn_token"),
            ("budget", "expert_token"),
            ("regression", "mlp_sequence"),
            ("hinge", "block_token"),
            ("hinge", "expert_token"),
        ],
    )
    def test_what_finish_settles_is_what_the_model_then_decides(self, base_of, tmp_path, control, granularity):
        arguments = self.ARGUMENTS | {"capacity_control": control}
        trainer = make_trainer(base_of(granularity), tmp_path, granularity, rows=make_rows(32), **arguments)
        trainer.train()
        rows = make_rows(80, seed=9)
        trainer.calibrate_on(rows)
        trainer.finish()
        shares = []
        trainer.model.eval()
        for row in trainer._answered():  # what it was calibrated on: the model's own answers to short prompts
            with torch.no_grad():
                gates = trainer.model(**collate([row])).router_gates
            shares.append(float(gates.mean()))
        # a regression lets the rows that it measured say what share is above a cut too
        assert sum(shares) / len(shares) == pytest.approx(0.6, abs=0.06 if control == "regression" else 0.02)

    @pytest.mark.parametrize("granularity", ["attn_sequence", "block_sequence"])
    def test_a_calibration_reads_what_the_regression_read(self, base_dir, tmp_path, granularity):
        arguments = self.ARGUMENTS | {"capacity_control": "regression"}
        trainer = make_trainer(base_dir, tmp_path, granularity, rows=make_rows(32), **arguments)
        trainer.train()
        weights, cuts = trainer.capacity_control.solve()
        for layer, router in trainer.model.router_modules().items():
            trainer.set_parameter(router.weight, weights[layer])
        trainer.model.eval()
        measured = torch.cat(trainer.capacity_control.rows)[..., :-1]  # [rows, layers, hidden_size]
        expected = [measured[:, place] @ weights[layer][0] - cuts[layer][0] for place, layer in enumerate(weights)]
        rows = list(trainer._router_batches(trainer.train_dataset, 4))
        read = logits_of_routers(trainer.model, rows, cuts, lambda u: torch.full_like(u, GATE), execution="dense")
        trained = sorted(torch.cat(expected).tolist())
        assert len(trained) <= len(read)
        nearest = (torch.tensor(trained)[:, None] - read[None]).abs().amin(dim=1)
        assert nearest.max() < 1e-4 * read.abs().max()

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"max_steps": -1, "num_train_epochs": 2}, "num_train_epochs 2 must be 1 .*--capacity_control budget"),
            ({"max_steps": 5}, "max_steps 5 must be at most 4 .*32 rows once; .*--capacity_control budget"),
            ({"max_steps": 4, "dataloader_drop_last": True, "rows": make_rows(24)}, "max_steps 4 must be at most 3 "),
        ],
    )
    def test_a_regression_measures_no_row_twice(self, base_dir, tmp_path, arguments, message):
        arguments = {"rows": make_rows(32), "capacity_control": "regression"} | arguments
        with pytest.raises(UserError, match=message):
            make_trainer(base_dir, tmp_path, **arguments)


def test_what_has_no_effect_is_named(tmp_path):
    def idle(granularity, **arguments):
        args = RouterTrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none", **arguments)
        args.suit_model(32, granularity)
        return args.without_effect()

    rates = {"learning_rate": 0.1, "warmup_steps": 0.2, "weight_decay": 0.1}
    hinge = {"gradient_scale": 0.3, "capacity_scope": "layer"}
    for granularity in ("attn_sequence", "attn_token"):
        assert idle(granularity) == []
        assert idle(granularity, recipe="paper", **hinge, **rates) == []
    assert idle("attn_sequence", **hinge, **rates) == [*hinge, *rates]
    assert idle("attn_token", **hinge, **rates, regression_rows=500) == [*hinge, "regression_rows"]
    assert idle("attn_sequence", regression_rows=500) == []


@pytest.mark.parametrize(("granularity", "control"), [("attn_sequence", "regression"), ("mlp_token", "budget")])
def test_a_scaled_loss_is_refused_where_it_is_measured(tmp_path, monkeypatch, granularity, control):
    for arguments in ({"fp16": True}, {}):
        args = RouterTrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none", **arguments)
        with pytest.raises(UserError, match=f"^fp16: .* capacity_control {control} "):
            args.suit_model(32, granularity)
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")  # of an accelerate config
    args.capacity_control = "hinge"
    args.suit_model(32, granularity)


def test_distillation_is_the_divergence_from_the_dense_model(base_dir, tmp_path):
    """By hand, with the dense model run as a whole and the softmax written out."""
    arguments = {"distillation_weight": 0.25, "gradient_scale": 0.0, "max_steps": 1}
    trainer = make_trainer(base_dir, tmp_path, **arguments)
    batch = trainer.data_collator(make_rows(8))
    model, tokens = trainer.model.train(), (batch["labels"][:, 1:] != -100).sum()
    trainer._window_sequences = 8
    with torch.no_grad():
        loss = trainer.compute_loss(model, batch, num_items_in_batch=tokens)
        text = {name: batch[name] for name in ("input_ids", "attention_mask")}
        routed, dense = model(**text, execution="dense").logits, model(**text, route=False).logits
    expected = 0.0
    for row in range(8):
        for place in range(batch["labels"].shape[1] - 1):
            label = batch["labels"][row, place + 1]
            if label != -100:
                p, q = dense[row, place].softmax(0), routed[row, place].softmax(0)
                expected += 0.25 * float((p * (p / q).log()).sum()) - 0.75 * float(q[label].log())
    assert float(loss) == pytest.approx(expected / float(tokens), rel=1e-5)


def test_the_papers_recipe_is_the_published_loss(base_dir, tmp_path):
    """`L_task + lambda * ReLU(capacity - target)`, of a layer in a micro-batch (Eq. 9-10), by hand."""
    names = ("capacity_control", "distillation_weight", "gradient_scale", "sequence_pooling")
    trainer = make_trainer(base_dir, tmp_path, target_capacity=0.3, **dict.fromkeys(names), recipe="paper")
    assert [getattr(trainer.args, name) for name in names] == ["hinge", 0.0, 0.1, "all"]
    assert (trainer.args.calibration_rows, trainer.capacity_control) == (0, None)
    batch = trainer.data_collator(make_rows(8))
    tokens = (batch["labels"][:, 1:] != -100).sum()
    trainer._window_sequences = 8
    model = trainer.model.train()
    loss = trainer.compute_loss(model, batch, num_items_in_batch=tokens)
    output = model(**{name: batch[name] for name in ("input_ids", "attention_mask", "labels")})
    hinges = [max(float(layer.sum()) / 8 - 0.3, 0.0) for layer in output.router_gates.detach()]
    assert 0 < sum(hinges) < 3 * 0.7, "the case is vacuous: everything is kept, or everything dropped"
    assert float(loss) == pytest.approx(float(output.loss) + 0.1 * sum(hinges) / len(hinges), rel=1e-6)


@pytest.mark.parametrize("execution", ["dense", "sparse"])
def test_the_prompt_alone_decides_where_it_is_asked_to(base_dir, tmp_path, execution):
    trainer = make_trainer(base_dir, tmp_path, sequence_pooling=None)
    assert trainer.args.sequence_pooling == "prompt", "the default recipe's"
    batch = trainer.data_collator(make_rows(4))
    deciding = trainer._deciding_tokens(batch)
    decided = trainer.model(batch["input_ids"], **deciding, execution=execution).router_scores
    for row in range(4):
        prompt = int((batch["labels"][row] != -100).int().argmax())
        alone = trainer.model(batch["input_ids"][row : row + 1, :prompt], execution=execution).router_scores
        torch.testing.assert_close(decided[0, row], alone[0, 0])  # later layers read what the whole row made of it
    assert deciding["token_mask"].sum() < batch["attention_mask"].sum()


class TestRouterInit:
    """Layers that change the residual stream least start nearest to skipping."""

    @staticmethod
    def started(base_dir, tmp_path, **arguments):
        trainer = make_trainer(base_dir, tmp_path, routers_seed=None, max_steps=1, **arguments)
        with torch.no_grad():
            trainer.model.model.layers[LAYERS[1]].self_attn.o_proj.weight.zero_()  # changes nothing
        trainer.begin_control()
        return trainer

    def test_the_budget_keeps_as_much_as_from_zero_at_the_start(self, base_dir, tmp_path):
        kept = {}
        for start in ("zero", "importance"):
            trainer = self.started(base_dir, tmp_path, capacity_control="budget", router_init=start)
            kept[start] = torch.sigmoid(trainer.capacity_control.intercepts.detach())
            assert kept[start].mean() == pytest.approx(0.95, abs=1e-5)
        assert kept["zero"].std() == 0
        assert kept["importance"].argmin() == 1

    def test_the_hinge_starts_with_everything_kept(self, base_dir, tmp_path):
        trainer = self.started(base_dir, tmp_path, router_init="importance")
        thresholds = trainer.model.config.mod_settings.threshold
        assert thresholds[1] == max(thresholds) == 0.5
        assert min(thresholds) < 0.4
        trainer.train()
        assert logged(trainer)[0]["capacity"] == 1.0

    def test_a_run_from_trained_routers_says_that_it_has_no_effect(self, base_dir, tmp_path, caplog):
        trainer = make_trainer(base_dir, tmp_path, router_init="importance")
        trainer.begin_control()
        assert "router_init importance has no effect" in caplog.text
        assert trainer.model.config.mod_settings.threshold == 0.5

    def test_regression_has_no_start_and_experts_none_yet(self, base_dir, tmp_path):
        trainer = make_trainer(
            base_dir, tmp_path, capacity_control="regression", distillation_weight=1.0, router_init="importance"
        )
        assert "router_init" in trainer.args.without_effect()
        with pytest.raises(UserError, match="router_init importance is for attention"):
            trainer.args.suit_model(16, "expert_token")


def test_the_divergence_at_every_second_supervised_token_is_that_of_the_others_left_out(base_dir, tmp_path):
    arguments = {"distillation_weight": 1.0, "gradient_scale": 0.0, "max_steps": 1}
    thinned = make_trainer(base_dir, tmp_path, distillation_every=2, **arguments)
    whole = make_trainer(base_dir, tmp_path, **arguments)
    rows = make_rows(8)
    batch = whole.data_collator(rows)
    labels = batch["labels"].clone()
    for row in labels:
        supervised = (row != -100).nonzero().squeeze(-1)
        row[supervised[1::2]] = -100
    assert (labels != -100).sum() < (batch["labels"] != -100).sum()
    others_left_out = [
        row | {"labels": part[: len(row["labels"])].tolist()} for row, part in zip(rows, labels, strict=True)
    ]
    losses = []
    for trainer, text in ((thinned, rows), (whole, others_left_out)):
        (window,), tokens = trainer.get_batch_samples(iter([trainer.data_collator(text)]), 1, torch.device("cpu"))
        losses.append(trainer.compute_loss(trainer.model.train(), window, num_items_in_batch=tokens))
    assert float(losses[0]) == pytest.approx(float(losses[1]), rel=1e-6)
    assert thinned.evaluate()["eval_loss"] == pytest.approx(whole.evaluate()["eval_loss"]), "of all tokens"
