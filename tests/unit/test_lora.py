"""LoRA beside the routers on tiny random models: who trains how fast, what is saved, and what comes back."""

import json

import pytest
import torch
from model_zoo import ARCHITECTURES, LAYERS, NUM_LAYERS, make_pair, pad, randomize_routers, texts
from rounding import rounding
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast, TrainerCallback

from utils.io.errors import UserError
from utils.model.checkpoint import (
    build_mod_checkpoint,
    load_mod_model,
    load_routers,
    make_settings,
    merge_adapter,
    read_config,
    write_checkpoint,
)
from utils.model.lora import adapter_of, add_lora, load_adapter
from utils.pipeline.arguments import RouterTrainingArguments
from utils.pipeline.customized_trainer import RouterTrainer, freeze_backbone
from utils.pipeline.training_checkpoint import last_whole_checkpoint


@pytest.fixture(scope="module")
def base_dir(tmp_path_factory):
    """A tiny dense base on disk, with a tokenizer of a single word."""
    base, _ = make_pair("llama", "attn_sequence")
    directory = tmp_path_factory.mktemp("base")
    base.save_pretrained(directory)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"a": 0}, unk_token="a")))
    tokenizer.save_pretrained(directory)
    return directory


def collate(rows):
    input_ids, mask = pad([torch.tensor(row["input_ids"]) for row in rows], "right")
    return {"input_ids": input_ids, "attention_mask": mask, "labels": input_ids.masked_fill(mask == 0, -100)}


ROWS = [{"input_ids": text.tolist()} for text in texts((9, 4, 12, 7, 5, 6, 8, 10))]


def make_trainer(base_dir, output_dir, lora_layers="all", lora_dropout=0.0, **arguments):
    settings = make_settings(read_config(base_dir), mod_n=3)
    model = load_mod_model(base_dir, settings)
    defaults = {
        "global_batch_size": 4,
        "max_steps": 2,
        "warmup_steps": 0,
        "learning_rate": 1e-2,
        "router_learning_rate": 3e-2,
        "train_sampling_strategy": "sequential",
        "report_to": "none",
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        "use_lora": True,
        "seed": 0,
    }
    args = RouterTrainingArguments(
        output_dir=str(output_dir), lora_layers=lora_layers, lora_dropout=lora_dropout, **(defaults | arguments)
    )
    if args.router_only:
        freeze_backbone(model)
    if args.use_lora:
        torch.manual_seed(0)
        add_lora(model, args.lora_rank, args.lora_alpha, args.lora_dropout, None, args.lora_layers == "routed")
    return RouterTrainer(model=model, args=args, train_dataset=ROWS, data_collator=collate)


