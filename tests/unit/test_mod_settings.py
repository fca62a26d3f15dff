"""The object `mod` of a config: which layers are routed, what is allowed, and that it survives a file."""

import json

import pytest
import torch
from model_zoo import ARCHITECTURES, NUM_LAYERS, make_base, make_pair, mod_config, random_tokens

from utils.model.checkpoint import make_settings
from utils.model.configuration_mod import (
    ALL_GRANULARITIES,
    GRANULARITIES,
    MoDLlamaConfig,
    MoDSettings,
    check_choice,
    routed_layers,
)

every_architecture = pytest.mark.parametrize("arch", list(ARCHITECTURES))
every_granularity = pytest.mark.parametrize("granularity", GRANULARITIES)


@pytest.mark.parametrize(
    ("num_hidden_layers", "mod_n", "layers"),
    [
        (32, 16, list(range(15, 31))),
        (30, 14, list(range(15, 29))),
        (6, 1, [4]),
        (6, 4, [1, 2, 3, 4]),
        (6, 5, [0, 1, 2, 3, 4]),
        (6, 6, [0, 1, 2, 3, 4]),
        (2, 1, [0]),
        (2, 2, [0]),
    ],
)
def test_mod_n_routes_the_deepest_layers_but_the_last(num_hidden_layers, mod_n, layers):
    assert routed_layers(num_hidden_layers, mod_n) == layers


@pytest.mark.parametrize("num_hidden_layers", [2, 3, 6, 32])
def test_mod_n_follows_its_formula_wherever_it_is_allowed(num_hidden_layers):
    for mod_n in range(1, num_hidden_layers + 1):
        expected = [i for i in range(num_hidden_layers) if num_hidden_layers - mod_n - 1 <= i < num_hidden_layers - 1]
        assert routed_layers(num_hidden_layers, mod_n) == expected


@pytest.mark.parametrize("mod_n", [0, -1, 7, 32])
def test_mod_n_out_of_range_is_an_error_that_names_value_and_range(mod_n):
    with pytest.raises(ValueError, match=rf"mod_n {mod_n} .*from 1 to 6"):
        routed_layers(6, mod_n)


def test_a_model_of_one_layer_cannot_be_routed():
    with pytest.raises(ValueError, match="one layer"):
        routed_layers(1, 1)


@every_granularity
def test_a_granularity_names_its_target_and_its_level(granularity):
    settings = MoDSettings(granularity, (1,))
    assert settings.target in ("attn", "mlp", "block", "attn_mlp")
    assert settings.level in ("sequence", "token")
    assert f"{settings.target}_{settings.level}" == granularity


def test_the_six_granularities_are_there():
    assert {f"{target}_{level}" for target in ("attn", "mlp", "block") for level in ("sequence", "token")} <= set(
        GRANULARITIES
    )


@pytest.mark.parametrize(
    ("wrong", "near"), [("attn_sequnce", "attn_sequence"), ("mlp-token", "mlp_token"), ("blocktoken", "block_token")]
)
def test_an_unknown_granularity_names_the_near_one_and_all_allowed(wrong, near):
    with pytest.raises(ValueError, match=f"granularity '{wrong}'.*did you mean '{near}'") as error:
        MoDSettings(wrong, (1,))
    assert all(name in str(error.value) for name in GRANULARITIES)


def test_a_value_like_none_of_the_allowed_gets_no_suggestion():
    with pytest.raises(ValueError, match=r"colour 'zzz' is not one of red, green$"):
        check_choice("colour", "zzz", ("red", "green"))


@pytest.mark.parametrize("threshold", [0.0, 1.0, -0.1, 1.5, float("nan"), float("inf"), None, "0.5"])
def test_a_threshold_outside_zero_and_one_is_refused(threshold):
    with pytest.raises(ValueError, match=r"threshold .*between 0 and 1"):
        MoDSettings("attn_sequence", (1,), threshold=threshold)


def test_each_routed_layer_can_have_a_threshold_of_its_own():
    settings = MoDSettings("attn_sequence", (1, 3), threshold=[0.4, 0.6])
    assert (settings.threshold_of(1), settings.threshold_of(3)) == (0.4, 0.6)
    assert MoDSettings("attn_sequence", (1, 3), threshold=0.4).threshold_of(3) == 0.4
    assert MoDSettings.from_dict(json.loads(json.dumps(settings.to_dict()))) == settings
    with pytest.raises(ValueError, match="threshold has 1 numbers for 2 routed layers"):
        MoDSettings("attn_sequence", (1, 3), threshold=[0.4])
    with pytest.raises(ValueError, match=r"threshold 1.5 .*between 0 and 1"):
        MoDSettings("attn_sequence", (1, 3), threshold=[0.4, 1.5])


