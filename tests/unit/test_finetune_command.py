"""What `finetune_mod.py` makes of rows, models and routers before training starts, and of results at its end."""

import logging
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from model_zoo import HIDDEN_SIZE, LAYERS, make_pair, randomize_routers, randomize_substitutes
from safetensors.torch import load_file, save_file

from entrypoints.finetune.finetune_mod import at_most, prepare_model
from utils.data.splitting import set_aside
from utils.io.errors import UserError
from utils.model.checkpoint import make_settings, read_config, router_name, substitute_parameters, write_checkpoint
from utils.pipeline.arguments import RouterTrainingArguments
from utils.pipeline.processes import ACCELERATE_FLAGS, check_accelerate_variables


def test_a_regression_learns_from_so_many_rows_and_the_log_says_so(caplog):
    caplog.set_level(logging.INFO)
    train_set, calibration_set = set_aside(Dataset.from_dict({"number": list(range(80))}), 8)
    assert at_most(train_set, 72) is train_set
    assert not caplog.messages
    assert at_most(train_set, 50)["number"][:] == list(range(50))
    assert caplog.messages == ["the regression learns from 50 of 72 rows (--regression_rows)"]
    assert calibration_set["number"][:] == list(range(72, 80))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((f"ACCELERATE_{name}", "maybe") for name in ACCELERATE_FLAGS),
        *(("ACCELERATE_MIXED_PRECISION", value) for value in ("fp99", "fp8", "")),
        ("ACCELERATE_DYNAMO_BACKEND", "fast"),
        ("ACCELERATE_TORCH_DEVICE", "gpu"),
    ],
)
def test_what_accelerate_cannot_read_in_the_environment_is_one_line(tmp_path, monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=f"{name}={value} in the environment: ") as refused:
        RouterTrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    assert "\n" not in str(refused.value)


def test_what_accelerate_can_read_in_the_environment_is_taken(monkeypatch):
    for name, value in {
        "USE_CPU": "TRUE",
        "DEBUG_MODE": "off",
        "DYNAMO_BACKEND": "no",
        "MIXED_PRECISION": "bf16",
    }.items():
        monkeypatch.setenv(f"ACCELERATE_{name}", value)
    check_accelerate_variables()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A checkpoint with routers and maps, of a dense base that lies beside it."""
    root = tmp_path_factory.mktemp("routers")
    base, model = make_pair("llama", "block_token", substitute={"kind": "linear", "rank": 3})
    base.save_pretrained(root / "base")
    randomize_substitutes(randomize_routers(model))
    routers = {router_name(layer): router.weight for layer, router in model.router_modules().items()}
    maps = substitute_parameters(model)
    write_checkpoint(root / "trained", root / "base", model.mod_settings, routers, substitutes=maps)
    model.save_pretrained(root / "saved")
    return root / "trained"


class TestStartingFromRouters:
    def prepare(self, model_dir, router_dir, dtype="float32", substitute="linear", rank=None):
        settings = make_settings(read_config(model_dir) | {"num_hidden_layers": 6}, granularity="block_token")
        if settings.substitute is None:
            settings = type(settings)("block_token", LAYERS)
        model_args = SimpleNamespace(dtype=dtype, attn_implementation="sdpa", router_dir=router_dir)
        training_args = SimpleNamespace(
            device=torch.device("cpu"),
            router_only=True,
            use_lora=False,
            capacity_control="budget",
            substitute=substitute,
            substitute_rank=rank,
            substitute_learning_rate=None,
        )
        return prepare_model(model_args, training_args, model_dir, settings)

    @pytest.mark.parametrize("form", ["trained", "trained/routers.safetensors", "saved"])
    def test_the_maps_that_they_were_trained_with_come_along(self, trained, form):
        model = self.prepare(trained.parent / "base", trained.parent / form)
        assert model.mod_settings.substitute == {"kind": "linear", "rank": 3}
        maps = load_file(trained / "substitutes.safetensors")
        for name, parameter in substitute_parameters(model).items():
            assert parameter.equal(maps[name])

    @pytest.mark.parametrize("form", ["trained", "trained/routers.safetensors", "saved"])
    def test_a_run_without_maps_is_refused(self, trained, form):
        with pytest.raises(UserError, match=r"trained with substitutes, which --substitute none would leave out"):
            self.prepare(trained.parent / "base", trained.parent / form, substitute="none")

    def test_another_rank_is_refused_and_routers_without_maps_get_new_ones(self, trained, tmp_path):
        with pytest.raises(UserError, match="another rank"):
            self.prepare(trained.parent / "base", trained, rank=5)
        save_file(load_file(trained / "routers.safetensors"), tmp_path / "routers.safetensors")
        model = self.prepare(trained.parent / "base", tmp_path)
        assert model.mod_settings.substitute == {"kind": "linear", "rank": HIDDEN_SIZE // 8}

    def test_maps_of_a_bfloat16_checkpoint_train_in_float32(self, trained):
        model = self.prepare(trained, None, dtype="bfloat16")
        assert model.dtype == torch.bfloat16
        for parameter in substitute_parameters(model).values():
            assert parameter.dtype == torch.float32
            assert parameter.requires_grad
