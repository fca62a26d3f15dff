"""Control by a budget: a toy with a known answer, draws that do not depend on the batch, calibration, and resuming."""

import math
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from model_zoo import LAYERS as MODEL_LAYERS
from model_zoo import make_pair, randomize_routers

from utils.io.errors import UserError
from utils.model.configuration_mod import MoDSettings
from utils.model.routing_mod import Decision, MoDRouter
from utils.pipeline.calibration import (
    LARGEST_CUT,
    calibrate,
    fold,
    settle,
    settled_cuts,
)
from utils.pipeline.capacity_control import BudgetControl, RouterMoments, row_keys, uniform
from utils.pipeline.losses import capacity_hinge
from utils.pipeline.regression_control import RegressionControl, ridge

HIDDEN, LAYERS, ROWS = 8, (3, 5, 6), 64
COSTS = {3: 0.2, 5: 0.2, 6: 1.0}
"""What skipping a layer adds to the toy's loss, on average."""


def toy_inputs(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return router inputs [ROWS, HIDDEN] around a common mean, and each row's factor of the cost, read off them."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(ROWS, HIDDEN, generator=generator)
    return features + 3.0, (1 + 0.9 * features[:, 0].clamp(-1, 1))


def moments_of(features: torch.Tensor) -> RouterMoments:
    """Return the moments of router inputs."""
    return RouterMoments(features.mean(dim=0), features.std(dim=0))


def make_control(target: float) -> BudgetControl:
    control = BudgetControl({layer: MoDRouter(HIDDEN) for layer in LAYERS}, target)
    features, _ = toy_inputs()
    control.begin({layer: moments_of(features) for layer in LAYERS}, lambda layer: 0.5)
    return control


def window(control: BudgetControl, step: int) -> torch.Tensor:
    """Return the loss of one accumulation window of the toy: skipping costs the square of what it changes."""
    features, factors = toy_inputs(step + 1)
    ids = torch.arange(ROWS * 4).view(ROWS, 4) + 1000 * step
    rule = control.rule(ids, torch.ones_like(ids))
    decisions = {layer: rule(layer, features) for layer in control.routers}
    loss = sum(COSTS[layer] * factors * (1 - of.gates) ** 2 for layer, of in decisions.items()).mean()
    capacity = torch.stack([of.scores for of in decisions.values()]).mean()
    return loss + control.loss(capacity)


def train(control: BudgetControl, first: int, last: int, steps: int = 150) -> None:
    routers = [router.weight for router in control.routers.values()]
    optimizer = torch.optim.Adam(routers, lr=0.02, betas=(0.9, 0.95))
    optimizer.load_state_dict(getattr(control, "test_state", None) or optimizer.state_dict())
    for step in range(first, last):
        optimizer.zero_grad()
        window(control, step).backward()
        control.step(step / steps, 1.0, Accelerator(cpu=True))
        optimizer.step()
    control.test_state = optimizer.state_dict()


def kept(control: BudgetControl) -> dict[int, torch.Tensor]:
    """Return what the thresholds that the control has come to keep of unseen rows, bool [ROWS] by layer."""
    features, _ = toy_inputs(10_000)
    cuts = control.cuts()
    with torch.no_grad():
        return {layer: router(features) >= cuts[layer][0] for layer, router in control.routers.items()}


@pytest.mark.parametrize("target", [0.9, 0.75, 0.5])
def test_the_budget_reaches_its_target_by_skipping_what_costs_least(target):
    control = make_control(target)
    train(control, 0, 150)
    shares = {layer: gates.float().mean().item() for layer, gates in kept(control).items()}
    assert sum(shares.values()) / 3 == pytest.approx(target, abs=0.06)
    assert shares[6] > 0.95, "the dear layer is skipped before the cheap ones"
    _, factors = toy_inputs(10_000)
    if target < 0.9:
        dear, cheap = factors > 1.5, factors < 0.5
        cheap_layers = torch.stack([kept(control)[layer] for layer in (3, 5)]).float()
        assert cheap_layers[:, dear].mean() > cheap_layers[:, cheap].mean() + 0.3, "inputs are told apart"


def test_the_push_on_the_routers_differs_between_targets():
    intercepts = {}
    for target in (0.9, 0.5):
        control = make_control(target)
        train(control, 0, 40)
        intercepts[target] = control.shift
    assert intercepts[0.5] > intercepts[0.9] + 0.5

    def gradient(target: float, scope: str) -> torch.Tensor:
        gates = torch.full((3, 4), 0.7, requires_grad=True)
        capacity_hinge(gates, torch.ones(4), target, scope).mean().backward()
        return gates.grad

    for scope in ("layer", "global"):
        assert not gradient(0.6, scope).equal(gradient(0.8, scope))


def test_the_price_is_where_a_common_shift_gains_nothing():
    """With one layer and one cost for all, `dL/dp = -cost` and `dC/dp = 1`: the price is the cost."""
    control = BudgetControl({0: MoDRouter(HIDDEN)}, 0.5)
    features, _ = toy_inputs()
    control.begin({0: moments_of(features)}, lambda layer: 0.5)
    for step in range(30):
        ids = torch.arange(4000).view(1000, 4) + 10_000 * step
        decision = control.rule(ids, torch.ones_like(ids))(0, torch.zeros(1000, HIDDEN))
        (0.7 * (1 - decision.gates).mean() + control.loss(decision.scores.mean())).backward()
        control.intercepts.grad = None
        control.step(1.0, 1.0, Accelerator(cpu=True))
    assert control.price == pytest.approx(0.7, rel=0.1)
    assert float(torch.sigmoid(control.intercepts.detach() - control.shift)) == pytest.approx(0.5, abs=0.02)


def test_the_gradient_through_a_drawn_gate_is_that_of_the_expected_loss():
    """Of a quadratic loss the trapezoid rule is exact: `dE/dz = p (1 - p) (L(1) - L(0))`."""
    control = BudgetControl({0: MoDRouter(HIDDEN)}, 0.5)
    moments = RouterMoments(torch.zeros(HIDDEN), torch.ones(HIDDEN))
    control.begin({0: moments}, lambda layer: 0.5)
    control.shift = 1.5
    ids = torch.arange(400_000).view(100_000, 4)
    decision = control.rule(ids, torch.ones_like(ids))(0, torch.zeros(100_000, HIDDEN))
    (3.0 * (1 - decision.gates) ** 2).mean().backward()
    p = float(torch.sigmoid(control.intercepts.detach() - 1.5))
    assert decision.gates.detach().mean() == pytest.approx(p, abs=0.005)
    assert float(control.intercepts.grad) == pytest.approx(-3.0 * p * (1 - p), rel=0.02)


def test_a_row_is_drawn_alike_in_any_batch_and_padding():
    ids = torch.randint(0, 1000, (3, 6), generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1] * 6, [1] * 4 + [0] * 2, [1] * 5 + [0]])
    together = uniform(row_keys(ids, mask), 7, 2, 6)
    alone = uniform(row_keys(ids[1:2, :4], mask[1:2, :4]), 7, 2, 4)
    assert together[1, :4].equal(alone[0])
    assert uniform(row_keys(ids, mask), 7, 2, None)[1].equal(
        uniform(row_keys(ids[1:2, :4], mask[1:2, :4]), 7, 2, None)[0]
    )


