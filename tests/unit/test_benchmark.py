"""The benchmark: several models on one set of weights, numbers that add up, and no timing of a wrong result."""

import pytest
import torch
from model_zoo import (
    ARCHITECTURES,
    MOE_ARCHITECTURES,
    NUM_LAYERS,
    make_base,
    make_pair,
    random_tokens,
    randomize_routers,
    randomize_substitutes,
)

from utils.evaluation.benchmark import (
    CheckFailedError,
    check_columns,
    measure_cell,
    saved_with_substitutes,
    skippable_share,
    table,
)
from utils.evaluation.columns import COLUMNS, make_columns
from utils.evaluation.prompts import cut_prompts, read_text
from utils.evaluation.timing import median_with_interval, peak_memory
from utils.io.errors import UserError
from utils.model.configuration_mod import GRANULARITIES, MoDSettings
from utils.model.costs import layer_cost
from utils.model.routing_mod import MoDRouter
from utils.model.substitute_mod import MoDSubstitute

TEXT = random_tokens(1, 400)[0]

every_granularity = pytest.mark.parametrize("granularity", GRANULARITIES)


def columns_of(granularity: str, arch: str = "llama", layers=(1, 3, 4), share: float = 0.5, **settings):
    _, model = make_pair(arch, granularity, layers, **settings)
    return make_columns(randomize_substitutes(randomize_routers(model, scale=0.7)), share)


@every_granularity
@pytest.mark.parametrize("arch", list(ARCHITECTURES))
def test_the_check_passes_for_all_columns(arch, granularity):
    assert check_columns(columns_of(granularity, arch), TEXT, length=24) < 1e-5


@pytest.mark.parametrize("granularity", ["attn_sequence", "block_token", "expert_token"])
@pytest.mark.parametrize("arch", list(MOE_ARCHITECTURES))
def test_the_check_passes_for_all_columns_of_a_mixture_of_experts(arch, granularity):
    assert check_columns(columns_of(granularity, arch), TEXT, length=24) < 1e-5


@pytest.mark.parametrize("granularity", [*GRANULARITIES, "expert_token"])
def test_what_is_skipped_is_replaced_in_routed_columns_alone(granularity):
    arch = "olmoe" if granularity == "expert_token" else "llama"
    ranks = (2, 4, 3) * (2 if granularity.startswith("attn_mlp") else 1)
    columns = columns_of(granularity, arch, substitute={"kind": "linear", "rank": ranks})
    assert [column.name for column in columns] == list(COLUMNS)
    assert check_columns(columns, TEXT, length=24) < 1e-5
    models = {column.name: column.model for column in columns}
    for name, model in models.items():
        has = sum(isinstance(module, MoDSubstitute) for module in model.modules())
        assert has == (len(model.router_modules()) if name in ("all_kept", "tuned", "random", "all_skipped") else 0)
    with torch.no_grad():
        replaced, bare, oracle = (
            models[name](random_tokens(2, 9)).logits for name in ("all_skipped", "unreplaced", "oracle")
        )
    torch.testing.assert_close(bare, oracle, atol=5e-5, rtol=0)
    assert (replaced - bare).abs().max() > 0.01
    cell = measure_cell(columns, TEXT, batch=2, length=12, decode_tokens=1, repeats=2)
    assert set(cell["saved_with_substitutes"]) == {"prefill", "decode"}
    assert table(cell).count("with a substitute in its place") == 2


def test_what_is_saved_with_substitutes_is_of_what_is_saved_without():
    to_dense = {"all_skipped": [0.7, 0.7, 0.7], "unreplaced": [0.6, 0.6, 0.6]}
    found = saved_with_substitutes(to_dense)
    assert list(found.values()) == pytest.approx([0.75] * 3)


def test_random_routing_of_experts_keeps_about_the_share_that_was_asked_for():
    random = next(column for column in columns_of("expert_token", "olmoe", share=0.75) if column.name == "random")
    with torch.no_grad():
        gates = random.model(random_tokens(8, 50)).router_gates
    assert gates.mean().item() == pytest.approx(0.75, abs=0.03)  # of pairs, of which the gate takes some


