"""The share that is executed, by layer and in all: in vLLM's log and on its `/metrics`."""

import json
import os

from prometheus_client import Counter, Gauge
from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.v1.metrics.loggers import StatLoggerBase

from . import ARCHITECTURES
from .counts import SERVED_VARIABLE, Counts

logger = init_logger("vllm.router_tuning")


class ShareExecutedLogger(StatLoggerBase):
    """Reads what the worker counted, whenever vLLM has statistics of its own. Does nothing for other models."""

    def __init__(self, vllm_config: VllmConfig, engine_index: int = 0):
        self.counts = None
        if vllm_config.model_config.architecture not in ARCHITECTURES.values() or SERVED_VARIABLE not in os.environ:
            return
        from .config import routing_of

        self.counts = Counts(json.loads(os.environ[SERVED_VARIABLE])["counts"])
        self.names = [place.name for place in routing_of(vllm_config.model_config.hf_config).places]
        self.counted = self.logged = [(0, 0)] * len(self.names)
        self.labels = {"model_name": vllm_config.model_config.served_model_name, "engine": str(engine_index)}

    def log_engine_initialized(self) -> None:
        """Make the metrics, and say what will be counted.

        Not earlier: vLLM's own logger, which is made after this one, takes all metrics of its prefix off the registry.
        """
        if self.counts is None:
            return
        labels = self.labels

        def family(kind: type, name: str, documentation: str, *more: str, **options):
            return kind(f"vllm:routing_{name}", documentation, [*labels, *more], **options)

        latest = {"multiprocess_mode": "mostrecent"}
        seen = family(Counter, "inputs", "Inputs (tokens) that each router saw.", "layer")
        executed = family(Counter, "inputs_executed", "Inputs that each router executed.", "layer")
        share = family(Gauge, "share_executed", "Share of routed inputs executed since the start.", "layer", **latest)
        remembered = family(Gauge, "requests_remembered", "Requests whose decisions are remembered.", **latest)
        self.seen = [seen.labels(**labels, layer=name) for name in self.names]
        self.executed = [executed.labels(**labels, layer=name) for name in self.names]
        self.shares = [share.labels(**labels, layer=name) for name in (*self.names, "all")]
        self.remembered = remembered.labels(**labels)
        logger.info("Routers: %s", ", ".join(self.names))

    def record(self, scheduler_stats, iteration_stats, mm_cache_stats=None, engine_idx: int = 0) -> None:
        """Bring the metrics up to what was counted."""
        if self.counts is None:
            return
        counted = list(zip(self.counts.seen.tolist(), self.counts.executed.tolist(), strict=True))
        if counted == self.counted:
            return
        for router, ((seen, executed), (seen_before, executed_before)) in enumerate(
            zip(counted, self.counted, strict=True)
        ):
            self.seen[router].inc(seen - seen_before)
            self.executed[router].inc(max(0, executed - executed_before))
            if seen:
                self.shares[router].set(executed / seen)
        self.shares[-1].set(_share(counted, [(0, 0)] * len(counted)))
        self.remembered.set(int(self.counts.remembered[0]))
        self.counted = counted

    def log(self) -> None:
        """Write one line, where something was executed since the last one."""
        if self.counts is None or self.counted == self.logged:
            return
        shares = [
            f"{name}: {_share([now], [before]):.2f}"
            for name, now, before in zip(self.names, self.counted, self.logged, strict=True)
        ]
        share = _share(self.counted, self.logged)
        logger.info("Routed inputs executed: %.3f of all; by layer %s", share, ", ".join(shares))
        self.logged = self.counted


def _share(now: list[tuple[int, int]], before: list[tuple[int, int]]) -> float:
    """Return the share executed of the inputs that were seen between two counts; 1 where there were none."""
    seen = sum(a for a, _ in now) - sum(a for a, _ in before)
    executed = sum(b for _, b in now) - sum(b for _, b in before)
    return executed / seen if seen else 1.0