@pytest.mark.parametrize("capacity", [-0.1, 1.1, float("nan"), "half"])
def test_a_target_capacity_outside_zero_and_one_is_refused(capacity):
    with pytest.raises(ValueError, match=r"target_capacity .*between 0 and 1"):
        MoDSettings("attn_sequence", (1,), target_capacity=capacity)


@pytest.mark.parametrize("layers", [[], [2, 1], [1, 1], [-1], ["1"], [1.0], [True], None, 3])
def test_layers_that_are_not_ascending_indices_are_refused(layers):
    with pytest.raises(ValueError, match=r"mod\.layers .*ascending layer indices"):
        MoDSettings("attn_sequence", layers)


@every_architecture
@pytest.mark.parametrize("layers", [[NUM_LAYERS], [0, 99]])
def test_layers_that_the_model_does_not_have_are_refused(arch, layers):
    with pytest.raises(ValueError, match=rf"mod\.layers .*{layers[-1]}.*model of {NUM_LAYERS} layers"):
        mod_config(make_base(arch), "attn_sequence", layers)


@pytest.mark.parametrize(
    ("mod", "message"),
    [
        ({"granularity": "attn_sequence", "layers": [1], "treshold": 0.5}, r"unknown fields \['treshold'\].*threshold"),
        ({"layers": [1]}, "lacks granularity"),
        ({"granularity": "attn_token"}, "lacks layers"),
        ({}, "lacks granularity and layers"),
        ({"granularity": "atn_token", "layers": [1]}, "did you mean 'attn_token'"),
    ],
)
def test_an_incomplete_or_misspelt_object_mod_is_refused_by_field(mod, message):
    with pytest.raises(ValueError, match=message):
        MoDSettings.from_dict(mod)
    with pytest.raises(ValueError, match=message):
        MoDLlamaConfig(num_hidden_layers=NUM_LAYERS, mod=mod)


def test_a_config_without_the_object_mod_is_not_a_mod_checkpoint():
    with pytest.raises(ValueError, match="no object `mod`"):
        _ = MoDLlamaConfig().mod_settings


def test_thresholds_of_layers_hold_for_the_same_routing_only():
    mod = MoDSettings("attn_token", (3, 4), threshold=(0.4, 0.6)).to_dict()
    config = {"model_type": "mod_llama", "num_hidden_layers": 6, "hidden_size": 32, "mod": mod}
    assert make_settings(config, mod_n=2, granularity="attn_token").threshold == (0.4, 0.6)
    assert make_settings(config, mod_n=3).threshold == (0.5, 0.4, 0.6)
    assert make_settings(config, mod_n=1).threshold == (0.6,)
    assert make_settings(config, granularity="mlp_token").threshold == 0.5


def test_what_was_calibrated_holds_for_the_same_routing_only():
    table = ({"capacity": 0.5, "threshold": (0.6, 0.6)}, {"capacity": 0.9, "threshold": (0.2, 0.4)})
    mod = MoDSettings("attn_sequence", (3, 4), threshold=(0.6, 0.6), capacities=table, sequence_pooling="prompt")
    config = {"model_type": "mod_llama", "num_hidden_layers": 6, "hidden_size": 32, "mod": mod.to_dict()}
    assert make_settings(config, mod_n=2) == make_settings(config, target_capacity=None) == mod
    for others in ({"mod_n": 1}, {"mod_n": 3}, {"granularity": "mlp_sequence"}):
        settings = make_settings(config, **others)
        assert settings.capacities is settings.sequence_pooling is None


def test_between_capacities_thresholds_are_between_and_all_is_executed_at_1():
    table = [{"capacity": 0.5, "threshold": [0.6, 0.7]}, {"capacity": 0.9, "threshold": 0.4}]
    settings = MoDSettings("mlp_token", (1, 2), capacities=table)
    first, second = settings.at_capacity(0.7).threshold
    assert first == pytest.approx(0.5)
    assert 0.4 < second < 0.7
    assert settings.at_capacity(0.9).threshold == 0.4
    of_experts = ({"capacity": 0.5, "threshold": (0.6, (0.6, 0.7))}, {"capacity": 0.9, "threshold": ((0.4, 0.5), 0.4)})
    first, second = MoDSettings("expert_token", (1, 2), capacities=of_experts).at_capacity(0.7).threshold
    assert first == pytest.approx((0.5, 0.5505), abs=1e-4)
    assert second == pytest.approx((0.5, 0.5550), abs=1e-4)
    with pytest.raises(ValueError, match=r"0.95 is outside .*0.5 to 0.9 \(0.5, 0.9\); 1 executes everything"):
        settings.at_capacity(0.95)
    for each in (settings, MoDSettings("mlp_token", (1, 2), threshold=0.7)):
        everything = each.at_capacity(1.0)
        assert everything.target_capacity == 1.0
        assert MoDSettings.from_dict(json.loads(json.dumps(everything.to_dict()))) == everything