def test_an_experts_draw_is_its_own_wherever_the_gate_ranks_it():
    keys = row_keys(torch.arange(8).view(2, 4), torch.ones(2, 4, dtype=torch.int64))
    experts = torch.randint(0, 9, (2, 4, 3), generator=torch.Generator().manual_seed(0))
    draws = uniform(keys, 7, 2, 4, experts)
    assert uniform(keys, 7, 2, 4, experts.flip(-1)).equal(draws.flip(-1))
    assert draws[..., 0].ne(draws[..., 1]).equal(experts[..., 0] != experts[..., 1])


def test_an_experts_cut_keeps_what_its_own_intercept_does():
    control = BudgetControl({0: MoDRouter(HIDDEN, num_experts=3)}, 0.5)
    features, _ = toy_inputs()
    control.begin({0: moments_of(features)}, lambda layer: 0.5)
    with torch.no_grad():
        control.routers[0].weight.normal_(generator=torch.Generator().manual_seed(0))
        control.intercepts += torch.tensor([[-3.0, -1.0, 2.0]])
        control.shift = 1.0
        kept = control.centred(0, features) >= control.shift
        cuts, _ = control.cuts()[0]
        assert (control.routers[0](features) >= torch.tensor(cuts)).equal(kept)
    assert kept.float().mean(dim=0).diff().gt(0).all()
    ids = torch.arange(ROWS).view(1, ROWS)
    experts = torch.tensor([[2, 0]]).expand(1, ROWS, 2)
    decision = control.rule(ids, torch.ones_like(ids))(0, features[None], experts)
    expected = torch.sigmoid(control.centred(0, features) - control.shift)[:, [2, 0]]
    torch.testing.assert_close(decision.scores[0], expected)
    assert decision.experts is experts


