"""What one step's batch looks like to routed layers, and what is remembered from step to step.

vLLM's batch is flat: the tokens of all scheduled requests, one request after the other. `Routed` is there once for a
model; it makes a `Batch` for each step, which all layers share.
"""

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.forward_context import get_forward_context

from .counts import SERVED_VARIABLE, Counts
from .routing import REQUEST_CAPACITY, Routing

PUBLISH_SECONDS = 1.0
"""How often counts that lie on a GPU are fetched."""


class Choice:
    """Which tokens of a batch a router keeps.

    Args:
        kept: bool [tokens].
        host: the same on the host where it is there already, bool [tokens].
    """

    def __init__(self, kept: torch.Tensor, host: np.ndarray | None = None):
        self.kept = kept
        if host is not None:
            self.host = host

    @cached_property
    def host(self) -> np.ndarray:
        """`kept` on the host: on a GPU, the one wait for the device that skipping costs."""
        return self.kept.cpu().numpy()

    @cached_property
    def count(self) -> int:
        """Number of kept tokens."""
        return int(np.count_nonzero(self.host))

    @cached_property
    def tokens(self) -> torch.Tensor:
        """Indices of the kept tokens, int64, ascending."""
        return self.index(self.host)

    @cached_property
    def skipped(self) -> torch.Tensor:
        """Indices of the others, int64, ascending."""
        return self.index(~self.host)

    def index(self, mask: np.ndarray) -> torch.Tensor:
        """Return the indices where a mask is set, int64, on the device of `kept`."""
        return torch.from_numpy(np.flatnonzero(mask)).to(self.kept.device, non_blocking=True)


@dataclass
class Batch:
    """The requests of one step.

    Args:
        starts: int64 [requests + 1] on the host: first token of each request, and the number of tokens at the end.
        request_of_token: int64 [tokens].
        thresholds: float32 [routers, requests], where a request has a capacity of its own; None otherwise.
        decided: bool [routers, requests]: what was decided when they started; None where tokens are decided on.
        fresh: request -> length of its prompt, of those that start in this step and are yet to be decided on.
        remember: takes router, requests (int64) and what was decided for them (bool).
    """

    starts: np.ndarray
    request_of_token: torch.Tensor
    thresholds: torch.Tensor | None = None
    decided: torch.Tensor | None = None
    fresh: Mapping[int, int] = field(default_factory=dict)
    remember: Callable[[int, torch.Tensor, torch.Tensor], None] | None = None

    @property
    def tokens(self) -> int:
        """Number of tokens, without padding."""
        return int(self.starts[-1])

    @cached_property
    def request_of_token_on_host(self) -> np.ndarray:
        """int64 [tokens]."""
        return np.repeat(np.arange(len(self.starts) - 1), np.diff(self.starts))

    @cached_property
    def decided_on_host(self) -> np.ndarray:
        """bool [routers, tokens], what was decided of each token's request; only where none is fresh."""
        return self.decided.cpu().numpy()[:, self.request_of_token_on_host]


class Decisions:
    """What was decided for requests, by id; of those that are gone nothing is kept.

    Args:
        routers: their number.
        device: where batches are.
    """

    def __init__(self, routers: int, device: torch.device):
        self.rows: dict[str, int] = {}
        self.free: list[int] = []
        self.table = torch.zeros(0, routers, dtype=torch.bool, device=device)

    def forget_others(self, alive: Mapping[str, Any]) -> None:
        """Forget the requests that are not among `alive`; one that was preempted is."""
        if len(self.rows) > len(alive):
            for request in [request for request in self.rows if request not in alive]:
                self.free.append(self.rows.pop(request))

    def add(self, request: str) -> None:
        """Make room for a request."""
        if not self.free:
            size = len(self.table)
            more = torch.zeros(max(32, size), self.table.shape[1], dtype=torch.bool, device=self.table.device)
            self.table = torch.cat((self.table, more))
            self.free.extend(reversed(range(size, len(self.table))))
        self.rows[request] = self.free.pop()


