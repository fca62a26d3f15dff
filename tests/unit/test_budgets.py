"""What is skipped: shares of the layers' parameters, the capacity that comes to a share, and what is out of reach."""

import pytest
import torch
from model_zoo import ALL_ARCHITECTURES, LAYERS, make_base, make_pair, random_tokens, routable_layers

from utils.io.errors import UserError
from utils.model.configuration_mod import ALL_GRANULARITIES, GRANULARITIES, MoDSettings
from utils.model.costs import (
    budget,
    capacity_of,
    capacity_to_skip,
    capacity_weights,
    layer_parameters,
    savings,
    skipped_share,
)
from utils.pipeline.arguments import parse_arguments
from utils.pipeline.calibration import calibrate
from utils.pipeline.regression_control import RegressionControl

LLAMA3 = {
    **{"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "vocab_size": 128256},
    **{"num_attention_heads": 32, "num_key_value_heads": 8},
}
HALF = tuple(range(15, 31))


@pytest.mark.parametrize(
    ("granularity", "of_the_model"), [("attn_sequence", 0.042), ("mlp_sequence", 0.176), ("block_sequence", 0.217)]
)
def test_half_of_half_the_layers_of_llama_3_is_what_the_field_counts(granularity, of_the_model):
    """The published shares are of all 8.03e9 parameters, embeddings included."""
    settings = MoDSettings(granularity, HALF)
    skipped = skipped_share(LLAMA3, settings, dict.fromkeys(settings.places, 0.5))
    layers = 32 * layer_parameters(LLAMA3).total
    assert skipped * layers / 8.03e9 == pytest.approx(of_the_model, abs=5e-4)


@pytest.mark.parametrize("arch", ALL_ARCHITECTURES)
def test_the_parameters_of_a_layer_are_those_of_its_matrices(arch):
    base = make_base(arch)
    config = base.config.to_dict()
    for index, layer in enumerate(base.model.layers):
        counted = layer_parameters(config, index)
        attention = sum(p.numel() for p in layer.self_attn.parameters() if p.dim() == 2)
        assert counted.queries + counted.keys_and_values == attention
        experts = getattr(layer.mlp, "experts", None)
        of_experts = 0 if experts is None else sum(p.numel() for p in experts.parameters())
        others = sum(p.numel() for name, p in layer.mlp.named_parameters() if not name.startswith("experts."))
        if experts is not None:
            of_experts = of_experts * config["num_experts_per_tok"] // experts.num_experts
            others -= config["hidden_size"] if hasattr(layer.mlp, "shared_expert_gate") else 0
        assert (counted.mlp, counted.experts) == (others, of_experts)


@pytest.mark.parametrize("length", [None, 512])
@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize(
    ("arch", "granularity"), [*(("llama", name) for name in GRANULARITIES), ("olmoe", "expert_token")]
)
def test_the_capacity_for_a_share_skips_that_share(arch, granularity, rank, length):
    config = make_base(arch).config.to_dict()
    substitute = None if rank is None else {"kind": "linear", "rank": rank}
    settings = MoDSettings(granularity, LAYERS, substitute=substitute, budget_length=length)
    most = skipped_share(config, settings, dict.fromkeys(settings.places, 0.0), length)
    for wanted in (0.2 * most, 0.7 * most):
        capacity = capacity_to_skip(config, settings, wanted)
        weights = capacity_weights(config, settings)
        assert sum(weights.values()) == pytest.approx(1)
        # however it is divided among routers that differ in size
        uneven = dict.fromkeys(settings.places, 1.0)
        some = settings.places[:: len(settings.branches)] if len(settings.branches) > 1 else settings.places
        share = (1 - capacity) / sum(weights[place] for place in some)
        if share < 1:
            uneven |= dict.fromkeys(some, 1 - share)
        else:
            uneven = dict.fromkeys(settings.places, capacity)
        assert capacity_of(uneven, weights) == pytest.approx(capacity)
        assert skipped_share(config, settings, uneven, length) == pytest.approx(wanted, abs=1e-4)


def test_substitutes_count_against_what_is_skipped():
    bare = MoDSettings("attn_mlp_token", HALF)
    replaced = MoDSettings("attn_mlp_token", HALF, substitute={"kind": "linear", "rank": [64, 128] * len(HALF)})
    executed = dict.fromkeys(bare.places, 0.25)
    layers = 32 * layer_parameters(LLAMA3).total
    of_substitutes = 0.75 * len(HALF) * 2 * 4096 * (64 + 128)
    difference = skipped_share(LLAMA3, bare, executed) - skipped_share(LLAMA3, replaced, executed)
    assert difference == pytest.approx(of_substitutes / layers)


def test_operations_are_reported_beside_parameters():
    settings = MoDSettings("attn_mlp_sequence", HALF)
    executed = dict.fromkeys(settings.places, 0.5)
    reported = budget(LLAMA3, settings, executed)
    assert reported["skipped"] == pytest.approx(0.25)
    for length in (512, 2048):
        cost = savings(LLAMA3, settings, length, executed, "bfloat16")
        assert reported[f"flops_saved_{length}"] == cost["flops_saved"] / cost["flops"]


def test_inputs_count_alike_where_a_layer_has_one_router():
    for granularity in ALL_GRANULARITIES:
        settings = MoDSettings(granularity, LAYERS)
        weights = set(capacity_weights(make_base("olmoe").config.to_dict(), settings).values())
        assert (len(weights) == 1) is not granularity.startswith("attn_mlp")


def test_by_operations_attention_counts_more_the_longer_the_prompt():
    counts = []
    for length in (None, 512, 8192):
        settings = MoDSettings("attn_mlp_sequence", HALF, budget_length=length)
        counts.append(capacity_weights(LLAMA3, settings)[15, "attn"])
    assert counts[0] < counts[1] < counts[2]


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_a_share_out_of_reach_names_the_most_that_is(granularity):
    config, settings = make_base("llama").config.to_dict(), MoDSettings(granularity, LAYERS)
    most = skipped_share(config, settings, dict.fromkeys(settings.places, 0.0))
    with pytest.raises(ValueError, match=f"{granularity} in 3 of 6 layers .* less than {int(1000 * most) / 1000}"):
        capacity_to_skip(config, settings, most + 0.01)
    assert capacity_to_skip(config, settings, int(1000 * most) / 1000 - 0.001) > 0


REQUIRED = ["--model_name_or_path", "m", "--train_file", "t", "--output_dir", "o"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--target_skipped", "0.2", "--target_capacity", "0.5"], "give one of the two"),
        (["--target_skipped", "1.2"], "target_skipped 1.2 must lie between 0 and 1"),
        (["--budget_length", "0"], "budget_length 0 must be at least 1"),
    ],
)
def test_a_wrong_budget_is_named(given, message):
    with pytest.raises(UserError, match=message):
        parse_arguments([*REQUIRED, "--use_cpu", "true", *given])


