"""What training relies on: the straight-through gradient, who gets one, and gradient checkpointing."""

import pytest
import torch
from model_zoo import ARCHITECTURES, HIDDEN_SIZE, LAYERS, make_pair, pad, random_tokens, randomize_routers, texts

from utils.model.checkpoint import router_name
from utils.model.configuration_mod import GRANULARITIES
from utils.model.routing_mod import MoDRouter, Routing, decide, straight_through

every_architecture = pytest.mark.parametrize("arch", list(ARCHITECTURES))
every_granularity = pytest.mark.parametrize("granularity", GRANULARITIES)


def freeze_all_but_routers(model) -> None:
    """Let the routers train, and nothing else."""
    model.requires_grad_(False)
    for router in model.router_modules().values():
        router.weight.requires_grad_(True)


def test_the_gradient_of_a_gate_with_respect_to_its_score_is_one():
    scores = torch.rand(50, requires_grad=True)
    upstream = torch.randn(50)
    (straight_through(scores, 0.5) * upstream).sum().backward()
    assert scores.grad.equal(upstream)


@pytest.mark.parametrize("level", ["sequence", "token"])
def test_the_gradient_of_a_router_is_that_of_the_formula(level):
    """d(sum c M)/dW = sum over the decisions of c * s * (1 - s) * x, kept or dropped (Eq. 1, 2 and 4)."""
    router = MoDRouter(HIDDEN_SIZE)
    torch.nn.init.normal_(router.weight, std=0.3)
    hidden_states = torch.randn(4, 6, HIDDEN_SIZE)
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0], [0, 0, 0, 0, 0, 1]]).bool()
    _, gates = decide(router, hidden_states, level, 0.5, mask)
    assert 0 < gates.mean() < 1
    upstream = torch.randn(gates.shape)
    (gates * upstream).sum().backward()

    expected = torch.zeros(HIDDEN_SIZE)
    for row in range(4):
        real = hidden_states[row, mask[row]] if level == "sequence" else hidden_states[row]
        inputs = [real.mean(dim=0)] if level == "sequence" else list(real)
        for x, c in zip(inputs, upstream[row].reshape(-1), strict=True):
            score = 1 / (1 + torch.exp(-(router.weight[0].detach() @ x)))
            expected += c * score * (1 - score) * x
    torch.testing.assert_close(router.weight.grad[0], expected, atol=1e-5, rtol=1e-5)


@every_architecture
@every_granularity
def test_the_gradient_of_a_routed_layer_is_that_of_the_formula(arch, granularity):
    """dL/dW = sum of dL/dM * s * (1 - s) * x, with dL/dM from the base layer and a free number M as its gate."""
    base, model = make_pair(arch, granularity, layers=(1,))
    randomize_routers(model, scale=1.0)
    routed, plain = model.model.layers[1], base.model.layers[1]
    level, branches = model.config.mod_settings.level, model.config.mod_settings.branches
    hidden_states, upstream = torch.randn(8, 6, HIDDEN_SIZE), torch.randn(8, 6, HIDDEN_SIZE)
    position_ids = torch.arange(6)[None]
    kwargs = {
        "attention_mask": torch.full((6, 6), float("-inf")).triu(1)[None, None],
        "position_ids": position_ids,
        "position_embeddings": base.model.rotary_emb(hidden_states, position_ids=position_ids),
        "past_key_values": None,
    }
    routing = Routing(token_mask=None, sparse=False)
    (routed(hidden_states, routing=routing, **kwargs) * upstream).sum().backward()
    free = {branch: routing.decisions[routed.place_of(branch)].gates.detach() for branch in branches}
    assert all(0 < gates.mean() < 1 for gates in free.values())

    # the gates as free numbers: of two routers the second reads what the first has decided, and keeps that gradient
    inputs, scores = {}, {}

    def gate(branch: str, x: torch.Tensor) -> torch.Tensor | float:
        if branch not in branches:
            return 1.0
        inputs[branch] = x.mean(dim=1) if level == "sequence" else x
        scores[branch] = torch.sigmoid(inputs[branch] @ routed.router_of(branch).weight[0].detach())
        free[branch] = free[branch] + scores[branch] - scores[branch].detach()
        free[branch].retain_grad() if free[branch].requires_grad else free[branch].requires_grad_(True)
        return free[branch].reshape(8, -1, 1)

    normed = plain.input_layernorm(hidden_states)
    of_block = gate("block", normed)
    attention = plain.self_attn(hidden_states=normed, **kwargs)[0]
    after = hidden_states + gate("attn", normed) * attention
    mlp_input = plain.post_attention_layernorm(after)
    output = after + gate("mlp", mlp_input) * plain.mlp(mlp_input)
    output = hidden_states + of_block * (output - hidden_states)
    (output * upstream).sum().backward()

    for branch in branches:
        score, x = scores[branch].detach(), inputs[branch].detach()
        expected = ((free[branch].grad * score * (1 - score)).unsqueeze(-1) * x).flatten(0, -2).sum(dim=0)
        scale = expected.abs().max().item()
        found = routed.router_of(branch).weight.grad[0]
        torch.testing.assert_close(found, expected, atol=1e-5 * scale, rtol=1e-4)


