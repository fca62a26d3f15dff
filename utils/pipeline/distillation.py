"""Learning from the dense model: `KL(dense || routed)` over the vocabulary at the supervised positions.

The teacher is the same weights with every input kept. Its distribution says what skipping costs with far less noise
than one label does. Below the first routed layer the two forwards are the same, so the teacher starts from the routed
forward's hidden states there, where the base's layers are all of one kind.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from utils.model.routing_mod import Routing, autocasts

from .losses import ROWS_OF_LOGITS

ROWS_IN_CACHE = 4
"""Rows of logits that a CPU turns into a gradient at once: 0.8 MB at SmolLM2's vocabulary, in float32."""


class DenseTeacher:
    """Gives the dense model's last hidden states for a batch that the routed model has just run on.

    Args:
        model: the routed model, unwrapped. A hook on its first routed layer catches the hidden states.
        share_prefix: start from them; not where another order of layers upsets how weights are gathered (ZeRO-3).
    """

    def __init__(self, model: nn.Module, share_prefix: bool = True):
        self.model = model
        self.first = model.config.mod_settings.layers[0]
        kinds = getattr(model.config, "layer_types", None)
        self.shares_prefix = share_prefix and self.first > 0 and (not kinds or len(set(kinds)) == 1)
        self._caught: torch.Tensor | None = None
        if self.shares_prefix:
            model.get_decoder().layers[self.first].register_forward_pre_hook(self._catch, with_kwargs=True)

    def _catch(self, layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if layer.training:
            self._caught = (args[0] if args else kwargs["hidden_states"]).detach()

    @torch.no_grad()
    def states(self, input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Return the dense model's last hidden states, [positions, hidden_size].

        Args:
            input_ids: int64 [batch, tokens], of the training forward that has just run; padded on the right.
            positions: int64 [positions], indices into the flattened [batch * tokens].
        """
        decoder = self.model.get_decoder()
        routing = Routing(token_mask=None, sparse=False, enabled=False)
        if self.shares_prefix:
            with _from_layer(decoder, self.first):
                output = decoder(inputs_embeds=self._caught, routing=routing, use_cache=False)
            self._caught = None
        else:
            output = decoder(input_ids=input_ids, routing=routing, use_cache=False)
        return output.last_hidden_state.flatten(0, 1).index_select(0, positions)


@contextmanager
def _from_layer(decoder: nn.Module, first: int) -> Iterator[None]:
    layers = decoder.layers
    decoder.layers = layers[first:]
    try:
        yield
    finally:
        decoder.layers = layers


def distillation_loss(student: torch.Tensor, teacher: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the sum over positions of `KL(teacher || student)`, in nats, float32 [].

    Args:
        student: logits [positions, vocabulary], of any floating dtype, with gradient.
        teacher: logits of the same shape.
        targets: int64 [positions]; a position with -100 does not count.
    """
    student, teacher = student.float().log_softmax(-1), teacher.float().log_softmax(-1)
    divergence = nn.functional.kl_div(student, teacher, reduction="none", log_target=True).sum(dim=-1)
    return torch.where(targets != -100, divergence, 0.0).sum()


def distilled_nll(
    states: torch.Tensor, teacher: torch.Tensor, head: nn.Linear, targets: torch.Tensor, weight: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return `(1 - weight) nll + weight KL`, and without gradient `nll` and `KL`, all sums, float32 [].

    In the memory of `ROWS_OF_LOGITS` rows of logits, half of them the teacher's, as `next_token_nll`.

    Args:
        states: [positions, hidden_size], the last hidden states that predict the targets.
        teacher: the same of the dense model, without gradient.
        head: the language model's output embeddings, without bias.
        targets: int64 [positions]; -100 does not count.
        weight: of the divergence, from 0 to 1.
    """
    table, device = head.weight, states.device.type
    if autocasts(device):
        dtype = torch.get_autocast_dtype(device)
        states, teacher, table = states.to(dtype), teacher.to(dtype), table.to(dtype)
    return _DistilledNLL.apply(states, table, teacher, targets, weight)


class _DistilledNLL(torch.autograd.Function):
    """Takes the gradient in the forward, while a chunk's logits are there; the backward only scales it."""

    @staticmethod
    def forward(ctx, states, table, teacher, targets, weight):
        nll, divergence = torch.zeros(2, dtype=torch.float32, device=states.device).unbind()
        states_grad = torch.empty_like(states)
        table_grad = torch.zeros_like(table, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        each = max(1, ROWS_OF_LOGITS // 2)
        logits = states.new_empty(2 * min(each, len(states)), len(table))  # the student's, below them the teacher's
        for start in range(0, len(states), each):
            rows = slice(start, start + each)
            count = len(targets[rows])
            torch.mm(torch.cat([states[rows], teacher[rows]]), table.T, out=logits[: 2 * count])
            student, dense = logits[:count], logits[count : 2 * count]
            size = ROWS_IN_CACHE if logits.device.type == "cpu" else count
            for part in zip(*(values.split(size) for values in (student, dense, targets[rows])), strict=True):
                sums = _logits_to_gradient(*part, weight)
                nll, divergence = nll + sums[0], divergence + sums[1]
            torch.mm(student, table, out=states_grad[rows])
            if table_grad is not None:
                table_grad += student.T @ states[rows]
        ctx.save_for_backward(states_grad, None if table_grad is None else table_grad.to(table.dtype))
        ctx.mark_non_differentiable(nll, divergence)
        return (1 - weight) * nll + weight * divergence, nll, divergence

    @staticmethod
    def backward(ctx, grad_output, *_):
        grads = [None if grad is None else grad * grad_output for grad in ctx.saved_tensors]
        return *grads, None, None, None


def _logits_to_gradient(
    student: torch.Tensor, dense: torch.Tensor, targets: torch.Tensor, weight: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Put the loss's gradient with respect to the student's logits in their place; return the sums of nll and KL.

    Args:
        student, dense: logits [rows, vocabulary]; the first is written to.
        targets: int64 [rows].
        weight: of the divergence.
    """
    counted = (targets != -100).unsqueeze(-1)  # [rows, 1]
    index = targets.clamp(min=0).unsqueeze(-1)
    log_q, log_p = student.float().log_softmax(-1), dense.float().log_softmax(-1)
    nll = -torch.where(counted, log_q.gather(-1, index), 0.0).sum()
    p = log_p.exp()
    divergence = torch.linalg.vecdot(p, log_p.sub_(log_q)).unsqueeze(-1)
    # d nll / d logits = q - onehot, d KL / d logits = q - p
    gradient = log_q.exp_().sub_(p, alpha=weight)
    gradient.scatter_add_(-1, index, torch.full_like(index, weight - 1, dtype=gradient.dtype))
    student.copy_(gradient.masked_fill_(~counted, 0.0))
    return nll, torch.where(counted, divergence, 0.0).sum()