def test_a_cell_of_experts_says_what_was_saved():
    cell = measure_cell(columns_of("expert_token", "mixtral"), TEXT, batch=4, length=20, decode_tokens=2, repeats=1)
    assert cell["skippable_share_of_branch"] == {"prefill": 1.0, "decode": 1.0}
    assert cell["columns"]["random"]["prefill"]["saving_reached"]
    assert cell["columns"]["all_skipped"]["share_executed"] == 0


@every_granularity
def test_the_check_passes_where_the_first_layer_is_routed(granularity):
    assert check_columns(columns_of(granularity, layers=tuple(range(NUM_LAYERS - 1))), TEXT, length=24) < 1e-5


@every_granularity
def test_a_wrong_sparse_execution_is_not_timed(granularity, monkeypatch):
    columns = columns_of(granularity)
    monkeypatch.setattr(
        "utils.model.execution_mod._add_at",
        lambda hidden_states, kept, substituted: (
            hidden_states if kept[1] is None else hidden_states.index_copy(0, *kept)
        ),
    )
    monkeypatch.setattr("utils.model.execution_mod._add_mlp", lambda layer, hidden_states: hidden_states)
    with pytest.raises(CheckFailedError, match=r"against (dense|oracle)|decide differently"):
        check_columns(columns, TEXT, length=24)


def test_all_columns_share_the_weights_but_for_the_routers():
    columns = columns_of("attn_sequence")
    tuned = next(column.model for column in columns if column.name == "tuned")
    shared = {parameter.data_ptr() for parameter in tuned.parameters()}
    for column in columns:
        routers = {id(m.weight) for m in column.model.modules() if isinstance(m, MoDRouter)}
        assert all(p.data_ptr() in shared for p in column.model.parameters() if id(p) not in routers)
        assert not any(tensor.is_meta for tensor in (*column.model.parameters(), *column.model.buffers()))
        assert not column.model.training


@every_granularity
@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 1.0])
def test_random_routing_keeps_the_share_that_was_asked_for(granularity, share):
    random = next(column for column in columns_of(granularity, share=share) if column.name == "random")
    with torch.no_grad():
        gates = random.model(random_tokens(8, 50)).router_gates
        assert gates.equal(random.model(random_tokens(8, 50, seed=9)).router_gates)
    per_layer = 8 if granularity.endswith("sequence") else 400
    of_a_layer = 2 if granularity.startswith("attn_mlp") else 1
    assert abs(gates.sum() - share * 3 * of_a_layer * per_layer) <= of_a_layer
    assert gates.shape[0] == 3 * of_a_layer


@pytest.mark.parametrize("granularity", ["attn_sequence", "block_sequence"])
def test_kv_bytes_follow_the_share_executed_exactly(granularity):
    cell = measure_cell(columns_of(granularity), TEXT, batch=8, length=20, decode_tokens=3, repeats=1)
    columns = cell["columns"]
    assert list(columns) == [name for name in COLUMNS if name != "unreplaced"]
    assert cell["saved_with_substitutes"] == {}
    whole = columns["dense"]["kv_bytes"]
    for name in ("all_kept", "tuned", "random", "all_skipped"):
        executed = (NUM_LAYERS - 3 + 3 * columns[name]["share_executed"]) / NUM_LAYERS
        assert columns[name]["kv_bytes"] == pytest.approx(whole * executed, abs=0.5)
    assert columns["oracle"]["kv_bytes"] == columns["all_skipped"]["kv_bytes"]
    assert columns["all_skipped"]["share_executed"] == 0
    assert columns["dense"]["prefill"]["to_dense"]["median"] == 1
    assert columns["random"]["decode"]["saving_reached"]
    assert columns["random"]["decode"]["saving_reached_of_share_alone"]
    assert columns["share_alone"]["kv_bytes"] == columns["random"]["kv_bytes"]
    assert "saving_reached" not in columns["all_kept"]["prefill"]
    assert all(name in table(cell) for name in columns)


