"""The static cache: fixed shapes, every decision, and the numbers of the dense specification."""

import pytest
import torch
from model_zoo import (
    HIDDEN_SIZE,
    MOE_ARCHITECTURES,
    SEQUENCE_GRANULARITIES,
    add_routers,
    all_pairs,
    make_base,
    make_pair,
    pad,
    random_tokens,
    randomize_routers,
    randomize_substitutes,
    routable_layers,
    texts,
)
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention.flex_attention import create_block_mask
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, StaticCache
from transformers.generation import CompileConfig
from transformers.generation.streamers import BaseStreamer

from utils.evaluation.generation import generate
from utils.model.configuration_mod import EXECUTIONS, GRANULARITIES
from utils.model.decode_mod import attend_to_nothing, choose_execution

LOGITS_BOUND = 5e-5
"""Float32, logits of about 10: a matrix product or a softmax over other rows may sum in another order."""

PROMPT, STEPS = 9, 200

every_granularity = pytest.mark.parametrize("granularity", GRANULARITIES)
BATCHES = (1, 2, 8)


def routed(granularity, arch="llama", substitute=False, attention="sdpa", **fields):
    """Return a routed model that keeps some of the inputs; `fields` are of the base's config."""
    settings = {"substitute": {"kind": "linear", "rank": 4}} if substitute else {}
    layers = routable_layers(arch, granularity)
    if fields:
        model = add_routers(make_base(arch, attn_implementation=attention, **fields), granularity, layers, **settings)
    else:
        _, model = make_pair(arch, granularity, layers=layers, attention=attention, **settings)
    return randomize_substitutes(randomize_routers(model, scale=0.7))


def prompts(batch: int, side: str):
    """Return input ids and mask of `batch` prompts, padded to `PROMPT` tokens on `side`; `none` for no padding."""
    if side == "none":
        return random_tokens(batch, PROMPT), None
    lengths = [(PROMPT, 4, 7, 2, 8, 1, 5, 6)[row] for row in range(batch)]
    return pad(texts(lengths) if batch > 1 else texts((5,)), side, extra=0 if batch > 1 else PROMPT - 5)


@torch.no_grad()
def decode(model, input_ids, mask, fed, cache=None, executions=(None, None)):
    """Run a prompt, then `fed` [batch, steps] token by token.

    Returns:
        logits [batch, prompt + steps, vocabulary], and the gates of the prompt's call and of the last one.
    """
    logits, gates, past = [], [], 0
    if mask is not None:
        mask = torch.cat([mask, torch.ones_like(fed)], dim=1)
    for call, tokens in enumerate([input_ids, *fed.split(1, dim=1)]):
        past += tokens.shape[1]
        output = model(
            tokens,
            attention_mask=None if mask is None else mask[:, :past],
            past_key_values=cache,
            use_cache=True,
            execution=executions[min(call, 1)],
        )
        cache = output.past_key_values
        logits.append(output.logits)
        gates.append(output.router_gates)
    return torch.cat(logits, dim=1), gates[0], gates[-1]


def assert_equals_the_specification(model, batch, side, steps, executions=(None, None)):
    input_ids, mask = prompts(batch, side)
    fed = random_tokens(batch, steps, seed=20)
    expected, *expected_gates = decode(model, input_ids, mask, fed, executions=("dense", "dense"))
    cache = StaticCache(config=model.config, max_cache_len=PROMPT + steps)
    found, *gates = decode(model, input_ids, mask, fed, cache, executions)
    real = torch.ones(batch, PROMPT + steps, dtype=torch.bool)
    if mask is not None:
        real[:, :PROMPT] = mask.bool()
    torch.testing.assert_close(found[real], expected[real], atol=LOGITS_BOUND, rtol=0)
    assert all(one.equal(other) for one, other in zip(gates, expected_gates, strict=True))
    return gates[0]


