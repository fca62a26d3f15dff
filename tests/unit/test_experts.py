"""Experts that skip: what is computed, what is left alone, who gets a gradient, and the files of either layout."""

import json

import pytest
import torch
from model_zoo import (
    HIDDEN_SIZE,
    LAYERS,
    MOE_ARCHITECTURES,
    NUM_EXPERTS,
    NUM_LAYERS,
    add_routers,
    make_base,
    make_pair,
    mod_config,
    pad,
    random_tokens,
    randomize_routers,
    texts,
)
from rounding import assert_same_in_low_precision
from safetensors.torch import load_file, save_file

from utils.io.errors import UserError
from utils.model.checkpoint import load_mod_model, make_settings, write_checkpoint
from utils.model.configuration_mod import EXECUTIONS, EXPERT_GRANULARITY, MoDSettings
from utils.model.routing_mod import Routing
from utils.pipeline.losses import executed_inputs

LOGITS_BOUND = 5e-5

every_architecture = pytest.mark.parametrize("arch", list(MOE_ARCHITECTURES))


def expert_pair(arch: str, **settings):
    """Return a random base and the model that routes its experts."""
    return make_pair(arch, EXPERT_GRANULARITY, **settings)


class AssignmentCounter:
    """Counts the assignments that the experts of the routed layers compute: layer -> number since it was read."""

    def __init__(self, model):
        self.counts = dict.fromkeys(model.config.mod_settings.layers, 0)
        for index in self.counts:
            model.model.layers[index].mlp.experts.act_fn = Counted(self, index)

    def read(self) -> dict[int, int]:
        read, self.counts = self.counts, dict.fromkeys(self.counts, 0)
        return read


class Counted(torch.nn.SiLU):
    """The activation of a layer's experts, which each assignment that is computed passes once, as a row."""

    def __init__(self, counter: AssignmentCounter, index: int):
        super().__init__()
        self.counter, self.index = counter, index

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        self.counter.counts[self.index] += len(rows)
        return super().forward(rows)


@every_architecture
@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm", "eager"])
def test_a_rejected_assignment_is_not_computed(arch, implementation):
    _, model = expert_pair(arch)
    randomize_routers(model, scale=0.7)
    model.set_experts_implementation(implementation)
    assert model.config._experts_implementation == implementation
    counter = AssignmentCounter(model)
    input_ids = random_tokens(5, 9)
    with torch.no_grad():
        sparse = model(input_ids, execution="sparse")
        counts = counter.read()
        dense = model(input_ids, execution="dense")
    kept = dict(zip(LAYERS, sparse.router_gates.flatten(1).sum(dim=1).int().tolist(), strict=True))
    assert counts == kept
    assert 0 < sum(kept.values()) < sparse.router_gates.numel()
    assert sparse.router_gates.equal(dense.router_gates)
    assert sparse.router_experts.equal(dense.router_experts)
    torch.testing.assert_close(sparse.logits, dense.logits, atol=LOGITS_BOUND, rtol=0)


@every_architecture
def test_the_output_says_which_expert_each_decision_is_for(arch):
    _, model = expert_pair(arch)
    randomize_routers(model, scale=0.7)
    input_ids, top_k = random_tokens(3, 7), model.config.num_experts_per_tok
    with torch.no_grad():
        output = model(input_ids)
        unrouted = model(input_ids, route=False)
    assert output.router_experts.shape == output.router_gates.shape == (len(LAYERS), 3, 7, top_k)
    assert output.router_experts.dtype == torch.int64
    assert output.router_experts.max() < NUM_EXPERTS
    assert output.router_experts.sort().values.diff(dim=-1).gt(0).all(), "a token has an expert twice"
    assert "router_experts" not in unrouted


@every_architecture
def test_where_all_is_rejected_only_shared_experts_are_left(arch):
    base, model = expert_pair(arch, threshold=0.6)
    for index in LAYERS:
        torch.nn.init.zeros_(base.model.layers[index].mlp.experts.down_proj)
    counter = AssignmentCounter(model)
    with torch.no_grad():
        output = model(random_tokens(2, 9))
        torch.testing.assert_close(
            output.logits, base(random_tokens(2, 9), use_cache=False).logits, atol=LOGITS_BOUND, rtol=0
        )
    assert output.router_gates.eq(0).all()
    assert not any(counter.read().values())


