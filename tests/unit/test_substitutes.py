"""Substitutes: what a skipped branch returns, the same in dense and sparse execution, and the closed-form fit."""

import json
import shutil

import pytest
import torch
from accelerate import dispatch_model
from model_zoo import (
    HIDDEN_SIZE,
    LAYERS,
    NUM_LAYERS,
    all_pairs,
    make_pair,
    pad,
    random_tokens,
    randomize_routers,
    randomize_substitutes,
    texts,
)
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import DynamicCache, PreTrainedTokenizerFast

from utils.io.errors import UserError
from utils.model.checkpoint import (
    add_substitutes,
    build_mod_checkpoint,
    load_mod_model,
    load_substitutes,
    make_settings,
    read_config,
    read_substitutes,
    save_substitutes,
    substitute_parameters,
    write_checkpoint,
)
from utils.model.configuration_mod import GRANULARITIES, MoDSettings
from utils.pipeline import substitutes
from utils.pipeline.substitutes import (
    BEGINNING_WEIGHT,
    BranchExamples,
    BranchMoments,
    Moments,
    check_enough,
    common_beginning,
    fit,
    missed_of_beginning,
    rows_to_fit,
    solve,
)

LOGITS_BOUND = 2e-5
"""Float32: a matrix product over fewer rows may sum in another order."""
SUBSTITUTE = {"kind": "linear", "rank": 4}

every_pair = pytest.mark.parametrize(("arch", "granularity"), all_pairs())
every_granularity = pytest.mark.parametrize("granularity", GRANULARITIES)


def substituted(arch: str, granularity: str, **settings):
    """Return a routed model whose routers decide at random and whose substitutes are random."""
    _, model = make_pair(arch, granularity, substitute=SUBSTITUTE, **settings)
    return randomize_substitutes(randomize_routers(model, scale=0.7))


@every_pair
def test_sparse_equals_dense(arch, granularity):
    model = substituted(arch, granularity)
    for side in ("left", "right"):
        input_ids, mask = pad(texts((9, 4, 12, 7, 1, 12)), side, extra=1)
        inputs = {"input_ids": input_ids, "attention_mask": mask}
        with torch.no_grad():
            dense, sparse = (model(**inputs, execution=execution) for execution in ("dense", "sparse"))
            plain = model(**inputs, route=False)
        real = mask.bool()
        assert torch.equal(dense.router_gates, sparse.router_gates)
        torch.testing.assert_close(sparse.logits[real], dense.logits[real], atol=LOGITS_BOUND, rtol=1e-5)
        assert (dense.logits - plain.logits)[real].abs().max() > 0.01


@every_granularity
def test_generation_equals_the_dense_specification_with_cache_beams_and_padding(granularity):
    model = substituted("llama", granularity)
    input_ids, mask = pad(texts((5, 9, 3)), "left")
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "attention_mask": mask}
    for beams in (1, 2):
        dense, sparse = (
            model.generate(input_ids, num_beams=beams, execution=execution, **options)
            for execution in ("dense", "sparse")
        )
        assert torch.equal(dense, sparse)


@every_granularity
def test_drafts_change_no_answer(granularity):
    model = substituted("llama", granularity)
    prompt = texts((9,))[0].repeat(2)[None]
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    alone = model.generate(prompt, **options)
    assert model.generate(prompt, prompt_lookup_num_tokens=3, **options).equal(alone)
    assert model.generate(prompt, assistant_model=make_pair("llama", granularity)[0], **options).equal(alone)


@pytest.mark.parametrize("granularity", ["attn_sequence", "mlp_token", "block_token"])
def test_on_a_split_model_they_run_where_their_layer_does(granularity, tmp_path):
    model, tokens = substituted("llama", granularity), random_tokens(2, 9)
    with torch.no_grad():
        expected = model(tokens).logits
        places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
        places |= {f"model.layers.{layer}": "disk" if layer in LAYERS else "cpu" for layer in range(NUM_LAYERS)}
        split = dispatch_model(model, places, main_device="cpu", offload_dir=tmp_path)
        assert split.substitute_modules()[LAYERS[0]].down.is_meta
        torch.testing.assert_close(split(tokens).logits, expected, atol=LOGITS_BOUND, rtol=1e-5)


