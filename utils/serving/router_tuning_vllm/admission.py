"""Checks a request's own capacity before it is scheduled, so that a wrong one is an answer with status 400.

vLLM asks each logits processor whether it can do with a request's parameters; this one changes no logits.
"""

import json
import os
from functools import cache

from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor

from .counts import SERVED_VARIABLE
from .routing import REQUEST_CAPACITY, Routing


@cache
def _routing(served: str) -> tuple[Routing, bool]:
    values = json.loads(served)
    return Routing.from_config(values["mod"], values["num_layers"], values["hidden_size"]), values["prefix_caching"]


class CapacityAdmission(LogitsProcessor):
    """Refuses a request whose `vllm_xargs` have a capacity that can't be served."""

    @classmethod
    def validate_params(cls, sampling_params) -> None:
        """Raise `ValueError` where the request's capacity can't be served."""
        arguments = sampling_params.extra_args or {}
        if REQUEST_CAPACITY not in arguments:
            return
        routing, prefix_caching = _routing(os.environ[SERVED_VARIABLE])
        capacity = arguments[REQUEST_CAPACITY]
        routing.thresholds_at(capacity)
        if prefix_caching:
            raise ValueError(
                f"capacity {capacity}: with prefix caching, requests share keys and values, which depend on the "
                "capacity; start the server with --no-enable-prefix-caching"
            )

    def __init__(self, vllm_config, device, is_pin_memory):
        pass

    def is_argmax_invariant(self) -> bool:
        """Tell that greedy decoding needs not call it."""
        return True

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Ignore who is in the batch."""

    def apply(self, logits):
        """Return the logits as they are."""
        return logits
