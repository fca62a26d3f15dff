"""Fit the substitutes in closed form: ridge regression of a branch's output on its normed input, cut to a low rank.

`S(x) = U D x + b` minimises `sum_i |F(x_i) - S(x_i)|^2`, `x` and `F` as in `substitute_mod.py`, over tokens of the
training rows in the dense model. Only sums over tokens are kept, of as many layers at a time as `SUMS_BYTES` hold, so
memory grows neither with the rows nor with the layers; each layer is solved by itself, in float64. Of all maps of rank
r the best is the full solution `B`, seen through its r strongest output directions: the eigenvectors of `B' C B`, `C`
being the covariance of the inputs (reduced-rank regression). It is a start: training goes on from it, together with
the routers (`RouterTrainer`).

For experts `F` is what a layer's experts return together for a token, `sum_i G_i E_i / sum_i G_i`, each token counting
with the square of `sum_i G_i`.

**The common beginning.** Tokens that all rows begin with, as a chat template's system message, count
`BEGINNING_WEIGHT` times. Their states are the same in every row: a map of low rank can hold them nearly exactly,
and whatever comes later attends to them. The loss of answers says little about them, so training would let go of what
the fit had: what the maps miss of the branches there, `sum |F(x_i) - S(x_i)|^2 / |F(x_i)|^2`, is a part of its loss.
"""

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from utils.io.errors import UserError
from utils.model.configuration_mod import MoDSettings, Place, layer_of

logger = logging.getLogger(__name__)

RIDGE = 1e-2
"""Strength of the ridge, in units of the inputs' mean variance."""
TOKENS_PER_FEATURE = 8
"""Tokens that a fit takes, as far as there are so many, for each feature of the hidden states."""
SUMS_BYTES = 2 << 30
"""Memory for sums over tokens; where those of all routers take more, the rows are read several times."""
BEGINNING_WEIGHT = 16.0
"""How many times a token counts that all rows begin with."""
MISSED_WEIGHT = 5.0
"""Weight of `missed_of_beginning` in the loss of training."""
RANK_SHARE = {"attn": 12, "mlp": 9, "block": 8, "expert": 9}
"""What is gated -> hidden size over default rank, by which a substitute computes a few percent of its branch."""


