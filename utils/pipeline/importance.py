"""Which layers or experts can be left out for all inputs: static drops, against which routing is measured.

By cosine similarity, as the paper's baseline does (Figures 2 and 3): the layers whose branch changes the residual
stream least. Greedily by loss: one layer after the other, each time the one without which the loss on some text is
lowest. Experts by the weight that the model's gate gives them (Expert Drop, Table 7).
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import nn
from tqdm.auto import tqdm

from utils.model.configuration_mod import Place, layer_of
from utils.model.costs import capacity_weights
from utils.model.routing_mod import Decision

from .held_out import Batch


@torch.no_grad()
def branch_similarity(model: nn.Module, batches: Iterable[Batch]) -> dict[Place, float]:
    """Return place -> mean cosine between the residual stream before and after what is routed there, over tokens.

    Args:
        model: a routed model, in evaluation mode; it runs densely.
        batches: text.
    """
    sums = dict.fromkeys(model.config.mod_settings.places, 0.0)
    mask, tokens = None, 0

    def add(place: Place, cosines: torch.Tensor) -> None:
        sums[place] += float(cosines[mask].sum())

    with watching_similarity(model, add):
        for batch in batches:
            mask = batch["attention_mask"].bool()
            tokens += int(mask.sum())
            inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
            model(**inputs, route=False, use_cache=False, logits_to_keep=1)
    return {layer: total / tokens for layer, total in sums.items()}


@contextmanager
def watching_similarity(model: nn.Module, see: Callable[[Place, torch.Tensor], None]) -> Iterator[None]:
    """Call `see` in each forward for each router with the cosine between the residual stream before and after.

    Args:
        model: a routed model; its forwards are dense, and keep everything.
        see: takes the router's place and the cosines, float32 [batch, tokens].
    """
    settings, layers = model.config.mod_settings, model.get_decoder().layers
    before: dict[Place, torch.Tensor] = {}

    def watch(place: Place) -> list:
        block, branch = layers[layer_of(place)], settings.branch_of(place)

        def enter(module, args, kwargs):
            before[place] = args[0] if args else kwargs["hidden_states"]

        def leave(module, args, kwargs, output):
            output = output[0] if isinstance(output, tuple) else output
            after = output if branch == "block" else before[place] + output
            see(place, nn.functional.cosine_similarity(before[place].float(), after.float(), dim=-1))

        start = {"attn": block, "block": block, "mlp": block.post_attention_layernorm}[branch]
        end = {"attn": block.self_attn, "block": block, "mlp": block.mlp}[branch]
        return [
            start.register_forward_pre_hook(enter, with_kwargs=True),
            end.register_forward_hook(leave, with_kwargs=True),
        ]

    hooks = [hook for place in settings.places for hook in watch(place)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def starting_margins(model: nn.Module, batches: Iterable[Batch]) -> dict[Place, float]:
    """Return place -> how far above the others a router starts, in logits, mean 0 and standard deviation 1.

    The more its branch changes the residual stream (1 less `branch_similarity`), the higher.

    Args:
        model: a routed model; it runs densely.
        batches: text.
    """
    training = model.training
    model.eval()
    try:
        similarity = branch_similarity(model, batches)
    finally:
        model.train(training)
    values = torch.tensor([1.0 - value for value in similarity.values()], dtype=torch.float64)
    margins = (values - values.mean()) / values.std(correction=0).clamp(min=1e-9)
    return dict(zip(similarity, margins.tolist(), strict=True))


@torch.no_grad()
def loss_without(model: nn.Module, batches: Iterable[Batch], dropped: Collection[Place]) -> float:
    """Return the mean loss over supervised tokens where the routers `dropped` skip every input."""
    total = tokens = 0.0
    for batch in batches:
        count = float((batch["labels"][:, 1:] != -100).sum())
        total += count * float(model(**batch, use_cache=False, gate_rule=drop(dropped)).loss)
        tokens += count
    return total / tokens


def drop(dropped: Collection[Place]) -> Callable[[Place, torch.Tensor], Decision]:
    """Return the `gate_rule` that skips every input of the routers `dropped`, and keeps the rest."""

    def rule(place: Place, inputs: torch.Tensor) -> Decision:
        gates = inputs.new_full(inputs.shape[:-1], float(place not in dropped), dtype=torch.float32)
        return Decision(gates, gates)

    return rule


def most_similar(model: nn.Module, batches: Sequence[Batch], capacity: float) -> list[Place]:
    """Return the routers to be left out whose branch changes the residual stream least, the least first.

    Where routers differ in what skipping saves, the change is relative to that. As many are taken as come nearest to
    the capacity.
    """
    weights = capacity_weights(model.config.to_dict(), model.config.mod_settings)
    similarity = branch_similarity(model, batches)
    order = sorted(similarity, key=lambda place: (1 - similarity[place]) / weights[place])
    chosen: list[Place] = []
    for place in order:
        if not _brings_nearer(weights, chosen, place, capacity):
            break
        chosen.append(place)
    return chosen


def greedy(model: nn.Module, batches: Sequence[Batch], capacity: float, progress: bool = False) -> list[Place]:
    """Return the routers to be left out one after the other, each the one that then costs the least loss.

    Where they differ in what skipping saves, the increase of the loss is relative to that. As many are taken as come
    nearest to the capacity.
    """
    weights = capacity_weights(model.config.to_dict(), model.config.mod_settings)
    chosen: list[Place] = []
    loss, left = loss_without(model, batches, ()), list(weights)
    with tqdm(desc="leaving out layers", unit="try", disable=not progress) as bar:
        while left and any(_brings_nearer(weights, chosen, place, capacity) for place in left):
            losses = {}
            for place in left:
                losses[place] = loss_without(model, batches, {*chosen, place})
                bar.update()
            best = min(left, key=lambda place: (losses[place] - loss) / weights[place])
            if not _brings_nearer(weights, chosen, best, capacity):
                break
            chosen.append(best)
            left.remove(best)
            loss = losses[best]
    return chosen


def _brings_nearer(weights: Mapping[Place, float], chosen: Sequence[Place], place: Place, capacity: float) -> bool:
    """Tell whether to leave out one more router brings the capacity nearer to what is asked for."""
    before = 1 - sum(weights[each] for each in chosen)
    return abs(before - weights[place] - capacity) < abs(before - capacity)


@torch.no_grad()
def expert_weight(model: nn.Module, batches: Iterable[Batch]) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum the weight that the gates of the dense model give each expert of the routed layers, and count its tokens.

    Args:
        model: routed at `expert_token`; it runs densely.
        batches: text.

    Returns:
        Twice float64 [routed layers, experts]: weight, and tokens assigned.
    """
    layers, num_experts = model.config.mod_settings.layers, model.config.num_experts
    weight, tokens = torch.zeros(2, len(layers), num_experts, dtype=torch.float64).unbind()
    mask = torch.ones(0)

    def add(place: int) -> Callable:
        def collect(gate, args, output):
            _, weights, experts = (values.cpu() for values in output)  # the last two [batch * tokens, top_k]
            chosen = experts[mask].flatten()
            weight[place] += chosen.bincount(weights[mask].flatten().double(), minlength=num_experts)
            tokens[place] += chosen.bincount(minlength=num_experts)

        return collect

    decoder = model.get_decoder().layers
    hooks = [decoder[layer].mlp.gate.register_forward_hook(add(place)) for place, layer in enumerate(layers)]
    try:
        for batch in batches:
            mask = batch["attention_mask"].bool().flatten().cpu()
            inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
            model(**inputs, route=False, use_cache=False, logits_to_keep=1)
    finally:
        for hook in hooks:
            hook.remove()
    return weight, tokens


def least_important(
    weight: torch.Tensor, tokens: torch.Tensor, capacity: float, share: float | None = None
) -> torch.Tensor:
    """Choose the experts with the least weight, relative to their layer's, over all layers together.

    Args:
        weight: [layers, experts], as `expert_weight` returns it.
        tokens: the same shape, assigned.
        capacity: share of the assignments to execute; as many experts are chosen as come nearest to it.
        share: of the experts to choose instead, in [0, 1).

    Returns:
        bool [layers, experts], True for the chosen ones.
    """
    order = (weight / weight.sum(dim=1, keepdim=True)).flatten().argsort(stable=True)
    if share is None:
        left = 1 - torch.cat([tokens.new_zeros(1), tokens.flatten()[order].cumsum(0) / tokens.sum()])
        count = int((left - capacity).abs().argmin())
    else:
        count = round(share * len(order))
    chosen = torch.zeros(len(order), dtype=torch.bool)
    chosen[order[:count]] = True
    return chosen.view_as(weight)