def test_an_adapter_that_diverged_is_not_written(base_dir, tmp_path):
    trainer = make_trainer(base_dir, tmp_path / "run")
    next(p for name, p in trainer.model.named_parameters() if ".lora_A" in name).data[0, 0] = float("nan")
    with pytest.raises(UserError, match="the adapter is not finite"):
        save(trainer, base_dir, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def save(trainer, base_dir, output_dir) -> None:
    """Write what a run ends in."""
    write_checkpoint(
        output_dir,
        base_dir,
        trainer.model.config.mod_settings,
        trainer.router_state(),
        adapter=adapter_of(trainer.model),
    )


def logits(model, **keywords):
    input_ids, mask = pad(texts((9, 4, 7)), "right")
    with torch.no_grad():
        return model.eval()(input_ids, mask, **keywords).logits[mask.bool()]


@pytest.fixture(scope="module")
def trained(base_dir, tmp_path_factory):
    """A trained model with adapters, and the checkpoint that it was saved as."""
    output_dir = tmp_path_factory.mktemp("trained")
    trainer = make_trainer(base_dir, output_dir / "run")
    trainer.train()
    save(trainer, base_dir, output_dir / "checkpoint")
    return trainer.model, output_dir / "checkpoint"


class TestTraining:
    @pytest.mark.parametrize("arch", list(ARCHITECTURES))
    @pytest.mark.parametrize("only_routed", [True, False])
    def test_adapters_and_routers_train_and_nothing_else(self, arch, only_routed):
        _, model = make_pair(arch, "attn_sequence")
        add_lora(model, 4, 8.0, only_routed=only_routed)
        trains = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        layers = LAYERS if only_routed else range(NUM_LAYERS)
        names = [f"self_attn.{n}_proj" for n in "qkvo"] + [f"mlp.{n}_proj" for n in ("gate", "up", "down")]
        adapters = {
            f"model.layers.{i}.{name}.lora_{side}.default.weight" for i in layers for name in names for side in "AB"
        }
        assert trains == adapters | {f"model.layers.{index}.router.weight" for index in LAYERS}

    def test_adapters_are_float32_over_a_low_precision_base(self):
        _, model = make_pair("llama", "attn_sequence")
        model.to(torch.bfloat16)
        add_lora(model, 4, 8.0)
        assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
        assert logits(model).isfinite().all()

    def test_routers_have_their_own_learning_rate(self, base_dir, tmp_path):
        trainer = make_trainer(base_dir, tmp_path, max_steps=1, logging_steps=1)
        before = {name: parameter.clone() for name, parameter in trainer.model.named_parameters()}
        trainer.train()
        moved = {
            name: (parameter - before[name]).abs().max().item()
            for name, parameter in trainer.model.named_parameters()
            if parameter.requires_grad
        }
        routers = [step for name, step in moved.items() if ".router." in name]
        adapters = [step for name, step in moved.items() if ".lora_B." in name]
        assert len(routers) == 3
        # Adam's first step is its learning rate
        assert routers == pytest.approx([3e-2] * len(routers), rel=1e-3)
        assert adapters == pytest.approx([1e-2] * len(adapters), rel=1e-3)

    def test_a_trained_backbone_has_one_beside_the_routers_too(self, base_dir, tmp_path):
        trainer = make_trainer(base_dir, tmp_path, use_lora=False, router_only=False)
        optimizer = trainer.create_optimizer()
        rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
        assert rates.keys() == {id(parameter) for parameter in trainer.model.parameters()}
        assert rates[id(trainer.model.model.layers[2].router.weight)] == 3e-2
        assert rates[id(trainer.model.model.layers[2].mlp.up_proj.weight)] == 1e-2

    @pytest.mark.parametrize(("layers", "first"), [("all", 0), ("routed", 2)])
    def test_the_backward_ends_where_the_first_adapter_or_router_is(self, base_dir, tmp_path, layers, first):
        trainer = make_trainer(base_dir, tmp_path, lora_layers=layers, max_steps=1)
        seen = {}
        for index, layer in enumerate(trainer.model.model.layers):
            layer.register_forward_hook(lambda _, __, output, index=index: seen.update({index: output.requires_grad}))
        trainer.train()
        assert seen == {index: index >= first for index in range(NUM_LAYERS)}

    @pytest.mark.parametrize("target", ["router", "q_porj", "lm_head"])
    def test_a_target_that_gets_no_adapter_is_refused(self, target):
        _, model = make_pair("llama", "attn_sequence")
        with pytest.raises(UserError, match=f"lora_target_modules '{target}' is not one of"):
            add_lora(model, 4, 8.0, targets=["v_proj", target])


class TestWhatIsSaved:
    def test_the_checkpoint_loads_as_one_with_the_adapter_applied(self, trained):
        model, directory = trained
        loaded = load_mod_model(directory)
        expected = logits(model)
        bound = rounding(expected, terms=1000)
        torch.testing.assert_close(logits(loaded), expected, rtol=0, atol=bound)
        assert (logits(loaded, route=False) - expected).abs().max() > 10 * bound

    def test_plain_peft_puts_the_adapter_onto_the_checkpoint_that_was_trained_from(self, trained, base_dir, tmp_path):
        from peft import PeftModel

        model, directory = trained
        build_mod_checkpoint(base_dir, tmp_path / "start", make_settings(read_config(base_dir), mod_n=3))
        start = load_mod_model(tmp_path / "start")
        load_routers(start, directory)
        expected = logits(model)
        got = logits(PeftModel.from_pretrained(start, directory))
        torch.testing.assert_close(got, expected, rtol=0, atol=rounding(expected, terms=1000))

    def test_the_bases_weights_are_linked_and_the_adapter_is_beside_them(self, trained, base_dir):
        _, directory = trained
        assert (directory / "base.safetensors").samefile(base_dir / "model.safetensors")
        weights = load_file(directory / "adapter_model.safetensors")
        assert all(name.startswith("base_model.model.model.layers.") and ".lora_" in name for name in weights)
        assert json.loads((directory / "adapter_config.json").read_text())["peft_type"] == "LORA"

    @pytest.mark.parametrize("damage", ["lacks", "shape"])
    def test_an_adapter_that_does_not_fit_is_refused(self, trained, base_dir, tmp_path, damage):
        weights = load_file(trained[1] / "adapter_model.safetensors")
        name = next(iter(weights))
        weights[name] = weights[name][:, :1].contiguous()
        if damage == "lacks":
            del weights[name]
        save_file(weights, tmp_path / "adapter_model.safetensors")
        with pytest.raises(UserError, match="an adapter for other modules, or of another rank"):
            load_adapter(make_trainer(base_dir, tmp_path / "run").model, tmp_path)

    def test_merged_it_gives_the_same_logits(self, trained, tmp_path):
        model, directory = trained
        merge_adapter(directory, tmp_path / "merged")
        assert not (tmp_path / "merged/adapter_config.json").exists()
        merged = load_mod_model(tmp_path / "merged")
        assert not getattr(merged, "_hf_peft_config_loaded", False)
        torch.testing.assert_close(logits(merged), logits(model), rtol=1e-4, atol=1e-4)
        routers = load_file(directory / "routers.safetensors")
        assert routers.keys() == load_file(tmp_path / "merged/routers.safetensors").keys()
        for name, tensor in load_file(tmp_path / "merged/routers.safetensors").items():
            assert torch.equal(tensor, routers[name])

    def test_without_an_adapter_there_is_nothing_to_merge(self, base_dir, tmp_path):
        with pytest.raises(UserError, match="nothing to merge"):
            merge_adapter(base_dir, tmp_path / "merged")
        assert not (tmp_path / "merged").exists()


class StopAt(TrainerCallback):
    """Ends training at a step, as an interruption would."""

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= 2


def test_a_run_that_was_cut_short_goes_on_to_the_same_adapters_and_routers(base_dir, tmp_path):
    keep = {"max_steps": 4, "lora_dropout": 0.2, "train_sampling_strategy": "random"}
    whole = make_trainer(base_dir, tmp_path / "whole", **keep)
    whole.train()
    first = make_trainer(base_dir, tmp_path / "cut", save_strategy="steps", save_steps=2, **keep)
    first.add_callback(StopAt)
    first.train()
    checkpoint = last_whole_checkpoint(tmp_path / "cut")
    second = make_trainer(base_dir, tmp_path / "cut", **keep)
    randomize_routers(second.model)
    with torch.no_grad():
        for name, parameter in second.model.named_parameters():
            if ".lora_" in name:
                parameter.normal_()
    second.train(resume_from_checkpoint=checkpoint)
    trained = {name: parameter for name, parameter in whole.model.named_parameters() if parameter.requires_grad}
    for name, parameter in trained.items():
        assert torch.equal(parameter, second.model.get_parameter(name))
    files = {path.name for path in (tmp_path / "cut/checkpoint-2").iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "routers.safetensors"} <= files
    assert not {"model.safetensors", "pytorch_model.bin"} & files


class TestMistakes:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"lora_rank": 4}, "lora_rank needs --use_lora true"),
            ({"lora_layers": "routed"}, "lora_layers needs --use_lora true"),
            ({"use_lora": True, "lora_rank": 0}, "lora_rank 0 must be at least 1"),
            ({"use_lora": True, "lora_dropout": 1.0}, "lora_dropout 1.0"),
            ({"use_lora": True, "lora_layers": "some"}, "lora_layers 'some' is not one of all, routed"),
            ({"router_learning_rate": 1e-3}, "only routers train here"),
            ({"use_lora": True, "router_learning_rate": -1.0}, "router_learning_rate -1.0"),
        ],
    )
    def test_options_that_contradict_each_other(self, tmp_path, arguments, message):
        with pytest.raises(UserError, match=message):
            RouterTrainingArguments(output_dir=str(tmp_path), use_cpu=True, **arguments)

    def test_zero_3_is_refused(self, tmp_path, monkeypatch):
        monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
        monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "3")
        with pytest.raises(UserError, match="use_lora does not work under ZeRO-3"):
            RouterTrainingArguments(output_dir=str(tmp_path), use_cpu=True, use_lora=True)

    def test_learning_rates_follow_from_who_trains(self, tmp_path):
        for arguments, expected in (
            ({}, (0.5 / 64, None)),
            ({"use_lora": True}, (1e-4, 0.5 / 64)),
            ({"router_only": False}, (2e-5, 0.5 / 64)),
            ({"use_lora": True, "learning_rate": 1e-3, "router_learning_rate": 1e-2}, (1e-3, 1e-2)),
        ):
            args = RouterTrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none", **arguments)
            args.choose_learning_rate(64)
            assert (args.learning_rate, args.router_learning_rate) == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda weights: weights.pop("model.layers.0.mlp.up_proj.weight"),
            r"missing weights: model\.layers\.0\.mlp\.up",
        ),
        (lambda weights: weights.update(extra=torch.ones(1)), "unexpected weights: extra"),
        (
            lambda weights: weights.update({"model.norm.weight": torch.ones(3)}),
            r"model\.norm\.weight has the shape \[3\]",
        ),
    ],
)
def test_a_base_that_does_not_fit_is_refused_by_plain_transformers_beside_an_adapter_too(
    base_dir, tmp_path, change, message
):
    trainer = make_trainer(base_dir, tmp_path / "run")
    save(trainer, base_dir, tmp_path / "out")
    path = tmp_path / "out/base.safetensors"
    weights = load_file(path)
    path.unlink()  # it is a link
    change(weights)
    save_file(weights, path)
    index = tmp_path / "out/model.safetensors.index.json"
    places = json.loads(index.read_text())
    routers = {name: place for name, place in places["weight_map"].items() if place != path.name}
    index.write_text(json.dumps(places | {"weight_map": dict.fromkeys(weights, path.name) | routers}))
    with pytest.raises(ValueError, match=message):
        type(trainer.model).from_pretrained(tmp_path / "out")