@every_architecture
def test_an_expert_may_have_a_threshold_of_its_own(arch):
    """Routers at zero and thresholds on either side of one half drop given experts, whatever the input."""
    dropped = {1: (0, 4), 3: (), 4: (2,)}
    threshold = tuple(tuple(0.75 if e in dropped[i] else 0.5 for e in range(NUM_EXPERTS)) for i in LAYERS)
    base, model = expert_pair(arch, threshold=threshold)
    for index, experts in dropped.items():
        for expert in experts:
            torch.nn.init.zeros_(base.model.layers[index].mlp.experts.down_proj[expert])
    with torch.no_grad():
        expected = base(random_tokens(3, 9), use_cache=False).logits
        for execution in EXECUTIONS:
            output = model(random_tokens(3, 9), execution=execution)
            torch.testing.assert_close(output.logits, expected, atol=LOGITS_BOUND, rtol=0)
    for index, gates, chosen in zip(LAYERS, output.router_gates, output.router_experts, strict=True):
        assert gates.eq(0).equal(torch.isin(chosen, torch.tensor(dropped[index], dtype=torch.int64)))
    assert json.loads(json.dumps(model.config.mod_settings.to_dict()))["threshold"] == [list(row) for row in threshold]
    with pytest.raises(ValueError, match=rf"threshold has 2 numbers for the {NUM_EXPERTS} experts of layer 1"):
        mod_config(base, EXPERT_GRANULARITY, threshold=((0.5, 0.5), 0.5, 0.5))


@every_architecture
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sparse_equals_dense_in_low_precision(arch, dtype):
    _, model = make_pair(arch, EXPERT_GRANULARITY, layers=(1,))
    randomize_routers(model, scale=0.7).to(dtype)
    with torch.no_grad():
        dense, sparse = (model(random_tokens(6, 11), execution=name) for name in ("dense", "sparse"))
    assert sparse.router_gates.equal(dense.router_gates)
    assert sparse.logits.dtype == dtype
    assert_same_in_low_precision(sparse.logits, dense.logits, dtype)


@every_architecture
def test_sparse_equals_dense_under_autocast(arch):
    _, model = make_pair(arch, EXPERT_GRANULARITY, layers=(1,))
    randomize_routers(model, scale=0.7)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        dense, sparse = (model(random_tokens(6, 11), execution=name) for name in ("dense", "sparse"))
    assert sparse.router_gates.equal(dense.router_gates)
    assert_same_in_low_precision(sparse.logits, dense.logits, torch.bfloat16)


@every_architecture
def test_the_gradient_of_an_experts_router_is_that_of_the_formula(arch):
    """dL/dW_e = sum over the assignments to e of dL/dM * s * (1 - s) * x, executed or not (Eq. 1, 2, 4 and 8)."""
    base, model = make_pair(arch, EXPERT_GRANULARITY, layers=(1,))
    randomize_routers(model, scale=1.0)
    routed, plain = model.model.layers[1], base.model.layers[1]
    hidden_states, upstream = torch.randn(2, 6, HIDDEN_SIZE), torch.randn(2, 6, HIDDEN_SIZE)
    position_ids = torch.arange(6)[None]
    kwargs = {
        "attention_mask": torch.full((6, 6), float("-inf")).triu(1)[None, None],
        "position_ids": position_ids,
        "position_embeddings": base.model.rotary_emb(hidden_states, position_ids=position_ids),
        "past_key_values": None,
    }
    routing = Routing(token_mask=None, sparse=False)
    (routed(hidden_states, routing=routing, **kwargs) * upstream).sum().backward()
    decision = routing.decisions[1]
    assert 0 < decision.gates.mean() < 1

    after = hidden_states + plain.self_attn(hidden_states=plain.input_layernorm(hidden_states), **kwargs)[0]
    x = plain.post_attention_layernorm(after).detach().flatten(0, 1)
    experts = plain.mlp.experts
    expected = torch.zeros(NUM_EXPERTS, HIDDEN_SIZE)
    _, weights, chosen = plain.mlp.gate(x)
    for token in range(len(x)):
        for k, expert in enumerate(chosen[token].tolist()):
            gate, up = (experts.gate_up_proj[expert] @ x[token]).chunk(2)
            output = weights[token, k] * (experts.down_proj[expert] @ (experts.act_fn(gate) * up))
            score = torch.sigmoid(x[token] @ routed.router.weight[expert])
            slope = (output * upstream.flatten(0, 1)[token]).sum() * score * (1 - score)
            expected[expert] += (slope * x[token]).detach()
    scale = expected.abs().max().item()
    torch.testing.assert_close(routed.router.weight.grad, expected, atol=1e-5 * scale, rtol=1e-3)


@every_architecture
@pytest.mark.parametrize("threshold", [0.5, 0.6])
def test_only_the_routers_get_a_gradient_and_the_gate_is_frozen(arch, threshold):
    _, model = expert_pair(arch, threshold=threshold)
    model.requires_grad_(False)
    for router in model.router_modules().values():
        router.weight.requires_grad_(True)
    input_ids, mask = pad(texts((9, 4)), "right")
    model.train()(input_ids, mask, labels=input_ids.masked_fill(mask == 0, -100)).loss.backward()
    with_gradient = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert with_gradient == {f"model.layers.{index}.router.weight" for index in LAYERS}
    assert all(router.weight.grad.abs().max() > 1e-6 for router in model.router_modules().values())