class Int8Linear(torch.nn.Module):
    """Has its weight in bytes, with a scale for each output: what weight-only quantization makes of a Linear."""

    def __init__(self, linear: torch.nn.Linear):
        super().__init__()
        self.scale = linear.weight.detach().abs().amax(dim=1, keepdim=True) / 127
        self.weight = torch.nn.Parameter((linear.weight / self.scale).round().to(torch.int8), requires_grad=False)

    def forward(self, inputs):
        return torch.nn.functional.linear(inputs, self.weight * self.scale)


@pytest.mark.parametrize("granularity", ["attn_sequence", "mlp_token", "block_token"])
def test_what_quantizes_linears_leaves_them_as_they_are(granularity):
    model, tokens = substituted("llama", granularity), random_tokens(2, 9)
    kept = {name: parameter.clone() for name, parameter in substitute_parameters(model).items()}
    for name, module in list(model.model.named_modules()):
        if isinstance(module, torch.nn.Linear):
            model.model.set_submodule(name, Int8Linear(module))
    assert model.model.layers[LAYERS[0]].mlp.up_proj.weight.dtype == torch.int8
    for name, parameter in substitute_parameters(model).items():
        assert parameter.equal(kept[name])
    with torch.no_grad():
        dense, sparse = (model(tokens, execution=execution).logits for execution in ("dense", "sparse"))
        torch.testing.assert_close(sparse, dense, atol=LOGITS_BOUND, rtol=1e-5)
        assert (dense - model(tokens, route=False).logits).abs().max() > 0.01


@every_granularity
def test_a_cached_continuation_equals_the_whole_forward(granularity):
    model, tokens = substituted("llama", granularity), random_tokens(3, 12)
    prompt = torch.arange(12).expand(3, -1) < 7
    with torch.no_grad():
        whole = model(tokens, token_mask=prompt if granularity.endswith("sequence") else None, use_cache=False).logits
        first = model(tokens[:, :7], past_key_values=DynamicCache(config=model.config))
        rest = model(tokens[:, 7:], past_key_values=first.past_key_values).logits
    torch.testing.assert_close(rest, whole[:, 7:], atol=LOGITS_BOUND, rtol=1e-5)


@every_granularity
def test_what_is_skipped_everywhere_is_the_substitute_alone(granularity):
    _, model = make_pair("llama", granularity, layers=(2,), substitute=SUBSTITUTE, threshold=0.9)
    randomize_substitutes(model)
    layer = model.model.layers[2]
    inputs, seen = random_tokens(2, 6), {}
    layer.register_forward_hook(lambda module, args, output: seen.update(before=args[0], after=output))
    with torch.no_grad():
        model(inputs)
        hidden_states = seen["before"]
        attention = layer.self_attn(
            hidden_states=layer.input_layernorm(hidden_states),
            position_embeddings=model.model.rotary_emb(hidden_states, torch.arange(6)[None]),
            attention_mask=None,
        )[0]
        of = {branch: layer.substitute_of(branch) for branch in model.config.mod_settings.branches}
        if "block" in of:
            expected = hidden_states + of["block"](layer.input_layernorm(hidden_states))
        else:
            of_attention = of["attn"](layer.input_layernorm(hidden_states)) if "attn" in of else attention
            expected = hidden_states + of_attention
            expected = expected + of.get("mlp", layer.mlp)(layer.post_attention_layernorm(expected))
    torch.testing.assert_close(seen["after"], expected, atol=LOGITS_BOUND, rtol=1e-5)


@every_granularity
def test_a_substitute_learns_from_what_is_skipped_and_from_nothing_else(granularity):
    for threshold, learns in ((0.9, True), (0.1, False)):
        _, model = make_pair("llama", granularity, substitute=SUBSTITUTE, threshold=threshold)
        randomize_substitutes(model).train()
        model(random_tokens(2, 6), labels=random_tokens(2, 6)).loss.backward()
        for substitute in model.substitute_modules().values():
            assert bool(substitute.down.grad.any()) is learns