class Routed:
    """What the routed layers of a model share.

    Args:
        routing: the checkpoint's.
        capacity: that the server was started with; None for the checkpoint's own thresholds.
        execution: one of `routing.EXECUTIONS`; `masked` from the moment when skipping turned out wrong.
    """

    def __init__(self, routing: Routing, capacity: float | None, execution: str):
        self.routing, self.execution = routing, execution
        self.thresholds = routing.thresholds if capacity is None else routing.thresholds_at(capacity)
        self.runner: Any = None
        self.decisions: Decisions | None = None
        self.counts: Counts | None = None
        self.seen = [0] * len(routing.places)
        self.executed: list[Any] = [0] * len(routing.places)
        self.published = 0.0
        self.recorder: Callable[..., None] | None = None
        """Called with router, batch, logits and gates wherever is decided; for tests."""

    def see(self, runner: Any) -> None:
        """Meet the model runner, which knows the requests of a batch."""
        self.runner = runner
        if self.routing.level == "sequence":
            self.decisions = Decisions(len(self.routing.places), runner.device)
        if SERVED_VARIABLE in os.environ and get_tensor_model_parallel_rank() == 0:
            self.counts = Counts(json.loads(os.environ[SERVED_VARIABLE])["counts"], "r+")

    def batch(self, layer_name: str) -> Batch | None:
        """Return this step's batch, or None in a run without requests (profiling, warm-up).

        Args:
            layer_name: of an attention layer.
        """
        context = get_forward_context()
        if not context.attn_metadata or self.runner is None:
            return None
        if "routed_batch" not in context.additional_kwargs:
            requests = self.runner.input_batch.num_reqs
            starts = self.runner.query_start_loc.np[: requests + 1].astype(np.int64)
            real = requests > 0 and starts[-1] == context.attn_metadata[layer_name].num_actual_tokens
            context.additional_kwargs["routed_batch"] = self._make(starts) if real else None
        return context.additional_kwargs["routed_batch"]

    def _make(self, starts: np.ndarray) -> Batch:
        ids = self.runner.input_batch.req_ids[: len(starts) - 1]
        device = self.runner.device
        request_of_token = np.repeat(np.arange(len(ids)), np.diff(starts))
        batch = Batch(starts, torch.from_numpy(request_of_token).to(device, non_blocking=True))
        batch.request_of_token_on_host = request_of_token
        batch.thresholds = self._thresholds(ids, device)
        if self.decisions is not None:
            self._recall(batch, ids)
        return batch

    def _thresholds(self, ids: Sequence[str], device: torch.device) -> torch.Tensor | None:
        """Return the thresholds of the requests, float32 [routers, requests], None where all have the server's."""
        own = {}
        for row, request in enumerate(ids):
            parameters = self.runner.requests[request].sampling_params
            if parameters is not None and parameters.extra_args and REQUEST_CAPACITY in parameters.extra_args:
                own[row] = self.routing.thresholds_at(parameters.extra_args[REQUEST_CAPACITY])
        if not own:
            return None
        rows = [own.get(row, self.thresholds) for row in range(len(ids))]
        return torch.tensor(rows, dtype=torch.float32).t().contiguous().to(device, non_blocking=True)

    def _recall(self, batch: Batch, ids: Sequence[str]) -> None:
        """Give a batch what was decided for its requests, and say which are yet to be decided on."""
        decisions, computed = self.decisions, self.runner.input_batch.num_computed_tokens_cpu
        decisions.forget_others(self.runner.requests)
        fresh = {}
        for row, request in enumerate(ids):
            if request not in decisions.rows:
                prompt = self.runner.requests[request].num_prompt_tokens
                if computed[row] > 0 or prompt > batch.starts[row + 1] - batch.starts[row]:
                    raise RuntimeError("a prompt comes in pieces or from a cache, and was to be decided on as a whole")
                decisions.add(request)
                fresh[row] = prompt
        rows = torch.tensor([decisions.rows[request] for request in ids]).to(batch.request_of_token.device)
        batch.decided, batch.fresh = decisions.table[rows].t().contiguous(), fresh

        def remember(router: int, requests: torch.Tensor, kept: torch.Tensor) -> None:
            decisions.table[rows[requests], router] = kept

        batch.remember = remember

    def count(self, router: int, tokens: int, executed: int | torch.Tensor) -> None:
        """Count inputs of a router and those that it executed."""
        self.seen[router] += tokens
        self.executed[router] = self.executed[router] + executed

    def publish(self) -> None:
        """Write the counts where the process that serves metrics reads them."""
        on_device = any(isinstance(each, torch.Tensor) for each in self.executed)
        if self.counts is None or (on_device and time.monotonic() - self.published < PUBLISH_SECONDS):
            return
        self.published = time.monotonic()
        self.counts.seen[:] = self.seen
        self.counts.executed[:] = [int(each) for each in self.executed]
        self.counts.remembered[0] = 0 if self.decisions is None else len(self.decisions.rows)