@every_granularity
@pytest.mark.parametrize("batch", [1, 4])
def test_the_plain_branch_runs_on_any_share(granularity, batch):
    for share in (0.0, 0.5, 1.0):
        columns = columns_of(granularity, share=share)
        logits = {}
        for name in ("share_alone", "oracle", "dense"):
            column = next(column for column in columns if column.name == name)
            cache = column.make_cache()
            with torch.no_grad():
                for tokens in random_tokens(batch, 12).split([9, 1, 1, 1], dim=1):
                    logits[name] = column.model(tokens, past_key_values=cache, use_cache=True).logits
        nothing_gated = share == 1.0 and granularity not in ("attn_token", "block_token", "attn_mlp_token")
        for name, equal in (("oracle", share == 0.0), ("dense", nothing_gated)):
            if equal:
                torch.testing.assert_close(logits["share_alone"], logits[name], atol=5e-5, rtol=0)


def test_without_decode_there_is_no_decode_in_the_table():
    cell = measure_cell(columns_of("mlp_token"), TEXT, batch=1, length=20, decode_tokens=0, repeats=1)
    assert "decode" not in table(cell)
    assert "decode" not in cell["columns"]["dense"]


def test_what_a_skipped_token_saves_leaves_out_its_keys_and_values():
    config = make_base("llama").config  # width 32, 4 heads and 2 key-value heads of 8, MLP 48
    settings = {g: make_pair("llama", g)[1].config.mod_settings for g in GRANULARITIES}
    assert skippable_share(config, settings["attn_sequence"], 10, decode=False) == 1
    assert skippable_share(config, settings["mlp_token"], 10, decode=False) == 1
    queries_and_outputs, keys_and_values, attention = 2 * 32 * 32, 2 * 32 * 16, 2 * 32 * 10
    saved = queries_and_outputs + attention
    assert skippable_share(config, settings["attn_token"], 10, decode=True) == saved / (saved + keys_and_values)
    saved += 3 * 32 * 48 - attention / 2
    assert skippable_share(config, settings["block_token"], 10, decode=False) == saved / (saved + keys_and_values)


def test_what_a_skipped_token_saves_counts_the_experts_of_a_block():
    settings = MoDSettings("block_token", (3,))
    config = make_base("olmoe").config
    cost = layer_cost(config.to_dict(), 500, 3)
    share = skippable_share(config, settings, 500, decode=False)
    assert share == pytest.approx((cost.total - cost.keys_and_values) / cost.total, rel=1e-3)


def test_the_interval_holds_the_median_and_narrows_to_it():
    interval = median_with_interval([1.0, 2.0, 3.0, 4.0, 100.0])
    assert interval["low"] < interval["median"] == 3.0 < interval["high"]
    assert median_with_interval([2.0, 2.0]) == {"median": 2.0, "low": 2.0, "high": 2.0}


def test_peak_memory_counts_new_tensors_while_they_live():
    before = torch.zeros(1000)

    def call():
        first = before + 1  # 4000 bytes
        first.t()  # a view
        first.add_(1)
        del first
        second, third = before + 2, before + 3
        del second, third

    assert peak_memory(torch.device("cpu"), call) == 8000


def test_prompts_have_an_exact_length_and_spread_over_the_text():
    prompts = cut_prompts(torch.arange(100), 3, 10)
    assert prompts[:, 0].tolist() == [0, 45, 90]
    assert prompts.shape == (3, 10)
    with pytest.raises(UserError, match="the text has 5 tokens, and a prompt needs 10"):
        cut_prompts(torch.arange(5), 1, 10)


def test_text_is_read_from_plain_and_json_files(tmp_path):
    (tmp_path / "a.txt").write_text("plain", encoding="utf-8")
    (tmp_path / "a.json").write_text('[{"x": "one", "n": 3, "y": ""}, ["two"]]', encoding="utf-8")
    (tmp_path / "a.jsonl").write_text('{"x": "one"}\n{"x": ["two"]}\n', encoding="utf-8")
    (tmp_path / "bad.json").write_text("{", encoding="utf-8")
    assert read_text(tmp_path / "a.txt") == "plain"
    assert read_text(tmp_path / "a.json") == read_text(tmp_path / "a.jsonl") == "one\n\ntwo"
    with pytest.raises(UserError, match=r"bad\.json: not JSON"):
        read_text(tmp_path / "bad.json")
    with pytest.raises(UserError, match="no such file"):
        read_text(tmp_path / "none.txt")