@every_architecture
@every_granularity
@pytest.mark.parametrize("threshold", [0.5, 0.6])
def test_only_the_routers_get_a_gradient_and_each_does_kept_or_dropped(arch, granularity, threshold):
    """Routers at zero keep everything at 0.5 and drop everything at 0.6; both must be able to change their mind."""
    _, model = make_pair(arch, granularity, threshold=threshold)
    freeze_all_but_routers(model)
    input_ids, mask = pad(texts((9, 4)), "right")
    output = model.train()(input_ids, mask, labels=input_ids.masked_fill(mask == 0, -100))
    assert output.router_gates.eq(float(threshold == 0.5)).all()
    output.loss.backward()
    with_gradient = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert with_gradient == set(map(router_name, model.router_modules()))
    for router in model.router_modules().values():
        assert router.weight.grad.dtype == torch.float32
        assert router.weight.grad.isfinite().all()
        assert router.weight.grad.abs().max() > 1e-5


@every_granularity
def test_the_gates_in_the_output_carry_the_gradient_of_a_capacity_loss(granularity):
    _, model = make_pair("llama", granularity)
    randomize_routers(model, scale=0.7)
    freeze_all_but_routers(model)
    model.train()(random_tokens(4, 7)).router_gates.mean().backward()
    assert all(router.weight.grad.abs().max() > 1e-5 for router in model.router_modules().values())


@every_granularity
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_one_step_changes_the_routers_and_nothing_else(granularity, dtype):
    _, model = make_pair("llama", granularity)
    freeze_all_but_routers(model.to(dtype))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5, weight_decay=0.0)
    input_ids = random_tokens(2, 8)
    model.train()(input_ids, labels=input_ids).loss.backward()
    optimizer.step()
    changed = {name for name, value in model.state_dict().items() if not value.equal(before[name])}
    assert changed == set(map(router_name, model.router_modules()))


@every_architecture
@every_granularity
@pytest.mark.parametrize("frozen", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(arch, granularity, frozen):
    _, model = make_pair(arch, granularity)
    randomize_routers(model, scale=0.7)
    if frozen:
        freeze_all_but_routers(model)
    input_ids, mask = pad(texts((9, 4, 7)), "left")

    def step() -> tuple[float, dict[str, torch.Tensor]]:
        model.zero_grad()
        output = model.train()(input_ids, mask, labels=input_ids.masked_fill(mask == 0, -100))
        (output.loss + output.router_gates.mean()).backward()
        return output.loss.item(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    loss, expected = step()
    model.activation_checkpointing_enable({"use_reentrant": False})
    assert model.model.layers[LAYERS[0]].gradient_checkpointing
    loss_again, gradients = step()
    assert loss_again == loss
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-6, rtol=1e-5)


@every_granularity
def test_a_padding_token_gives_the_routers_no_gradient_through_the_loss(granularity):
    """The loss of a padded text and of the text alone give the routers the same gradient."""
    _, model = make_pair("qwen2", granularity)
    randomize_routers(model, scale=0.7)
    freeze_all_but_routers(model)
    (text,) = texts((8,))
    gradients = []
    for extra in (0, 5):
        input_ids, mask = pad([text], "right", extra)
        model.zero_grad()
        model.train()(input_ids, mask, labels=input_ids.masked_fill(mask == 0, -100)).loss.backward()
        gradients.append(torch.stack([router.weight.grad for router in model.router_modules().values()]))
    bound = 1e-4 * gradients[0].abs().max().item()
    torch.testing.assert_close(gradients[1], gradients[0], atol=bound, rtol=0)