@pytest.mark.parametrize("granularity", ALL_GRANULARITIES)
def test_at_capacity_1_no_score_is_too_low(granularity):
    arch = "olmoe" if granularity == "expert_token" else "llama"
    _, model = make_pair(arch, granularity)
    for router in model.router_modules().values():
        router.weight.data.fill_(-1e6).index_fill_(1, torch.tensor([0]), 1e6)
    tokens = random_tokens(2, 5)
    with torch.no_grad():
        assert model(tokens).router_gates.mean() < 1
        model.set_capacity(1.0)
        output = model(tokens)
        assert output.router_scores.min() == 0
        assert output.router_gates.min() == 1
        torch.testing.assert_close(output.logits, model(tokens, route=False).logits, atol=2e-5, rtol=1e-5)


def test_nothing_is_known_between_thresholds_out_of_order():
    table = [{"capacity": 0.5, "threshold": [0.6, 0.3]}, {"capacity": 0.9, "threshold": [0.4, 0.4]}]
    settings = MoDSettings("mlp_token", (1, 2), capacities=table)
    assert settings.at_capacity(0.5).threshold == (0.6, 0.3)
    with pytest.raises(ValueError, match=r"the thresholds of 0.5 and 0.9 fall out of order"):
        settings.at_capacity(0.7)


@pytest.mark.parametrize("pooling", ["prompt", "all", None])
def test_what_a_sequence_was_calibrated_on_comes_back_from_json(pooling):
    settings = MoDSettings("attn_sequence", (1, 3), sequence_pooling=pooling)
    assert ("sequence_pooling" in settings.to_dict()) == (pooling is not None)
    assert MoDSettings.from_dict(json.loads(json.dumps(settings.to_dict()))) == settings
    with pytest.raises(ValueError, match=r"mod\.sequence_pooling 'promt' .*did you mean 'prompt'"):
        MoDSettings("attn_sequence", (1, 3), sequence_pooling="promt")


def test_settings_come_back_from_json():
    settings = MoDSettings("mlp_token", (1, 3), threshold=0.4, target_capacity=0.5, base_model="tiny")
    assert MoDSettings.from_dict(json.loads(json.dumps(settings.to_dict()))) == settings


@every_architecture
@every_granularity
def test_a_config_comes_back_from_its_file_with_the_fields_of_the_base(arch, granularity, tmp_path):
    base = make_base(arch)
    config = mod_config(base, granularity, threshold=0.4, target_capacity=0.5)
    config.save_pretrained(tmp_path)
    loaded = type(config).from_pretrained(tmp_path)
    assert loaded.mod_settings == config.mod_settings
    assert loaded.to_dict() == {**config.to_dict(), "transformers_version": loaded.to_dict()["transformers_version"]}

    written = json.loads((tmp_path / "config.json").read_text())
    assert written["model_type"] == f"mod_{arch}"
    assert written["mod"]["granularity"] == granularity
    assert written["mod"]["layers"] == [1, 3, 4]
    base.config.save_pretrained(tmp_path / "base")
    fields = json.loads((tmp_path / "base" / "config.json").read_text())
    for name in ("model_type", "architectures", "dtype"):
        fields.pop(name, None)
    assert {name: written.get(name) for name in fields} == fields


def test_inference_drops_the_routing_outputs_with_the_cache():
    assert {"past_key_values", "router_scores", "router_gates"} <= set(MoDLlamaConfig.keys_to_ignore_at_inference)


def test_more_layers_keep_the_thresholds_that_are_there_and_those_that_start_anew_are_said(caplog):
    mod = MoDSettings("attn_token", (3, 4), threshold=(0.25, 0.75)).to_dict()
    config = {"model_type": "mod_llama", "num_hidden_layers": 6, "hidden_size": 4, "mod": mod}
    assert make_settings(config).threshold == (0.25, 0.75)
    assert not caplog.records
    assert make_settings(config, mod_n=4).threshold == (0.5, 0.5, 0.25, 0.75)
    assert "the thresholds of layers [1, 2] start at 0.5" in caplog.text
    assert "layers [3, 4] keep theirs" in caplog.text
    assert make_settings(config, granularity="mlp_token").threshold == 0.5
    assert "the thresholds of layers [3, 4] start at 0.5" in caplog.text