def test_substitutes_stand_in_the_config_only_where_there_are_some():
    plain = MoDSettings("attn_token", (1, 2))
    assert "substitute" not in plain.to_dict()
    ranks = MoDSettings("attn_token", (1, 2), substitute={"kind": "linear", "rank": [3, 5]})
    assert json.loads(json.dumps(ranks.to_dict()))["substitute"] == {"kind": "linear", "rank": [3, 5]}
    assert MoDSettings.from_dict(ranks.to_dict()) == ranks
    assert ranks.substitute_rank(2) == 5


@pytest.mark.parametrize(
    ("substitute", "message"),
    [
        ({"kind": "linaer", "rank": 4}, "did you mean 'linear'"),
        ({"kind": "linear", "rank": 0}, "rank 0 must be a whole number from 1"),
        ({"kind": "linear", "rank": 2.5}, "rank 2.5 must be a whole number"),
        ({"kind": "linear", "rank": [4]}, "1 numbers for 3 routed layers"),
        ({"kind": "linear"}, "must have the fields kind and rank"),
        ({"kind": "linear", "rank": HIDDEN_SIZE + 1}, "between 1 and the hidden size"),
    ],
)
def test_a_wrong_substitute_is_named(substitute, message):
    with pytest.raises(ValueError, match=message):
        make_pair("llama", "attn_token", substitute=substitute)


def test_a_missing_substitute_is_an_error_of_loading(tmp_path):
    model = substituted("llama", "mlp_token")
    model.save_pretrained(tmp_path)
    assert substitute_parameters(type(model).from_pretrained(tmp_path)).keys() == substitute_parameters(model).keys()
    state = model.state_dict()
    del state[f"model.layers.{LAYERS[0]}.substitute.up"]
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(ValueError, match=r"missing weights: model.layers.1.substitute.up"):
        type(model).from_pretrained(tmp_path)


class TestTheFile:
    def test_round_trip(self, tmp_path):
        model = substituted("llama", "attn_token")
        save_substitutes(tmp_path / "substitutes.safetensors", substitute_parameters(model), model.mod_settings)
        _, other = make_pair("llama", "attn_token", substitute=SUBSTITUTE)
        load_substitutes(other, tmp_path)
        for (name, parameter), loaded in zip(
            substitute_parameters(model).items(), substitute_parameters(other).values(), strict=True
        ):
            assert torch.equal(parameter, loaded), name
        assert sorted(load_file(tmp_path / "substitutes.safetensors"))[0] == "model.layers.1.substitute.bias"

    @pytest.mark.parametrize(
        ("granularity", "layers", "rank", "message"),
        [
            ("mlp_token", LAYERS, 4, "substitutes for attn_token"),
            ("attn_token", (1, 3), 4, "has the unknown model.layers.4.substitute"),
            ("attn_token", (1, 2, 3, 4), 4, "lacks model.layers.2.substitute"),
            ("attn_token", LAYERS, 5, "another rank"),
        ],
    )
    def test_of_another_model_layer_or_rank_is_refused(self, tmp_path, granularity, layers, rank, message):
        model = substituted("llama", "attn_token")
        save_substitutes(tmp_path / "substitutes.safetensors", substitute_parameters(model), model.mod_settings)
        _, other = make_pair("llama", granularity, layers=layers, substitute={"kind": "linear", "rank": rank})
        with pytest.raises(UserError, match=message):
            load_substitutes(other, tmp_path)

    def test_none_there_is_refused(self, tmp_path):
        _, model = make_pair("llama", "attn_token", substitute=SUBSTITUTE)
        with pytest.raises(UserError, match=r"no substitutes.safetensors there"):
            load_substitutes(model, tmp_path)


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    root = tmp_path_factory.mktemp("fitted")
    base, model = make_pair("llama", "attn_token", substitute=SUBSTITUTE)
    base.save_pretrained(root / "base")
    words = Tokenizer(WordLevel({"a": 0}, unk_token="a"))
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(root / "base")
    maps = substitute_parameters(randomize_substitutes(model))
    routers = {f"model.layers.{layer}.router.weight": torch.zeros(1, HIDDEN_SIZE) for layer in LAYERS}
    write_checkpoint(root / "fitted", root / "base", model.mod_settings, routers, substitutes=maps)
    return root / "fitted"