def test_draws_are_even_and_unlike_between_rows_layers_tokens_and_steps():
    ids = torch.arange(8000).view(2000, 4)
    keys = row_keys(ids, torch.ones_like(ids))
    draws = torch.stack([uniform(keys, step, layer, 3) for step in (0, 1) for layer in (0, 1)]).view(4, 2000, 3)
    series = draws.permute(0, 2, 1).reshape(12, 2000)
    assert series.mean(dim=1).sub(0.5).abs().max() < 0.03
    assert series.var(dim=1).sub(1 / 12).abs().max() < 0.01
    assert (torch.corrcoef(series) - torch.eye(12)).abs().max() < 0.1


def test_a_control_goes_on_from_its_state_exactly():
    whole = make_control(0.6)
    train(whole, 0, 12)
    first = make_control(0.6)
    train(first, 0, 6)
    second = BudgetControl({layer: MoDRouter(HIDDEN) for layer in LAYERS}, 0.6)
    for layer in LAYERS:
        second.routers[layer].load_state_dict(first.routers[layer].state_dict())
    second.load_state_dict(first.state_dict())
    second.test_state = first.test_state
    train(second, 6, 12)
    assert second.intercepts.equal(whole.intercepts)
    assert (second.shift, second.price) == (whole.shift, whole.price)
    assert all(second.routers[layer].weight.equal(whole.routers[layer].weight) for layer in LAYERS)


class SkippingModel(torch.nn.Module):
    """Two layers of logits; what the first skips lowers the second's."""

    def __init__(self, logits: torch.Tensor):
        super().__init__()
        self.logits = logits
        self.config = SimpleNamespace(mod_settings=MoDSettings("attn_sequence", (0, 1)))

    def router_modules(self):
        return {layer: lambda logits: logits for layer in (0, 1)}

    def forward(self, input_ids, attention_mask, gate_rule, **kwargs) -> None:
        logits = self.logits[input_ids[:, 0]]
        first: Decision = gate_rule(0, logits[:, 0])
        gate_rule(1, logits[:, 1] - 0.8 * (1 - first.gates))


@pytest.mark.parametrize("target", [0.0, 0.25, 0.5, 0.75, 0.9, 1.0])
def test_calibration_lands_on_the_target_though_skips_move_later_logits(target):
    logits = torch.randn(500, 2, generator=torch.Generator().manual_seed(1)) * 2 + 3
    model = SkippingModel(logits)
    batches = [
        {"input_ids": ids[:, None], "attention_mask": torch.ones_like(ids[:, None])}
        for ids in torch.arange(500).split(60)
    ]
    cuts, share = calibrate(model, batches, {0: (3.0, 1.0), 1: (2.0, 2.0)}, target)
    first = logits[:, 0] >= cuts[0]
    second = logits[:, 1] - 0.8 * (~first).float() >= cuts[1]
    measured = torch.stack([first, second]).float().mean().item()
    assert measured == pytest.approx(share, abs=0.002)
    assert measured == pytest.approx(target, abs=0.02)


def test_a_cut_far_out_becomes_a_threshold_that_keeps_the_same():
    thresholds, factors = fold({2: -0.5, 4: 40.0})
    assert thresholds[0] == pytest.approx(1 / (1 + math.exp(0.5)))
    assert factors == {2: 1.0, 4: LARGEST_CUT / 40.0}
    for logit in (39.9, 40.1):
        assert (torch.sigmoid(torch.tensor(logit * factors[4])) >= thresholds[1]) == (logit >= 40.0)


