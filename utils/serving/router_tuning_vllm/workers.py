"""Workers that let the model see which requests its batch has.

A decision for a request outlives a step, and is of its prompt alone, also where the request was preempted and comes
back as one prefill of prompt and answer so far. vLLM gives a model tokens and blocks, not requests.
"""

from vllm.v1.worker.cpu_worker import CPUWorker
from vllm.v1.worker.gpu_worker import Worker


class _Routed:
    """Over a worker: hands its model runner to the routed model."""

    def load_model(self, *args, **kwargs) -> None:
        """Load as the worker does, then introduce the two."""
        super().load_model(*args, **kwargs)
        self.model_runner.get_model().routed.see(self.model_runner)


class RoutedCPUWorker(_Routed, CPUWorker):
    """The CPU worker."""


class RoutedGPUWorker(_Routed, Worker):
    """The GPU worker."""
