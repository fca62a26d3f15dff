"""The project's own model beside what an engine did: the same tokens, the engine's decisions, the logits of both.

An engine and a model round differently, so near its threshold a router may decide either way. How near is measured:
the reference is computed in float32 and in float64, and by as much as these differ the engine may differ too, times
`SLACK`, as its order of sums is another one.
"""

from collections import defaultdict
from dataclasses import dataclass, field

import torch

from utils.model.routing_mod import Decision

SLACK = 4.0
"""Two float32 computations differ by up to twice what one differs from float64; the largest of some is not of all."""


class Recorder:
    """What the routers of a running engine decided, by request: (router, position) -> logit and gate.

    Args:
        model: the engine's routed model.
    """

    def __init__(self, model):
        self.routed = model.routed
        self.routed.recorder = self
        self.requests = defaultdict(dict)

    def __call__(self, router, batch, logits, kept):
        ids = self.routed.runner.input_batch.req_ids
        if batch.decided is not None:
            places = [(row, 0) for row in batch.fresh]
        else:
            computed = self.routed.runner.input_batch.num_computed_tokens_cpu
            rows = batch.request_of_token_on_host
            places = [(row, computed[row] + token - batch.starts[row]) for token, row in enumerate(rows)]
        for (row, position), logit, gate in zip(places, logits.tolist(), kept.tolist(), strict=True):
            self.requests[ids[row]][router, int(position)] = logit, gate

    def of(self, request):
        """Return what was decided for a request whose id starts so."""
        (found,) = [each for name, each in self.requests.items() if name.split("-")[0] == request]
        return found


@dataclass
class Compared:
    """One request of an engine beside the model.

    Args:
        logits: of the routers, for each decision the engine's, float32's and float64's.
        thresholds: of each decision, as a logit.
        gates: what the engine decided for each.
        choices: of the language model, for each output token the engine's token and the model's two likeliest logits
            and tokens in float32 and float64.
    """

    logits: list[tuple[float, float, float]] = field(default_factory=list)
    thresholds: list[float] = field(default_factory=list)
    gates: list[bool] = field(default_factory=list)
    outputs: list[int] = field(default_factory=list)
    language: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)


@torch.inference_mode()
def compare(models, prompt, output, decided, settings=None) -> Compared:
    """Follow what an engine did for one request.

    Args:
        models: the routed model in float32 and in float64.
        prompt, output: token ids.
        decided: (router, position) -> logit and gate, of all tokens but the last.
        settings: what the request was served with, where not the models' own.
    """
    tokens = torch.tensor([prompt + output[:-1]])
    settings = settings or models[0].mod_settings
    by_sequence = settings.level == "sequence"
    places = list(getattr(settings, "places", settings.layers))
    logits = []
    for model in models:
        found = {}

        def follow(place, inputs, model=model, found=found):
            router = model.router_modules()[place]
            number = places.index(place)
            found[number] = router(inputs).flatten()
            count = 1 if by_sequence else tokens.shape[1]
            gates = torch.tensor([float(decided[number, position][1]) for position in range(count)])
            gates = gates if by_sequence else gates[None]
            return Decision(scores=gates, gates=gates)

        mask = None
        if by_sequence:
            mask = torch.arange(tokens.shape[1])[None] < len(prompt)
        positions = torch.arange(tokens.shape[1])[None]
        result = model(
            *(tokens,), position_ids=positions, gate_rule=follow, token_mask=mask, use_cache=False, execution="dense"
        )
        logits.append((found, result.logits[0, len(prompt) - 1 :].double()))
    compared = Compared(outputs=list(output))
    (single, language), (double, exact) = logits
    for (number, position), (logit, gate) in sorted(decided.items()):
        if position >= tokens.shape[1]:
            continue
        threshold = torch.tensor(settings.threshold_of(places[number]), dtype=torch.float64).logit().item()
        compared.logits.append((logit, single[number][position].item(), double[number][position].item()))
        compared.thresholds.append(threshold)
        compared.gates.append(gate)
    compared.language = list(zip(language, exact, strict=True))
    return compared


def check(results: list[Compared]) -> dict[str, float]:
    """Assert that an engine decided as the model does, and said what it says, wherever rounding can't reach.

    Returns:
        `decisions`, `undecided` (of these, those that rounding reaches), `bound` (on the logits of routers), `tokens`.
    """
    logits = torch.tensor([each for result in results for each in result.logits], dtype=torch.float64)
    thresholds = torch.tensor([each for result in results for each in result.thresholds], dtype=torch.float64)
    gates = torch.tensor([each for result in results for each in result.gates])
    engine, single, double = logits.unbind(dim=1)
    bound = SLACK * (single - double).abs().max()
    assert (engine - double).abs().max() <= bound, f"{(engine - double).abs().max():.2e} above {bound:.2e}"
    clear = (double - thresholds).abs() > bound
    assert torch.equal(gates[clear], (double > thresholds)[clear])

    language = torch.stack([torch.stack(pair) for result in results for pair in result.language])
    reach = SLACK * (language[:, 0] - language[:, 1]).abs().max()
    outputs = torch.tensor([each for result in results for each in result.outputs])
    best = language[:, 1].max(dim=-1).values
    behind = best - language[:, 1].gather(1, outputs[:, None])[:, 0]
    assert behind.max() <= 2 * reach, f"a token that is {behind.max():.2e} behind the likeliest, above {2 * reach:.2e}"
    return {
        "decisions": len(gates),
        "undecided": int((~clear).sum()),
        "bound": bound.item(),
        "executed": gates.double().mean().item(),
        "tokens": len(outputs),
    }