def default_rank(hidden_size: int, settings: MoDSettings) -> int | list[int]:
    """Return the rank of the substitutes where none was asked for, one for each router where a layer has two."""
    ranks = [max(1, hidden_size // RANK_SHARE[settings.branch_of(place)]) for place in settings.places]
    return ranks if len(settings.branches) > 1 else ranks[0]


def check_enough(lengths: Iterable[int], hidden_size: int) -> None:
    """Raise `UserError` where rows of these lengths, in tokens, are too few to fit maps of the hidden states."""
    lengths = list(lengths)
    tokens = sum(lengths)
    if tokens < hidden_size:
        rows = -(-hidden_size * len(lengths) // max(tokens, 1))
        raise UserError(
            f"substitute linear: the {len(lengths)} training rows have {tokens} tokens, and a fit needs {hidden_size}, "
            f"the hidden size: about {rows} such rows; give more rows, or take --substitute none"
        )


def rows_to_fit(lengths: Iterable[int], hidden_size: int) -> int:
    """Return how many of the first rows, of these lengths in tokens, a fit takes."""
    tokens = rows = 0
    for length in lengths:
        if tokens >= TOKENS_PER_FEATURE * hidden_size:
            break
        tokens, rows = tokens + length, rows + 1
    return rows


@torch.no_grad()
def fit(
    model: nn.Module, batches: Sequence[Mapping[str, torch.Tensor]], progress: bool = False
) -> dict[Place, dict[str, torch.Tensor]]:
    """Return the substitutes that fit the branches of the dense model best, and log how well they do.

    Args:
        model: a routed model with substitutes, which it keeps; it runs densely.
        batches: text, `input_ids` and `attention_mask`, int64 [batch, tokens].
        progress: show bars.

    Returns:
        Place -> parameter of `MoDSubstitute` -> float32 tensor.
    """
    settings, training = model.config.mod_settings, model.training
    model.eval()
    beginning, fitted, left = common_beginning(batches), {}, {}
    for places in _together(settings.places, model.config.hidden_size):
        branches = BranchMoments(model, beginning, places)
        branches.read(tqdm(batches, desc="reading branches for substitutes", unit="batch", disable=not progress))
        for place in tqdm(places, desc="fitting substitutes", unit="branch", disable=not progress):
            fitted[place], left[place] = solve(branches.moments.pop(place), settings.substitute_rank(place))
    model.train(training)
    logger.info(
        "substitutes fitted on %d rows; share of each branch's variance that they leave: %s",
        sum(len(batch["input_ids"]) for batch in batches),
        " ".join(f"{share:.2f}" for share in left.values()),
    )
    return {layer: {name: value.float().contiguous() for name, value in of.items()} for layer, of in fitted.items()}


def _together(places: Sequence[Place], hidden_size: int) -> list[Sequence[Place]]:
    """Return the places in parts whose `Moments` are held at once."""
    count = max(1, SUMS_BYTES // (2 * 8 * hidden_size**2))
    return [places[start : start + count] for start in range(0, len(places), count)]


def common_beginning(batches: Iterable[Mapping[str, torch.Tensor]]) -> int:
    """Return how many tokens all rows begin with; 0 of a single row.

    Args:
        batches: `input_ids` and `attention_mask`, int64 [batch, tokens], padded on the right.
    """
    first, rows, common = None, 0, 0
    for batch in batches:
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
            row, rows = ids[mask.bool()].tolist(), rows + 1
            if first is None:
                first, common = row, len(row)
            pairs = zip(first[:common], row[:common], strict=False)
            common = next((place for place, (a, b) in enumerate(pairs) if a != b), min(common, len(row)))
    return common if rows > 1 else 0


@dataclass
class Moments:
    """Sums over a layer's tokens, float64.

    Args:
        weight: [], of the tokens' weights.
        inputs, outputs: [hidden_size].
        products: [hidden_size, hidden_size], of inputs with inputs.
        crossed: [hidden_size, hidden_size], of inputs with outputs.
        squares: [], of the outputs' squared lengths.
    """

    weight: torch.Tensor
    inputs: torch.Tensor
    outputs: torch.Tensor
    products: torch.Tensor
    crossed: torch.Tensor
    squares: torch.Tensor

    @classmethod
    def zero(cls, hidden_size: int, device: torch.device) -> "Moments":
        """Return the sums over no tokens."""
        shapes = (), (hidden_size,), (hidden_size,), (hidden_size, hidden_size), (hidden_size, hidden_size), ()
        return cls(*(torch.zeros(shape, dtype=torch.float64, device=device) for shape in shapes))

    def add(self, inputs: torch.Tensor, outputs: torch.Tensor, weights: torch.Tensor) -> None:
        """Add tokens: inputs and outputs [tokens, hidden_size], weights [tokens]."""
        x, y = inputs.float(), outputs.float()
        weighed_x, weighed_y = x * weights[:, None], y * weights[:, None]
        self.weight += weights.sum()
        self.inputs += weighed_x.sum(dim=0)
        self.outputs += weighed_y.sum(dim=0)
        self.products += weighed_x.T @ x
        self.crossed += weighed_x.T @ y
        self.squares += (weighed_y * y).sum()


class RoutedBranches(ABC):
    """Reads what goes into the routed branches of the dense model, and what comes out.

    Args:
        model: a routed model.
        beginning: tokens, the first ones of each row, that count `BEGINNING_WEIGHT` times.
        places: whose branches; None for all.
    """

    def __init__(self, model: nn.Module, beginning: int = 0, places: Sequence[Place] | None = None):
        self.model = model
        self.beginning = beginning
        self.settings = model.config.mod_settings
        self.places = self.settings.places if places is None else places
        self._mask: torch.Tensor | None = None  # bool [batch * tokens], of the batch that is running
        self._weights: torch.Tensor | None = None  # float32 [tokens that are real], likewise
        self._attended: dict[Place, tuple[torch.Tensor, torch.Tensor]] = {}
        self._handles: list[Any] = []

    @abstractmethod
    def take(self, place: Place, inputs: torch.Tensor, outputs: torch.Tensor, weights: torch.Tensor) -> None:
        """Take a batch's real tokens: inputs and outputs [tokens, hidden_size], float32 weights [tokens]."""

    @torch.no_grad()
    def read(self, batches: Iterable[Mapping[str, torch.Tensor]]) -> None:
        """Run the dense model on batches of `input_ids` and `attention_mask`, padded on the right."""
        self._hook()
        try:
            for batch in batches:
                ids, mask = batch["input_ids"], batch["attention_mask"]
                weights = torch.ones_like(mask, dtype=torch.float32)
                weights[:, : self.beginning] = BEGINNING_WEIGHT
                self._mask = mask.flatten().bool()
                self._weights = weights.flatten()[self._mask]
                self.model(input_ids=ids, attention_mask=mask, route=False, use_cache=False, logits_to_keep=1)
        finally:
            for handle in self._handles:
                handle.remove()
            self._handles.clear()

    def _hook(self) -> None:
        for place in self.places:
            layer, branch = self.model.get_decoder().layers[layer_of(place)], self.settings.branch_of(place)
            if branch == "expert":
                self._handles.append(layer.mlp.experts.register_forward_hook(self._of_experts(place)))
                continue
            if branch != "mlp":
                hook = self._of_attention(place, branch)
                self._handles.append(layer.self_attn.register_forward_hook(hook, with_kwargs=True))
            if branch != "attn":
                self._handles.append(layer.mlp.register_forward_hook(self._of_mlp(place, branch)))

    def _add(self, place: Place, inputs: torch.Tensor, outputs: torch.Tensor) -> None:
        inputs, outputs = (values.detach().flatten(0, 1)[self._mask] for values in (inputs, outputs))
        self.take(place, inputs, outputs, self._weights)

    def _of_attention(self, place: Place, branch: str):
        def hook(module, args, kwargs, output):
            seen = kwargs["hidden_states"], output[0]
            if branch == "attn":
                self._add(place, *seen)
            else:
                self._attended[place] = seen

        return hook

    def _of_mlp(self, place: Place, branch: str):
        def hook(module, args, output):
            if branch == "mlp":
                self._add(place, args[0], output)
            else:  # a block's input is that of its attention, its output the sum of both branches
                inputs, attention = self._attended.pop(place)
                self._add(place, inputs, attention + output)

        return hook

    def _of_experts(self, place: Place):
        def hook(module, args, output):
            tokens, _, weights = args
            tokens, output, total = (values.detach()[self._mask] for values in (tokens, output, weights.sum(dim=-1)))
            total = total.float().clamp(min=1e-6)
            self.take(place, tokens, output / total[:, None], total**2 * self._weights)

        return hook


class BranchMoments(RoutedBranches):
    """Sums up moments: `moments`, place -> `Moments`."""

    def __init__(self, model: nn.Module, beginning: int = 0, places: Sequence[Place] | None = None):
        super().__init__(model, beginning, places)
        size, routers = model.config.hidden_size, model.router_modules()
        self.moments = {place: Moments.zero(size, routers[place].weight.device) for place in self.places}

    def take(self, place: Place, inputs: torch.Tensor, outputs: torch.Tensor, weights: torch.Tensor) -> None:
        self.moments[place].add(inputs, outputs, weights)


class BranchExamples(RoutedBranches):
    """Keeps what it reads, of a few tokens: `examples`, place -> inputs, outputs, both [tokens, hidden_size]."""

    def __init__(self, model: nn.Module):
        super().__init__(model)
        self.examples: dict[Place, tuple[torch.Tensor, torch.Tensor]] = {}

    def take(self, place: Place, inputs: torch.Tensor, outputs: torch.Tensor, weights: torch.Tensor) -> None:
        self.examples[place] = inputs, outputs.float()


def missed_of_beginning(model: nn.Module, examples: Mapping[Place, tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    """Return the mean over branches and tokens of `|F(x) - S(x)|^2 / |F(x)|^2`, float32 [].

    Args:
        model: a routed model with substitutes.
        examples: place -> `x` and `F(x)`, [tokens, hidden_size].
    """
    shares = []
    for place, substitute in model.substitute_modules().items():
        inputs, outputs = examples[place]
        missed = (substitute(inputs).float() - outputs).square().sum(dim=-1)
        shares.append((missed / outputs.square().sum(dim=-1).clamp(min=1e-12)).mean())
    return torch.stack(shares).mean()


def solve(moments: Moments, rank: int) -> tuple[dict[str, torch.Tensor], float]:
    """Return the substitute that fits best, and the share of the outputs' variance that it leaves.

    Args:
        moments: of a layer.
        rank: of the map, from 1 to the hidden size.

    Returns:
        Parameter of `MoDSubstitute` -> float64 tensor; `down` and `up` have equal norms along each direction.
    """
    count = moments.weight.clamp(min=1e-9)
    mean_x, mean_y = moments.inputs / count, moments.outputs / count
    covariance = moments.products / count - torch.outer(mean_x, mean_x)
    crossed = moments.crossed / count - torch.outer(mean_x, mean_y)
    variance = moments.squares / count - mean_y @ mean_y
    ridge = RIDGE * covariance.diagonal().mean() + 1e-12
    full = torch.linalg.solve(covariance + ridge * torch.eye(len(covariance)).to(covariance), crossed)  # y ~ x full
    _, directions = torch.linalg.eigh(full.T @ covariance @ full)
    up = directions[:, -rank:]  # eigenvalues ascend
    down = up.T @ full.T
    scale = down.norm(dim=1).clamp(min=1e-12).sqrt()
    down, up = down / scale[:, None], up * scale
    fit = up @ down
    left = variance - 2 * (fit * crossed.T).sum() + ((fit @ covariance) * fit).sum()
    return {"down": down, "up": up, "bias": mean_y - fit @ mean_x}, float(left / variance.clamp(min=1e-30))