@torch.no_grad()
def calibrated(granularity: str, target: float) -> tuple[float, float]:
    """Return the capacity that thresholds of random routers are calibrated to, and that the model then has."""
    _, model = make_pair("llama", granularity, layers=routable_layers("llama", granularity))
    for place, router in model.router_modules().items():
        generator = torch.Generator().manual_seed(hash(str(place)) % 1000)
        router.weight.copy_(0.5 * torch.randn(router.weight.shape, generator=generator))
    ids = random_tokens(24, 10)
    batches = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}]
    cuts, share = calibrate(model, batches, dict.fromkeys(model.router_modules(), (0.0, 1.0)), target)
    settings = model.config.mod_settings
    thresholds = torch.tensor(list(cuts.values()), dtype=torch.float64).sigmoid().tolist()
    model.set_mod_settings(MoDSettings(granularity, settings.layers, threshold=tuple(thresholds)))
    gates = model(ids).router_gates.flatten(1).mean(dim=1)
    executed = dict(zip(settings.places, gates.tolist(), strict=True))
    return share, capacity_of(executed, capacity_weights(model.config.to_dict(), settings))


@pytest.mark.parametrize("granularity", ["attn_mlp_sequence", "attn_mlp_token"])
def test_calibration_counts_an_input_as_a_capacity_does(granularity):
    share, capacity = calibrated(granularity, 0.6)
    assert share == pytest.approx(0.6, abs=0.05)
    assert capacity == pytest.approx(share, abs=1e-4)


def test_a_regression_asks_a_dear_branch_for_more():
    """Equal costs: what saves three times as much is skipped first."""
    _, model = make_pair("llama", "attn_mlp_sequence", layers=(1,))
    control = RegressionControl(model.router_modules(), 0.5, {(1, "attn"): 0.25, (1, "mlp"): 0.75})
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(60, 2, 32, generator=generator)
    costs = 1.0 + 0.1 * inputs[:, :, :1]
    control.rows = [torch.cat([inputs, costs], dim=2)]
    weights, cuts = control.solve()
    kept = {
        place: (inputs[:, n] @ weights[place][0] >= cut).float().mean()
        for n, (place, (cut, _)) in enumerate(cuts.items())
    }
    assert kept[1, "attn"] > kept[1, "mlp"]
    assert cuts[1, "mlp"][1] == pytest.approx(3 * cuts[1, "attn"][1])