class TestACheckpoint:
    """Its routers are at zero, as a static baseline's are: the maps are for what they were fitted to all the same."""

    @pytest.mark.parametrize("other", [{"granularity": "mlp_token"}, {"mod_n": 2}])
    def test_maps_are_for_no_other_routing(self, fitted, other):
        settings = make_settings(read_config(fitted), **other)
        assert settings.substitute is None
        with pytest.raises(UserError, match=r"holds substitutes for attn_token of layers \[1, 3, 4\]; train from the"):
            load_mod_model(fitted, settings)

    def test_layers_that_are_routed_besides_start_with_maps_at_zero(self, fitted):
        settings = make_settings(read_config(fitted), mod_n=5)
        assert settings.layers == (0, 1, 2, 3, 4)
        grown, before = load_mod_model(fitted, settings), load_mod_model(fitted)
        assert type(grown) is type(before)
        maps = grown.substitute_modules()
        for layer, module in before.substitute_modules().items():
            assert torch.equal(maps[layer].down, module.down)
        assert not any(parameter.any() for layer in (0, 2) for parameter in maps[layer].parameters())

    def test_a_checkpoint_that_lacks_maps_of_its_own_is_refused(self, fitted, tmp_path):
        config = read_config(fitted)
        config["mod"] |= {"layers": [0, 1, 2, 3, 4], "threshold": 0.5}
        shutil.copytree(fitted, tmp_path / "lacking", symlinks=True)
        (tmp_path / "lacking/config.json").write_text(json.dumps(config))
        with pytest.raises(UserError, match=r"missing weights: model\.layers\.0\.substitute"):
            load_mod_model(tmp_path / "lacking")

    def test_a_new_checkpoint_by_its_config_has_nothing_that_was_trained(self, fitted, tmp_path, caplog):
        table = [{"capacity": 0.75, "threshold": [0.4] * 3}]
        config = read_config(fitted)
        config["mod"] |= {"threshold": [0.6] * 3, "capacities": table, "sequence_pooling": "prompt"}
        build_mod_checkpoint(fitted.parent / "base", tmp_path, make_settings(config))
        built = load_mod_model(tmp_path).mod_settings
        assert (built.substitute, built.capacities, built.sequence_pooling, built.threshold) == (None, None, None, 0.5)
        assert "capacities, sequence_pooling, substitute, threshold" in caplog.text

    def test_maps_are_found_beside_their_routers_and_where_transformers_saves_them(self, fitted, tmp_path):
        model = load_mod_model(fitted)
        model.save_pretrained(tmp_path / "saved")
        for path in (fitted, fitted / "routers.safetensors", fitted / "substitutes.safetensors", "saved"):
            found, metadata = read_substitutes(tmp_path / path)
            assert json.loads(metadata["substitute"]) == SUBSTITUTE
            assert metadata["granularity"] == "attn_token"
            for name, parameter in substitute_parameters(model).items():
                assert found[name].equal(parameter)
        assert read_substitutes(fitted.parent / "base") == ({}, {})


def test_substitutes_that_are_added_are_at_zero_and_change_nothing():
    _, model = make_pair("llama", "block_token")
    tokens = random_tokens(2, 9)
    randomize_routers(model, scale=0.7)
    with torch.no_grad():
        before = model(tokens).logits
        add_substitutes(model, SUBSTITUTE)
        torch.testing.assert_close(model(tokens).logits, before, atol=LOGITS_BOUND, rtol=1e-5)
    assert model.config.mod["substitute"] == SUBSTITUTE
    with pytest.raises(UserError, match="between 1 and the hidden size"):
        add_substitutes(model, {"kind": "linear", "rank": 33})


def branch_by_hand(model, target, hidden_states, real):
    """Return what the branch of layer 2 reads and returns, both [real tokens, hidden size], and how tokens count."""
    layer = model.model.layers[2]
    normed = layer.input_layernorm(hidden_states)
    positions = torch.arange(hidden_states.shape[1])[None]
    attention = layer.self_attn(
        hidden_states=normed, position_embeddings=model.model.rotary_emb(normed, positions), attention_mask=None
    )[0]
    between = layer.post_attention_layernorm(hidden_states + attention)
    ones = torch.ones(int(real.sum()))
    if target == "attn":
        return normed[real], attention[real], ones
    if target == "expert":
        tokens = between[real]
        _, weights, chosen = layer.mlp.gate(tokens)
        total = weights.sum(dim=-1)
        return tokens, layer.mlp.experts(tokens, chosen, weights) / total[:, None], total**2
    mlp = layer.mlp(between)
    if target == "mlp":
        return between[real], mlp[real], ones
    return normed[real], (attention + mlp)[real], ones