@every_architecture
def test_the_bases_load_balancing_loss_is_no_part_of_the_loss(arch):
    base = make_base(arch)
    balanced = make_base(arch, output_router_logits=True)
    model = add_routers(balanced, EXPERT_GRANULARITY)
    input_ids = random_tokens(2, 8)
    with torch.no_grad():
        expected = base(input_ids, labels=input_ids, use_cache=False).loss
        output = model(input_ids, labels=input_ids)
        assert output.loss == expected
        assert len(output.router_logits) >= NUM_LAYERS - 1
        if arch != "deepseek_v2":  # whose class computes none
            assert output.aux_loss > 0
            assert balanced(input_ids, labels=input_ids, use_cache=False).loss != expected


def test_capacity_counts_the_assignments_of_real_tokens():
    gates = torch.tensor([[[[1.0, 0.0], [1.0, 1.0], [1.0, 1.0]], [[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]]]])
    executed, inputs = executed_inputs(gates, None)
    assert executed.tolist() == [[5.0, 2.0]]
    assert inputs.tolist() == [6.0, 6.0]
    executed, inputs = executed_inputs(gates, torch.tensor([[0, 1, 1], [1, 1, 0]]))
    assert executed.tolist() == [[4.0, 1.0]]
    assert inputs.tolist() == [4.0, 4.0]


def test_a_model_without_experts_is_refused():
    with pytest.raises(ValueError, match="expert_token needs a mixture-of-experts model, and mod_llama is none"):
        mod_config(make_base("llama"), EXPERT_GRANULARITY)


def test_layers_without_experts_are_refused_with_the_values_that_work():
    base = make_base("deepseek_v2")
    with pytest.raises(ValueError, match=r"layers \[0\] of \[0, 1\] have no experts; mod_n may be 1 to 4"):
        mod_config(base, EXPERT_GRANULARITY, layers=(0, 1))
    config = {"model_type": "deepseek_v2", **base.config.to_dict()}
    assert make_settings(config, 4, EXPERT_GRANULARITY).layers == (1, 2, 3, 4)
    with pytest.raises(UserError, match="mod_n may be 1 to 4"):
        make_settings(config, 5, EXPERT_GRANULARITY)
    every_other = make_base("qwen2_moe", mlp_only_layers=None, decoder_sparse_step=2)
    with pytest.raises(ValueError, match=r"layers \[4\] of \[4\] have no experts; no mod_n avoids them"):
        mod_config(every_other, EXPERT_GRANULARITY, layers=(4,))
    mod_config(every_other, EXPERT_GRANULARITY, layers=(1, 3))


@pytest.fixture(params=MOE_ARCHITECTURES)
def layouts(request, tmp_path):
    """A random base in two folders: each expert by itself, as published, and those of a layer as one."""
    base = make_base(request.param)
    for name in ("apart", "merged"):
        base.save_pretrained(tmp_path / name)
    apart = load_file(tmp_path / "apart/model.safetensors")
    merged = {name: value.contiguous() for name, value in base.state_dict().items()}
    save_file(merged, tmp_path / "merged/model.safetensors", metadata={"format": "pt"})
    assert sum(".experts." in name for name in apart) > sum(".experts." in name for name in merged)
    return base, tmp_path


def test_a_checkpoint_of_either_layout_has_the_bases_weights_and_its_routers(layouts):
    base, folder = layouts
    settings = MoDSettings(EXPERT_GRANULARITY, LAYERS)
    routers = {f"model.layers.{i}.router.weight": torch.randn(NUM_EXPERTS, HIDDEN_SIZE) for i in LAYERS}
    for name in ("apart", "merged"):
        write_checkpoint(folder / f"{name}-mod", folder / name, settings, routers)
        model = load_mod_model(folder / f"{name}-mod")
        state = model.state_dict()
        for weight, value in base.state_dict().items():
            assert state[weight].equal(value), weight
        for weight, value in routers.items():
            assert state[weight].equal(value)
        trained = {weight: value + 1 for weight, value in state.items()}
        write_checkpoint(folder / f"{name}-trained", folder / name, settings, routers, trained_base=trained)
        again = load_mod_model(folder / f"{name}-trained").state_dict()
        for weight in base.state_dict():
            assert again[weight].equal(trained[weight]), weight


def test_an_expert_that_is_not_there_is_refused_by_name(layouts):
    _, folder = layouts
    weights = load_file(folder / "apart/model.safetensors")
    lost = next(name for name in sorted(weights) if ".experts.3." in name)
    weights.pop(lost)
    save_file(weights, folder / "apart/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=f"lacks the weight {lost}"):
        load_mod_model(folder / "apart", MoDSettings(EXPERT_GRANULARITY, LAYERS))
