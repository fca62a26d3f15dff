"""The sparse forward: the numbers of the dense one, without computing what is dropped."""

from collections import Counter

import pytest
import torch
from model_zoo import (
    ARCHITECTURES,
    LAYERS,
    NUM_LAYERS,
    SEQUENCE_GRANULARITIES,
    all_pairs,
    make_pair,
    pad,
    random_tokens,
    randomize_routers,
    texts,
)
from rounding import assert_same_in_low_precision
from torch.utils._python_dispatch import TorchDispatchMode

from utils.model.configuration_mod import GRANULARITIES
from utils.model.execution_mod import select_rows

LOGITS_BOUND = 5e-5
"""Float32: a matrix product over fewer rows may sum in another order."""


every_architecture = pytest.mark.parametrize("arch", list(ARCHITECTURES))
every_granularity = pytest.mark.parametrize("granularity", GRANULARITIES)
every_pair = pytest.mark.parametrize(("arch", "granularity"), all_pairs())
every_row_granularity = pytest.mark.parametrize("granularity", SEQUENCE_GRANULARITIES)


class RowCounter:
    """Counts what the branches of the routed layers compute: (layer, branch) -> rows of each call."""

    def __init__(self, model):
        self.rows: dict[tuple[int, str], list[int]] = {}
        for index in model.config.mod_settings.layers:
            for branch in ("self_attn", "mlp"):
                self.rows[index, branch] = []
                hook = self._hook(index, branch)
                getattr(model.model.layers[index], branch).register_forward_pre_hook(hook, with_kwargs=True)

    def _hook(self, index, branch):
        def count(module, args, kwargs):
            hidden_states = args[0] if args else kwargs["hidden_states"]
            self.rows[index, branch].append(hidden_states.shape[0])

        return count


class OperatorCounter(TorchDispatchMode):
    """Counts the operators that a block of code runs, by name."""

    def __init__(self):
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.counts[function.overloadpacket.__name__] += 1
        return function(*args, **(kwargs or {}))


def gated_branches(granularity: str) -> tuple[str, ...]:
    """Names of the modules that a granularity gates."""
    both = ("self_attn", "mlp")
    return {"attn": ("self_attn",), "mlp": ("mlp",), "block": both, "attn_mlp": both}[granularity.rsplit("_", 1)[0]]


@every_pair
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_sparse_equals_dense(arch, granularity, attention):
    _, model = make_pair(arch, granularity, attention=attention)
    randomize_routers(model, scale=0.7)
    gates = []
    for side in ("none", "left", "right"):
        if side == "none":
            inputs = {"input_ids": random_tokens(6, 11)}
        else:
            input_ids, mask = pad(texts((9, 4, 12, 7, 1, 12)), side, extra=1)
            inputs = {"input_ids": input_ids, "attention_mask": mask}
        real = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
        with torch.no_grad():
            dense, sparse = model(**inputs, execution="dense"), model(**inputs, execution="sparse")
        torch.testing.assert_close(sparse.logits[real], dense.logits[real], atol=LOGITS_BOUND, rtol=0)
        torch.testing.assert_close(sparse.router_scores, dense.router_scores, atol=2e-5, rtol=0)
        assert sparse.router_gates.equal(dense.router_gates)
        gates.append(dense.router_gates)
    assert 0.1 < torch.cat([gate.flatten() for gate in gates]).mean() < 0.9


@every_granularity
def test_sparse_equals_dense_with_position_ids_and_embeddings_of_each_row(granularity):
    _, model = make_pair("mistral", granularity)
    randomize_routers(model, scale=0.7)
    input_ids, mask = pad(texts((9, 4, 12, 7)), "left")
    inputs = {
        "inputs_embeds": model.get_input_embeddings()(input_ids),
        "attention_mask": mask,
        # other distances in each row: a mere shift would leave the attention as it is
        "position_ids": (mask.cumsum(dim=1) - 1).clamp(min=0) * torch.tensor([[1], [3], [2], [5]]),
    }
    with torch.no_grad():
        dense, sparse = model(**inputs, execution="dense"), model(**inputs, execution="sparse")
    torch.testing.assert_close(sparse.logits[mask.bool()], dense.logits[mask.bool()], atol=LOGITS_BOUND, rtol=0)