class TestRegression:
    """Costs that are linear in what the routers read are found, and the price is that of the target."""

    @staticmethod
    def measured(target: float, rows: int = 200) -> tuple[RegressionControl, torch.Tensor, torch.Tensor]:
        control = RegressionControl({layer: MoDRouter(HIDDEN) for layer in LAYERS}, target)
        generator = torch.Generator().manual_seed(0)
        inputs = torch.randn(rows, HIDDEN, generator=generator) + 2.0
        costs = torch.stack([inputs @ torch.randn(HIDDEN, generator=generator) + 5 * n for n in range(3)], dim=1)
        for part in torch.arange(rows).split(10):
            for micro in part.split(5):
                rule = control.rule(micro[:, None], torch.ones_like(micro[:, None]))
                gates = [rule(layer, inputs[micro]).gates for layer in LAYERS]
                noise = 0.1 * torch.randn(len(micro), 3, generator=generator)
                ((costs[micro] + noise) * (1 - torch.stack(gates, dim=1))).sum().div(7.0).backward()
            control.step(0.0, 1.0, Accelerator(cpu=True), summed=7.0)
        return control, inputs, costs

    @pytest.mark.parametrize("target", [0.9, 0.75, 0.5])
    def test_what_costs_least_is_skipped(self, target):
        control, inputs, costs = self.measured(target)
        weights, cuts = control.solve()
        kept = torch.stack([inputs @ weights[layer][0] >= cuts[layer][0] for layer in LAYERS], dim=1)
        assert kept.float().mean() == pytest.approx(target, abs=0.01)
        relative = costs / costs.abs().mean(dim=1, keepdim=True)  # which is not quite linear in the inputs
        best = relative >= relative.flatten().sort().values[round((1 - target) * costs.numel())]
        assert (kept == best).float().mean() > 0.9

    def test_it_goes_on_from_its_state_exactly(self):
        control, *_ = self.measured(0.5)
        again = RegressionControl(control.routers, 0.5)
        again.load_state_dict(control.state_dict())
        (weights, cuts), (weights_again, cuts_again) = control.solve(), again.solve()
        assert cuts == cuts_again
        assert all(weights[layer].equal(weights_again[layer]) for layer in LAYERS)

    def test_left_out_predictions_are_those_of_fits_without_the_row(self):
        generator = torch.Generator().manual_seed(3)
        inputs = torch.randn(30, 4, generator=generator, dtype=torch.float64)
        costs = inputs[:, 0] + 0.3 * torch.randn(30, generator=generator, dtype=torch.float64)
        w, c, left_out = ridge(inputs, costs)
        assert (inputs @ w + c - costs).abs().mean() < (left_out - costs).abs().mean()
        assert torch.corrcoef(torch.stack([left_out, costs]))[0, 1] > 0.9

    def test_costs_that_nothing_foretells_are_predicted_no_worse_than_by_their_mean(self):
        generator = torch.Generator().manual_seed(4)
        inputs, costs = torch.randn(2, 40, 60, generator=generator, dtype=torch.float64)
        costs = costs[:, 0] + 3
        *_, left_out = ridge(inputs, costs)
        assert ((left_out - costs) ** 2).mean() < 1.1 * costs.var()


class TestSettledCuts:
    """What a checkpoint's thresholds say, in units in which its layers compare."""

    @staticmethod
    def settled(cuts, scales):
        _, model = make_pair("llama", "attn_sequence")
        randomize_routers(model)
        return model, settle(model, cuts, scales)

    def test_cuts_and_units_come_back_in_the_logits_of_the_routers_as_they_are(self):
        cuts, scales = dict(zip(MODEL_LAYERS, (-0.5, 8.0, 1.0), strict=True)), dict.fromkeys(MODEL_LAYERS, 3.0)
        model, units = self.settled(cuts, scales)
        middle = MODEL_LAYERS[1]
        assert units == {layer: 1.5 if layer == middle else 3.0 for layer in MODEL_LAYERS}
        for layer, (cut, unit) in settled_cuts(model, units).items():
            assert cut / unit == pytest.approx(cuts[layer] / scales[layer])

    def test_without_units_they_are_1_only_where_that_is_known(self):
        model, _ = self.settled(dict.fromkeys(MODEL_LAYERS, 0.5), dict.fromkeys(MODEL_LAYERS, 1.0))
        assert {unit for _, unit in settled_cuts(model, None, "regression").values()} == {1.0}
        for control in ("budget", None):
            with pytest.raises(UserError, match="so they need not be 1"):
                settled_cuts(model, None, control)
        scaled, _ = self.settled(dict.fromkeys(MODEL_LAYERS, 5.0), dict.fromkeys(MODEL_LAYERS, 1.0))
        with pytest.raises(UserError, match="routers were scaled"):
            settled_cuts(scaled, None, "regression")