FAST = [
    ("llama", "attn_mlp_sequence"),
    ("mistral", "block_sequence"),
    ("qwen3", "block_token"),
    ("olmoe", "expert_token"),
]


def pairs():
    """Return all pairs of architecture and granularity, most of them for the slow tier."""
    values = [getattr(pair, "values", pair) for pair in all_pairs()]
    return [pytest.param(*pair, marks=() if pair in FAST else pytest.mark.slow) for pair in values]


@pytest.mark.parametrize(("arch", "granularity"), pairs())
@pytest.mark.parametrize("side", ["left", *(pytest.param(side, marks=pytest.mark.slow) for side in ("none", "right"))])
def test_a_static_cache_gives_the_numbers_of_the_specification(arch, granularity, side):
    model, gates = routed(granularity, arch), []
    for batch in BATCHES:
        for executions in [(None, None), ("sparse", "dense"), ("dense", "sparse")]:
            gates.append(assert_equals_the_specification(model, batch, side, 3, executions).flatten())
    assert 0.1 < torch.cat(gates).mean() < 0.9


@pytest.mark.slow
@every_granularity
@pytest.mark.parametrize("substitute", [False, True])
@pytest.mark.parametrize("side", ["none", "left"])
@pytest.mark.parametrize("batch", BATCHES)
def test_two_hundred_steps_give_the_numbers_of_the_specification(granularity, substitute, side, batch):
    model = routed(granularity, substitute=substitute, max_position_embeddings=256)
    for executions in [(None, None), ("sparse", "dense")]:
        assert_equals_the_specification(model, batch, side, STEPS, executions)


@every_granularity
@pytest.mark.parametrize("substitute", [False, True])
def test_a_step_with_substitutes_gives_the_numbers_of_the_specification(granularity, substitute):
    model = routed(granularity, substitute=substitute)
    for batch in (1, 8):
        assert_equals_the_specification(model, batch, "left", 2, ("sparse", "dense"))


@pytest.mark.parametrize("granularity", ["block_sequence", "attn_token"])
def test_eager_attention_gives_the_numbers_of_the_specification(granularity):
    model = routed(granularity, attention="eager")
    for executions in [(None, None), ("sparse", "dense")]:
        assert_equals_the_specification(model, 8, "left", 2, executions)