@every_granularity
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sparse_decides_as_dense_in_low_precision_and_keeps_the_dtype(granularity, dtype):
    _, model = make_pair("llama", granularity, layers=(1,))
    randomize_routers(model, scale=0.7).to(dtype)
    with torch.no_grad():
        dense = model(random_tokens(6, 11), execution="dense")
        sparse = model(random_tokens(6, 11), execution="sparse")
    assert sparse.logits.dtype == dense.logits.dtype == dtype
    assert sparse.router_gates.equal(dense.router_gates)
    assert_same_in_low_precision(sparse.logits, dense.logits, dtype)


@every_granularity
def test_sparse_equals_dense_under_autocast(granularity):
    _, model = make_pair("llama", granularity, layers=(1,))
    randomize_routers(model, scale=0.7)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        dense = model(random_tokens(6, 11), execution="dense")
        sparse = model(random_tokens(6, 11), execution="sparse")
    assert sparse.router_gates.equal(dense.router_gates)
    assert_same_in_low_precision(sparse.logits, dense.logits, torch.bfloat16)


@every_architecture
@every_row_granularity
def test_a_gated_branch_sees_the_kept_rows_only(arch, granularity):
    _, model = make_pair(arch, granularity)
    randomize_routers(model, scale=0.7)
    counter = RowCounter(model)
    with torch.no_grad():
        gates = model(random_tokens(8, 9), execution="sparse").router_gates
    kept = dict(zip(model.config.mod_settings.places, gates.sum(dim=1).int().tolist(), strict=True))
    assert any(0 < rows < 8 for rows in kept.values())
    for (index, branch), rows in counter.rows.items():
        place = (index, branch.removeprefix("self_")) if granularity.startswith("attn_mlp") else index
        expected = kept[place] if branch in gated_branches(granularity) else 8
        assert rows == ([expected] if expected else [])


@every_row_granularity
def test_a_branch_that_no_row_keeps_is_not_called(granularity):
    _, model = make_pair("llama", granularity, threshold=0.6)  # routers at zero score one half
    counter = RowCounter(model)
    with torch.no_grad():
        gates = model(random_tokens(4, 9), execution="sparse").router_gates
    assert gates.eq(0).all()
    for (_, branch), rows in counter.rows.items():
        assert rows == ([] if branch in gated_branches(granularity) else [4])


@every_row_granularity
def test_nothing_is_gathered_where_all_rows_are_kept(granularity):
    base, model = make_pair("llama", granularity)
    input_ids, mask = pad(texts((9, 4, 12)), "left")
    with torch.no_grad(), OperatorCounter() as dense_base:
        base(input_ids, mask, use_cache=False)
    with torch.no_grad(), OperatorCounter() as routed:
        model(input_ids, mask, execution="sparse")
    moves_rows = ("index", "index_select", "index_add", "index_copy", "index_put", "gather", "scatter", "masked_select")
    for name in moves_rows:
        for variant in (name, name + "_"):
            assert routed.counts[variant] == dense_base.counts[variant]
    assert routed.counts["mm"] <= dense_base.counts["mm"] + len(model.router_modules())


@every_granularity
def test_inference_is_sparse_and_training_dense_unless_asked_otherwise(granularity):
    _, model = make_pair("llama", granularity, threshold=0.6)
    counter = RowCounter(model)
    branch = gated_branches(granularity)[0]
    with torch.no_grad():
        for training, execution, calls in ((False, None, 0), (True, None, 1), (True, "sparse", 0), (False, "dense", 1)):
            for rows in counter.rows.values():
                rows.clear()
            model.train(training)(random_tokens(2, 5), execution=execution)
            assert [len(counter.rows[index, branch]) for index in LAYERS] == [calls] * len(LAYERS)


@every_granularity
def test_one_row_is_executed_whole_or_not_at_all(granularity):
    _, model = make_pair("mistral", granularity, layers=tuple(range(NUM_LAYERS - 1)))
    randomize_routers(model, scale=1.0)
    for seed in range(4):
        input_ids = random_tokens(1, 8, seed)
        with torch.no_grad():
            dense, sparse = model(input_ids, execution="dense"), model(input_ids, execution="sparse")
        torch.testing.assert_close(sparse.logits, dense.logits, atol=LOGITS_BOUND, rtol=0)


def test_rows_of_a_block_mask_are_refused_rather_than_mixed_up():
    with pytest.raises(ValueError, match="can't select rows of a list"):
        select_rows({"attention_mask": []}, torch.tensor([0]), batch=2)
