"""Training on a simulated GPU: no tensor on the wrong device, no host synchronisation in a micro-step, same routers."""

import contextlib

import pytest
import torch
from simulated_gpu import place, real, simulated_gpus, trainer_on_gpu
from test_trainer import VOCABULARY, MixtralConfig, MixtralForCausalLM, make_rows, make_trainer, save_base
from transformers import LlamaConfig, LlamaForCausalLM

from utils.model.lora import add_lora

DISTILLED = {"distillation_weight": 1.0}
RECIPES = {
    "paper by sequence": ("attn_sequence", {"capacity_control": "hinge", "capacity_scope": "layer"}),
    "paper by token": ("mlp_token", {"capacity_control": "hinge", "capacity_scope": "layer"}),
    "default by sequence": ("block_sequence", {"capacity_control": "regression", "rank": 4, **DISTILLED}),
    "default by token": ("block_token", {"capacity_control": "budget", "rank": 4, **DISTILLED}),
    "default of experts": ("expert_token", {"capacity_control": "budget", "rank": 4, **DISTILLED}),
    "trained backbone": ("attn_token", {"capacity_control": "budget", "router_only": False}),
    "adapters": ("attn_sequence", {"capacity_control": "budget", "use_lora": True, "lora_rank": 2}),
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2}
    return {
        False: save_base(LlamaForCausalLM, LlamaConfig, tmp_path_factory.mktemp("llama")),
        True: save_base(MixtralForCausalLM, MixtralConfig, tmp_path_factory.mktemp("mixtral"), **experts),
    }


def train(base_dir, output_dir, granularity, on_gpu, rank=None, **arguments):
    """Train, settle, evaluate; returns all that was trained, and the syncs of each micro-step."""
    syncs = []
    with contextlib.ExitStack() as stack:
        events = stack.enter_context(simulated_gpus()) if on_gpu else None
        if on_gpu:
            stack.enter_context(trainer_on_gpu())
        trainer = make_trainer(
            base_dir,
            output_dir,
            granularity,
            rank=rank,
            routers_seed=None,
            per_device_train_batch_size=4,
            capacities=[0.9],
            **arguments,
        )
        if trainer.args.use_lora:
            torch.manual_seed(3)
            add_lora(trainer.model, rank=2, alpha=4, dropout=0.0, targets=["q_proj"], only_routed=False)
        if on_gpu:
            place(trainer.model)
            step = trainer.training_step

            def counted_step(*args, **kwargs):
                events.clear()
                loss = step(*args, **kwargs)
                syncs.append(dict(events.syncs))
                return loss

            trainer.training_step = counted_step
        trainer.calibrate_on(make_rows(4, seed=9), ends=range(VOCABULARY))  # answers of one token
        trainer.train()
        trainer.finish()
        with trainer.dense():
            trainer.evaluate()
        trainer.evaluate()
        trained = {name: weight for name, weight in trainer.model.named_parameters() if weight.requires_grad}
        return {name: real(weight.detach()).clone() for name, weight in trained.items()}, syncs


@pytest.mark.parametrize(
    "recipe", [pytest.param(name, marks=[pytest.mark.slow] * ("default by" not in name)) for name in RECIPES]
)
def test_a_recipe_trains_without_waiting_for_the_device_and_to_the_same_weights(bases, tmp_path, recipe):
    granularity, arguments = RECIPES[recipe]
    base_dir = bases[granularity == "expert_token"]
    expected, _ = train(base_dir, tmp_path / "cpu", granularity, on_gpu=False, **arguments)
    trained, syncs = train(base_dir, tmp_path / "gpu", granularity, on_gpu=True, **arguments)
    assert syncs == [{}] * 4
    assert trained.keys() == expected.keys()
    for name, weight in trained.items():
        torch.testing.assert_close(weight, expected[name], atol=1e-4, rtol=1e-4, msg=name)