def calls():
    """Return ways to generate, for the default tier plain ones of several prompts only."""
    modes = ({}, {"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2})
    every = [(batch, mode, execution) for batch in (1, 3) for mode in modes for execution in (None, "dense")]
    return [pytest.param(*call, marks=() if call == (3, {}, None) else pytest.mark.slow) for call in every]


@every_granularity
@pytest.mark.parametrize(("batch", "mode", "execution"), calls())
def test_generate_gives_the_tokens_of_a_growing_cache(granularity, batch, mode, execution):
    model = routed(granularity)
    input_ids, mask = prompts(batch, "left")
    generated = []
    for cache in ("dynamic", "static"):
        torch.manual_seed(4)
        options = {"max_new_tokens": 6, "cache_implementation": cache, "execution": execution, **mode}
        generated.append(model.generate(input_ids, attention_mask=mask, **options))
    assert generated[0].equal(generated[1])


@every_granularity
def test_a_second_turn_goes_on_from_a_static_cache_that_was_passed_in(granularity):
    model, generated = routed(granularity), []
    for cache in (DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=40)):
        first = model.generate(random_tokens(3, 6), max_new_tokens=4, past_key_values=cache)
        again = torch.cat([first, random_tokens(3, 5, seed=8)], dim=1)
        generated.append(model.generate(again, max_new_tokens=4, past_key_values=cache))
    assert generated[0].equal(generated[1])


@every_granularity
def test_an_emptied_static_cache_decides_anew(granularity):
    model = routed(granularity)
    cache = StaticCache(config=model.config, max_cache_len=12)
    with torch.no_grad():
        model(random_tokens(4, 9, seed=30), past_key_values=cache)
        cache.reset()
        found = model(random_tokens(4, 9), past_key_values=cache)
        expected = model(random_tokens(4, 9))
    assert found.router_gates.equal(expected.router_gates)
    torch.testing.assert_close(found.logits, expected.logits, atol=LOGITS_BOUND, rtol=0)


@pytest.mark.parametrize("granularity", ["attn_sequence", "block_sequence"])
def test_a_prompt_writes_no_keys_of_rows_that_skip(granularity):
    model = routed(granularity)
    cache = StaticCache(config=model.config, max_cache_len=16)
    with torch.no_grad():
        gates = model(random_tokens(8, 9), past_key_values=cache).router_gates
    for index, kept in zip(model.mod_settings.layers, gates.bool(), strict=True):
        layer = cache.layers[index]
        assert layer.keys.shape[0] == 8
        assert layer.keys.flatten(1).any(dim=1).equal(kept)
        assert int(layer.get_seq_length()) == 9


@every_granularity
@pytest.mark.parametrize("substitute", [False, True])
def test_without_gradient_dense_gives_the_numbers_that_it_gives_with(granularity, substitute):
    model = routed(granularity, substitute=substitute)
    input_ids, mask = prompts(8, "left")
    specification = model(input_ids, attention_mask=mask, execution="dense")
    assert specification.logits.requires_grad
    with torch.no_grad():
        found = model(input_ids, attention_mask=mask, execution="dense")
    assert found.router_gates.equal(specification.router_gates)
    difference = (found.logits - specification.logits)[mask.bool()].abs()
    assert difference.max() <= LOGITS_BOUND


class TestTheChoice:
    """`choose_execution`, by device, batch, cache and level; a device without values stands for a GPU."""

    def choose(self, granularity, batch, tokens=1, device="meta", cache=None, training=False):
        inputs = torch.empty(batch, tokens, dtype=torch.int64, device=device)
        return choose_execution(routed(granularity).mod_settings, inputs, cache, training)

    def filled(self, granularity, batch, static):
        model = routed(granularity)
        cache = StaticCache(config=model.config, max_cache_len=16) if static else DynamicCache(config=model.config)
        with torch.no_grad():
            model(random_tokens(batch, 9), past_key_values=cache)
        return cache

    @every_granularity
    def test_training_is_dense_and_a_prompt_is_compact_anywhere(self, granularity):
        for device in ("cpu", "meta"):
            assert self.choose(granularity, 4, tokens=9, device=device, training=True) == "dense"
            assert self.choose(granularity, 4, tokens=9, device=device) == "sparse"

    @every_granularity
    @pytest.mark.parametrize("static", [False, True])
    @pytest.mark.parametrize("batch", [1, 4])
    def test_steps_are_compact_on_a_cpu(self, granularity, static, batch):
        cache = self.filled(granularity, batch, static)
        assert self.choose(granularity, batch, device="cpu", cache=cache) == "sparse"

    @every_granularity
    @pytest.mark.parametrize("batch", [1, 4])
    def test_steps_on_a_gpu_are_masked_but_for_one_sequence_and_rows_that_are_packed(self, granularity, batch):
        by_token = granularity.endswith("_token")
        static, growing = (self.choose(granularity, batch, cache=self.filled(granularity, batch, s)) for s in (1, 0))
        assert static == ("dense" if by_token or batch > 1 else "sparse")
        assert growing == ("dense" if by_token else "sparse")

    @pytest.mark.parametrize("granularity", ["attn_sequence", "block_sequence"])
    def test_a_growing_cache_goes_on_as_it_was_filled(self, granularity):
        model = routed(granularity)
        for execution in EXECUTIONS:
            with torch.no_grad():
                cache = model(random_tokens(4, 9), execution=execution).past_key_values
                model(random_tokens(4, 1), past_key_values=cache)
            assert self.choose(granularity, 4, cache=cache) == execution


@every_granularity
def test_a_static_cache_without_room_or_for_another_batch_is_refused(granularity):
    model = routed(granularity)
    with pytest.raises(ValueError, match="room for max_cache_len=8 tokens, but the input alone has 9: make it larger"):
        model(random_tokens(2, 9), past_key_values=StaticCache(config=model.config, max_cache_len=8))
    cache = StaticCache(config=model.config, max_cache_len=16)
    with torch.no_grad():
        model(random_tokens(2, 9), past_key_values=cache)
        with pytest.raises(ValueError, match="2 sequences, but the input has 3"):
            model(random_tokens(3, 1), past_key_values=cache)


@pytest.mark.parametrize("granularity", SEQUENCE_GRANULARITIES)
def test_a_static_cache_that_was_filled_without_routing_is_refused(granularity):
    model = routed(granularity)
    cache = StaticCache(config=model.config, max_cache_len=16)
    with torch.no_grad():
        model(random_tokens(2, 9), past_key_values=cache, route=False)
        with pytest.raises(ValueError, match="holds tokens but no decision"):
            model(random_tokens(2, 1), past_key_values=cache)


def test_kernels_that_take_lengths_get_none_of_a_sequence_that_skips():
    gates = torch.tensor([1.0, 0.0]).view(2, 1, 1)
    padding = torch.tensor([[0, 1, 1], [1, 1, 1]]).bool()
    mask = attend_to_nothing({"attention_mask": padding}, gates)["attention_mask"]
    assert mask.int().tolist() == [[0, 1, 1], [0, 0, 1]]
    blocks = create_block_mask(lambda b, h, q, k: k <= q, 2, None, 128, 256, device="cpu")
    mask = attend_to_nothing({"attention_mask": blocks}, gates)["attention_mask"]
    for name in ("kv_num_blocks", "full_kv_num_blocks"):
        shorter, whole = getattr(mask, name), getattr(blocks, name)
        assert shorter[0].equal(whole[0])
        assert not shorter[1].any()
    assert mask.mask_mod is blocks.mask_mod
    assert mask.shape == blocks.shape
    other = {"attention_mask": torch.ones(2, 1, 1, 3).bool()}
    assert attend_to_nothing(other, gates) is other


@pytest.mark.slow
@every_granularity
@pytest.mark.parametrize("batch", BATCHES)
def test_one_compilation_of_a_step_serves_all_decisions(granularity, batch):
    assert_one_compilation(routed(granularity, substitute=True), batch)


@pytest.mark.slow
@pytest.mark.parametrize("arch", MOE_ARCHITECTURES)
@pytest.mark.parametrize("granularity", ["attn_sequence", "block_token", "expert_token"])
def test_one_compilation_of_a_step_serves_all_decisions_of_experts(arch, granularity):
    assert_one_compilation(routed(granularity, arch, sliding_window=None, layer_types=None), 2)


def assert_one_compilation(model, batch):
    torch.compiler.reset()
    counter = CompileCounterWithBackend("inductor")
    step, patterns = torch.compile(model, fullgraph=True, backend=counter), set()
    for seed in range(6):
        fed = random_tokens(batch, 3, seed=50 + seed)
        input_ids = random_tokens(batch, PROMPT, seed=seed)
        expected, gates, _ = decode(model, input_ids, None, fed, executions=("dense", "dense"))
        cache = StaticCache(config=model.config, max_cache_len=16)
        with torch.no_grad():
            model(input_ids, past_key_values=cache)
            found = [step(token, past_key_values=cache).logits for token in fed.split(1, dim=1)]
        torch.testing.assert_close(torch.cat(found, dim=1), expected[:, PROMPT:], atol=LOGITS_BOUND, rtol=0)
        patterns.add(str(gates.tolist()))
    assert counter.frame_count == 1
    assert len(patterns) > 2


class Silent(BaseStreamer):
    """A streamer that keeps nothing."""

    def put(self, value):
        pass

    def end(self):
        pass


@pytest.mark.parametrize("granularity", ["attn_mlp_sequence", "block_token"])
def test_the_terminal_generation_gives_the_tokens_of_a_growing_cache(granularity):
    model, prompt = routed(granularity), random_tokens(1, PROMPT)
    growing, static, dense = (
        generate(model, prompt, Silent(), max_new_tokens=6, **options)
        for options in ({}, {"static": True}, {"static": True, "route": False})
    )
    assert static.token_ids.equal(growing.token_ids)
    assert static.shares == growing.shares
    assert sum(static.kv_bytes) == sum(dense.kv_bytes) > sum(growing.kv_bytes)


@pytest.mark.slow
@pytest.mark.parametrize("granularity", ["attn_mlp_sequence", "block_token"])
def test_what_generate_compiles_by_itself_gives_the_same_tokens_and_is_observed(granularity):
    model, prompt = routed(granularity), random_tokens(1, PROMPT)
    compiled = CompileConfig(backend="eager", mode=None)
    compiled._compile_all_devices = True
    found, expected = (
        generate(model, prompt, Silent(), max_new_tokens=6, static=True, **options)
        for options in ({"compile_config": compiled}, {})
    )
    assert found.token_ids.equal(expected.token_ids)
    assert found.shares == expected.shares


class Kernels(TorchDispatchMode):
    """Counts operators that compute: one each, as a GPU's kernels would be."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        results = function._schema.returns
        makes_a_view = any(result.alias_info is not None and not result.alias_info.is_write for result in results)
        self.count += not (makes_a_view or function.overloadpacket.__name__ in NO_KERNEL)
        return function(*args, **(kwargs or {}))


NO_KERNEL = ("empty", "empty_like", "new_empty", "detach", "_unsafe_view", "alias", "lift_fresh")


def kernels_of_a_step(model, batch, **options):
    """Return how many kernels a step with a static cache launches, and the gates."""
    cache = StaticCache(config=model.config, max_cache_len=16)
    with torch.no_grad():
        model(random_tokens(batch, PROMPT), past_key_values=cache, **options)
        with Kernels() as kernels:
            output = model(random_tokens(batch, 1), past_key_values=cache, **options)
    return kernels.count, getattr(output, "router_gates", None)


@every_granularity
def test_a_masked_step_launches_at_most_three_kernels_more_than_the_base_for_each_router(granularity):
    model = routed(granularity)
    base, _ = kernels_of_a_step(model, 8, route=False)
    masked, _ = kernels_of_a_step(model, 8, execution="dense")
    assert base < masked <= base + 3 * len(model.mod_settings.places)


@pytest.mark.parametrize("granularity", SEQUENCE_GRANULARITIES)
def test_a_step_of_one_sequence_launches_nothing_of_what_it_skips(granularity):
    model = routed(granularity)
    base, _ = kernels_of_a_step(model, 1, route=False)
    found, gates = kernels_of_a_step(model, 1)
    layer, normed = model.model.layers[1], torch.zeros(1, 1, HIDDEN_SIZE)
    rotary = model.model.rotary_emb(normed, torch.zeros(1, 1, dtype=torch.int64))
    branches = {
        "attn": lambda: normed + layer.self_attn(layer.input_layernorm(normed), rotary, None)[0],
        "mlp": lambda: normed + layer.mlp(layer.post_attention_layernorm(normed)),
    }
    alone = {}
    for branch, run in branches.items():
        with torch.no_grad(), Kernels() as kernels:
            run()
        alone[branch] = kernels.count
    alone["block"] = alone["attn"] + alone["mlp"]
    settings = model.mod_settings
    skipped = sum(
        alone[settings.branch_of(place)] for place, kept in zip(settings.places, gates[:, 0], strict=True) if not kept
    )
    assert skipped > 0
    assert found <= base - skipped + 2 * len(settings.places)