class TestTheFit:
    def test_a_low_rank_map_is_recovered(self):
        generator = torch.Generator().manual_seed(0)
        left, right = torch.randn(16, 3, generator=generator), torch.randn(3, 16, generator=generator)
        inputs = torch.randn(4000, 16, generator=generator)
        moments = Moments.zero(16, torch.device("cpu"))
        for part in inputs.split(500):
            moments.add(part, part @ (left @ right).T + 2.0, torch.ones(500))
        fitted, left_over = solve(moments, rank=3)
        assert left_over < 1e-3
        found = fitted["up"] @ fitted["down"]
        torch.testing.assert_close(found.float(), left @ right, atol=0.1, rtol=0.05)

    def test_no_map_of_the_rank_leaves_less(self):
        # against a general minimiser, from several starts
        generator = torch.Generator().manual_seed(1)
        inputs = torch.randn(600, 6, generator=generator, dtype=torch.float64) * torch.arange(1, 7)
        outputs = torch.tanh(inputs @ torch.randn(6, 6, generator=generator, dtype=torch.float64))
        moments = Moments.zero(6, torch.device("cpu"))
        moments.add(inputs, outputs, torch.ones(600))
        _, left = solve(moments, rank=2)
        variance = ((outputs - outputs.mean(dim=0)) ** 2).sum()
        for seed in range(3):
            torch.manual_seed(seed)
            down, up = torch.randn(2, 6, dtype=torch.float64), torch.randn(6, 2, dtype=torch.float64)
            bias = torch.zeros(6, dtype=torch.float64)
            parameters = [value.requires_grad_() for value in (down, up, bias)]
            optimizer = torch.optim.LBFGS(parameters, max_iter=300, line_search_fn="strong_wolfe")

            def loss(optimizer=optimizer, down=down, up=up, bias=bias):
                optimizer.zero_grad()
                value = ((outputs - inputs @ down.T @ up.T - bias) ** 2).sum() / variance
                value.backward()
                return value

            optimizer.step(loss)
            assert left < float(loss().detach()) + 2e-3  # the ridge costs a little

    @pytest.mark.parametrize(
        ("arch", "granularity"), [("llama", g) for g in GRANULARITIES] + [("olmoe", "expert_token")]
    )
    def test_moments_are_of_real_tokens_input_and_output_of_what_is_gated(self, arch, granularity):
        _, model = make_pair(arch, granularity, layers=(2,), substitute=SUBSTITUTE)
        input_ids, mask = pad(texts((7, 4)), "right")
        batch = {"input_ids": input_ids, "attention_mask": mask}
        branches = BranchMoments(model, beginning=2)
        branches.read([batch])
        counts = torch.where(torch.arange(7) < 2, BEGINNING_WEIGHT, 1.0).expand_as(mask)[mask.bool()]
        with torch.no_grad():
            entered = model(**batch, output_hidden_states=True, route=False).hidden_states[2]
            for place in model.mod_settings.places:
                expected = Moments.zero(HIDDEN_SIZE, torch.device("cpu"))
                branch = model.mod_settings.branch_of(place)
                inputs, outputs, weights = branch_by_hand(model, branch, entered, mask.bool())
                expected.add(inputs, outputs, weights * counts)
                for name, value in vars(branches.moments[place]).items():
                    torch.testing.assert_close(value, vars(expected)[name], atol=1e-4, rtol=1e-4, msg=f"{place} {name}")

    @pytest.mark.parametrize("granularity", ["block_token", "attn_mlp_token"])
    def test_few_sums_at_a_time_give_the_same_maps(self, granularity, monkeypatch):
        _, model = make_pair("llama", granularity, substitute=SUBSTITUTE)
        input_ids, mask = pad(texts((40,) * 4), "right")
        batches, forwards = [{"input_ids": input_ids, "attention_mask": mask}] * 2, []
        model.register_forward_pre_hook(lambda *_: forwards.append(1))
        at_once = fit(model, batches)
        assert len(forwards) == 2
        forwards.clear()
        monkeypatch.setattr(substitutes, "SUMS_BYTES", 2 * 16 * HIDDEN_SIZE**2)
        apart = fit(model, batches)
        places = model.mod_settings.places
        assert len(forwards) == 2 * -(-len(places) // 2)
        assert list(apart) == list(at_once) == list(places)
        for place, maps in at_once.items():
            for name, value in maps.items():
                assert apart[place][name].equal(value)

    def test_the_branches_of_the_dense_model_are_what_is_fitted(self):
        _, model = make_pair("llama", "mlp_token", substitute={"kind": "linear", "rank": HIDDEN_SIZE}, threshold=0.9)
        linear = model.model.layers[LAYERS[-1]].mlp = torch.nn.Linear(HIDDEN_SIZE, HIDDEN_SIZE)
        input_ids, mask = pad(texts([40] * 30 + [7]), "right")
        batches = [{"input_ids": input_ids, "attention_mask": mask, "labels": input_ids}]
        model.train()
        fitted = fit(model, batches)
        assert model.training
        assert {layer: list(of) for layer, of in fitted.items()} == {layer: ["down", "up", "bias"] for layer in LAYERS}
        found = fitted[LAYERS[-1]]["up"] @ fitted[LAYERS[-1]]["down"]
        assert (found - linear.weight).norm() < 0.1 * linear.weight.norm()

    def test_what_all_rows_begin_with_is_fitted_closest(self):
        _, model = make_pair("llama", "mlp_token", substitute={"kind": "linear", "rank": 6})
        beginning, rows = texts([4])[0], texts([30] * 40)
        rows = [torch.cat([beginning, row]) for row in rows]
        apart = [pad(rows[:20], "right"), pad(rows[20:], "right")]
        batches = [{"input_ids": ids, "attention_mask": mask} for ids, mask in apart]
        assert common_beginning(batches) == 4
        assert common_beginning([{name: values[:1] for name, values in batches[0].items()}]) == 0
        last = LAYERS[-1]
        seen = {}
        handle = model.model.layers[last].mlp.register_forward_hook(
            lambda module, args, output: seen.update(inputs=args[0], outputs=output)
        )
        fitted = fit(model, batches)[last]
        handle.remove()
        missed = seen["outputs"] - (seen["inputs"] @ fitted["down"].T @ fitted["up"].T + fitted["bias"])
        share = missed.norm(dim=-1) / seen["outputs"].norm(dim=-1)
        assert share[:, :4].mean() < 0.25 * share[:, 4:].mean()

    def test_what_is_missed_of_the_beginning_is_told(self):
        _, model = make_pair("llama", "mlp_token", substitute=SUBSTITUTE)
        input_ids = texts([6])[0][None]
        branches = BranchExamples(model)
        branches.read([{"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}])
        with torch.no_grad():
            states = model(input_ids, route=False, output_hidden_states=True).hidden_states
        shares = []
        for layer in LAYERS:
            inputs, outputs = branches.examples[layer]
            assert inputs.shape == outputs.shape == (6, HIDDEN_SIZE)
            block, substitute = model.model.layers[layer], model.substitute_modules()[layer]
            torch.testing.assert_close(outputs, block.mlp(inputs))
            if layer < 3:  # the last hidden states are normed
                after = states[layer + 1][0] - outputs
                torch.testing.assert_close(inputs, block.post_attention_layernorm(after), atol=1e-4, rtol=1e-4)
            missed = (outputs - substitute(inputs)).norm(dim=-1) / outputs.norm(dim=-1)
            shares.append((missed**2).mean())
        missed = missed_of_beginning(model, branches.examples)
        torch.testing.assert_close(missed, torch.stack(shares).mean())
        missed.backward()
        assert all(module.bias.grad.abs().sum() > 0 for module in model.substitute_modules().values())

    def test_too_few_rows_say_how_many_are_needed(self):
        check_enough([16, 16], 32)
        with pytest.raises(UserError, match=r"2 training rows have 20 tokens.* needs 32.* about 4 such rows"):
            check_enough([10, 10], 32)

    def test_it_takes_no_more_rows_than_it_needs(self):
        assert rows_to_fit([10] * 100, 4) == 4
        assert rows_to_fit([10] * 3, 4) == 3
