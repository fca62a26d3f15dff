"""What the engine is set to for a routed checkpoint, and what is refused. vLLM calls this with its whole config."""

import json
import os
import tempfile

from vllm.config import CUDAGraphMode, VllmConfig
from vllm.logger import init_logger
from vllm.model_executor.models.config import VerifyAndUpdateConfig
from vllm.platforms import current_platform

from .config import options_of, routing_of
from .counts import SERVED_VARIABLE, Counts

logger = init_logger("vllm.router_tuning")

ROUTED_OP = "vllm::routed_layer"


def refusal(config: VllmConfig, level: str) -> str | None:
    """Return in one line why an engine can't serve routed checkpoints, None where it can.

    Args:
        level: of the checkpoint's decisions, `sequence` or `token`.
    """
    parallel = config.parallel_config
    if config.speculative_config is not None:
        return "speculative decoding is not served with routed checkpoints: leave --speculative-config out"
    if parallel.pipeline_parallel_size > 1:
        return "pipeline parallelism is not served with routed checkpoints: use --tensor-parallel-size"
    if parallel.data_parallel_size > 1:
        return "data parallelism is not served with routed checkpoints: start several servers"
    for name in ("decode_context_parallel_size", "prefill_context_parallel_size"):
        if getattr(parallel, name, 1) > 1:
            return f"{name} above 1 is not served with routed checkpoints: leave it out"
    if parallel.enable_dbo:
        return "dual batch overlap is not served with routed checkpoints: leave --enable-dbo out"
    if config.lora_config is not None:
        return (
            "LoRA adapters are not served with routed checkpoints: merge them with build_mod_checkpoint.py "
            "--merge_lora, and leave --enable-lora out"
        )
    if config.model_config.quantization is not None:
        return (
            f"quantization {config.model_config.quantization} is not served with routed checkpoints: serve the "
            "unquantized one (--dtype bfloat16 halves float32)"
        )
    if config.model_config.runner_type != "generate":
        return f"--runner {config.model_config.runner_type} is not served with routed checkpoints: they generate"
    if level == "sequence" and config.kv_transfer_config is not None:
        return "routed by sequence, keys and values can't come from another engine: leave --kv-transfer-config out"
    return None


class EngineSettings(VerifyAndUpdateConfig):
    """Called by vLLM in the process that starts the engine, before the platform's own checks."""

    @staticmethod
    def verify_and_update_config(vllm_config: VllmConfig) -> None:
        """Check and set what depends on routing.

        Raises:
            ValueError: the checkpoint, an option or the engine's settings can't be served.
        """
        config = vllm_config.model_config.hf_config
        routing = routing_of(config)
        capacity, _ = options_of(config)
        if capacity is not None:
            routing.thresholds_at(capacity)
        if problem := refusal(vllm_config, routing.level):
            raise ValueError(problem)

        compilation = vllm_config.compilation_config
        # Skipping makes shapes depend on data: routed layers run eagerly, between the graphs of the others.
        if compilation.splitting_ops is None:
            cache_updates = ["vllm::unified_kv_cache_update", "vllm::unified_mla_kv_cache_update"]
            compilation.splitting_ops = [*compilation._attention_ops, *cache_updates]
        if ROUTED_OP not in compilation.splitting_ops:
            compilation.splitting_ops = [*compilation.splitting_ops, ROUTED_OP]
        if not vllm_config.model_config.enforce_eager and compilation.cudagraph_mode != CUDAGraphMode.NONE:
            compilation.cudagraph_mode = CUDAGraphMode.PIECEWISE

        # The worker has to hand over which requests a batch has, which is done for one of vLLM's two model runners.
        os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"
        if vllm_config.parallel_config.worker_cls == "auto":
            name = "RoutedCPUWorker" if current_platform.is_cpu() else "RoutedGPUWorker"
            vllm_config.parallel_config.worker_cls = f"router_tuning_vllm.workers.{name}"
        if routing.level == "sequence":
            _keep_prompts_whole(vllm_config)

        processors = list(vllm_config.model_config.logits_processors or [])
        vllm_config.model_config.logits_processors = [*processors, "router_tuning_vllm.admission:CapacityAdmission"]
        _announce(vllm_config, routing)


def _keep_prompts_whole(vllm_config: VllmConfig) -> None:
    """Set the scheduler so that a prompt is computed in one piece, all of it.

    A decision for a request is one over its whole prompt; and what keys and values a prefix has depends on the rest of
    the prompt, so that no other request can have them.
    """
    scheduler, cache = vllm_config.scheduler_config, vllm_config.cache_config
    changed = []
    if cache.enable_prefix_caching:
        cache.enable_prefix_caching = False
        changed.append("prefix caching")
    if scheduler.enable_chunked_prefill:
        scheduler.enable_chunked_prefill = False
        changed.append("chunked prefill")
    if changed:
        logger.warning_once("this checkpoint decides for whole prompts: %s switched off", " and ".join(changed))
    scheduler.long_prefill_token_threshold = 0
    if scheduler.max_num_batched_tokens < vllm_config.model_config.max_model_len:
        # else a longer prompt would wait for ever
        scheduler.max_num_batched_tokens = vllm_config.model_config.max_model_len


def _announce(vllm_config: VllmConfig, routing) -> None:
    """Tell the processes that are started from here what is served, and where its counts lie."""
    handle, path = tempfile.mkstemp(prefix="router-tuning-counts-")
    os.close(handle)
    Counts.create(path, len(routing.places))
    os.environ[SERVED_VARIABLE] = json.dumps(
        {
            "counts": path,
            "mod": vllm_config.model_config.hf_config.mod,
            "num_layers": vllm_config.model_config.hf_config.num_hidden_layers,
            "hidden_size": vllm_config.model_config.hf_config.hidden_size,
            "prefix_caching": bool(vllm_config.cache_config.enable_prefix_caching),
        }
    )
