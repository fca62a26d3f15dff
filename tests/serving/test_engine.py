"""The plugin in the real engine: it decides and says what the project's own model does, however requests come."""

import pytest
import torch
from reference import Recorder, check, compare

pytestmark = pytest.mark.serve
GRANULARITIES = [
    f"{target}_{level}" for target in ("attn", "mlp", "block", "attn_mlp") for level in ("sequence", "token")
]
LENGTHS = (1, 3, 7, 40, 100, 256, 17, 300)


def prompts_of(lengths=LENGTHS, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1, 256, (length,), generator=generator).tolist() for length in lengths]


def answer(llm, prompts, tokens=12, **parameters):
    from vllm import SamplingParams

    given = {"temperature": 0, "max_tokens": tokens, "ignore_eos": True, "detokenize": False, **parameters}
    return llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], SamplingParams(**given), use_tqdm=False)


def check_outputs(models, recorder, outputs, settings=None):
    """Compare all outputs; return `reference.check`'s figures."""
    compared = [
        compare(
            models, output.prompt_token_ids, list(output.outputs[0].token_ids), recorder.of(output.request_id), settings
        )
        for output in outputs
    ]
    figures = check(compared)
    assert figures["undecided"] <= max(1, figures["decisions"] // 500)  # else there was little to be equal
    assert 0 < figures["executed"] < 1
    return figures


SHORT = {("llama", "block_token", True), ("qwen3", "attn_sequence", True), ("llama", "attn_mlp_token", True)}
CASES = [
    pytest.param(*case, marks=() if case in SHORT else pytest.mark.slow)
    for case in [
        *(("llama", granularity, substitute) for granularity in GRANULARITIES for substitute in (True, False)),
        *((arch, "block_token", True) for arch in ("mistral", "qwen2", "qwen3")),
        *((arch, "attn_sequence", True) for arch in ("mistral", "qwen2", "qwen3")),
        ("mistral", "mlp_token", False),
        ("qwen2", "attn_mlp_token", True),
    ]
]


@pytest.mark.parametrize(("architecture", "granularity", "substitute"), CASES)
def test_eight_prompts_together_and_one_by_one_are_answered_as_the_model_does(
    engine, make_checkpoint, project_models, architecture, granularity, substitute
):
    checkpoint = make_checkpoint(architecture, granularity, substitute)
    llm, model = engine(checkpoint)
    models, recorder = project_models(checkpoint), Recorder(model)
    prompts = prompts_of()
    together = answer(llm, prompts)
    check_outputs(models, recorder, together)
    recorder.requests.clear()
    alone = [answer(llm, [prompt])[0] for prompt in prompts[:4]]
    check_outputs(models, recorder, alone)


@pytest.mark.parametrize("granularity", ["block_token", pytest.param("attn_token", marks=pytest.mark.slow)])
def test_by_token_chunked_prefill_and_prefix_caching_change_no_decision(
    engine, make_checkpoint, project_models, granularity
):
    checkpoint = make_checkpoint("llama", granularity)
    llm, model = engine(checkpoint, max_num_batched_tokens=64, block_size=32, enable_prefix_caching=True)
    models, recorder = project_models(checkpoint), Recorder(model)
    first = prompts_of((300,))[0]
    prompts = [first, [*first[:200], *prompts_of((60,), seed=1)[0]], *prompts_of((5, 130), seed=2)]
    outputs = [answer(llm, prompts[:1])[0], *answer(llm, prompts[1:])]
    assert outputs[1].num_cached_tokens >= 192
    cached = recorder.of(outputs[0].request_id)
    decided = recorder.of(outputs[1].request_id)
    shared = {key: value for key, value in cached.items() if key[1] < outputs[1].num_cached_tokens}
    assert not shared.keys() & decided.keys()  # what was cached was not decided again
    decided.update(shared)
    check_outputs(models, recorder, outputs)


def test_by_sequence_a_server_keeps_prompts_whole(engine, make_checkpoint, project_models):
    checkpoint = make_checkpoint("llama", "block_sequence")
    llm, model = engine(checkpoint, max_num_batched_tokens=64, enable_prefix_caching=True)
    config = llm.llm_engine.vllm_config
    assert not config.cache_config.enable_prefix_caching
    assert not config.scheduler_config.enable_chunked_prefill
    recorder = Recorder(model)
    check_outputs(project_models(checkpoint), recorder, answer(llm, prompts_of((300, 20, 4, 90, 33, 128))))


@pytest.mark.parametrize("granularity", ["block_sequence", "attn_token"])
def test_a_preempted_request_stays_as_decided(engine, make_checkpoint, project_models, granularity):
    checkpoint = make_checkpoint("llama", granularity)
    # 448 tokens fit, and 640 are wanted
    llm, model = engine(checkpoint, max_model_len=256, num_gpu_blocks_override=14, block_size=32)
    models, recorder = project_models(checkpoint), Recorder(model)
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    preempted, preempt = [], scheduler._preempt_request

    def watch(request, *rest, **more):
        preempted.append(request.request_id)
        return preempt(request, *rest, **more)

    scheduler._preempt_request = watch
    outputs = answer(llm, prompts_of((90, 100, 110, 60)), tokens=70)
    assert preempted
    check_outputs(models, recorder, outputs)
    if granularity == "block_sequence":
        answer(llm, prompts_of((4,)))
        assert len(model.routed.decisions.rows) <= 5  # what is gone is forgotten
        assert len(model.routed.decisions.table) == 32


@pytest.mark.parametrize("granularity", ["attn_token", "mlp_sequence", "block_sequence", "block_token"])
def test_skipping_gives_what_the_masked_form_does(engine, make_checkpoint, project_models, granularity):
    checkpoint = make_checkpoint("llama", granularity)
    llm, model = engine(checkpoint, hf_overrides={"routing_execution": "masked"})
    assert model.routed.execution == "masked"
    check_outputs(project_models(checkpoint), Recorder(model), answer(llm, prompts_of((3, 40, 120, 9))))


def test_a_capacity_is_chosen_for_the_server_and_for_a_request(engine, make_checkpoint, project_models):
    from vllm.exceptions import VLLMValidationError

    capacities = [{"capacity": share, "threshold": [level] * 3} for share, level in ((0.3, 0.7), (0.9, 0.3))]
    checkpoint = make_checkpoint("llama", "block_token", capacities=capacities)
    llm, model = engine(checkpoint, hf_overrides={"routing_capacity": 0.9}, enable_prefix_caching=False)
    models, recorder, prompts = project_models(checkpoint), Recorder(model), prompts_of((40, 90))
    settings = models[0].mod_settings
    most = check_outputs(models, recorder, answer(llm, prompts), settings.at_capacity(0.9))
    recorder.requests.clear()
    least = check_outputs(
        models, recorder, answer(llm, prompts, extra_args={"capacity": 0.3}), settings.at_capacity(0.3)
    )
    assert least["executed"] < 0.5 < most["executed"]
    for capacity in (0.2, "half", 0):
        with pytest.raises(VLLMValidationError, match="capacity"):
            answer(llm, prompts, extra_args={"capacity": capacity})


def test_several_answers_to_one_prompt_and_a_request_that_is_aborted(engine, make_checkpoint, project_models):
    from vllm import SamplingParams

    checkpoint = make_checkpoint("llama", "block_sequence")
    llm, model = engine(checkpoint)
    (prompt,) = prompts_of((50,))
    (several,) = answer(llm, [prompt], n=3, temperature=1.0, seed=1)
    assert len({tuple(each.token_ids) for each in several.outputs}) > 1
    core = llm.llm_engine
    for number in range(3):
        core.add_request(
            f"gone-{number}", {"prompt_token_ids": prompt}, SamplingParams(max_tokens=50, detokenize=False)
        )
    core.step()
    core.abort_request([f"gone-{number}" for number in range(3)])
    recorder = Recorder(model)
    check_outputs(project_models(checkpoint), recorder, answer(llm, prompts_of((50, 7, 21, 64))))
    assert len(model.routed.decisions.rows) <= 4


@pytest.mark.slow
def test_two_tensor_parallel_processes_decide_alike(make_checkpoint, monkeypatch):
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    monkeypatch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")  # to send `executed_by` to the workers
    checkpoint = make_checkpoint("llama", "block_token", True, kv_heads=2)
    said = []
    for processes in (1, 2):
        options = {"tensor_parallel_size": processes, "max_model_len": 512, "enforce_eager": True}
        llm = LLM(str(checkpoint), dtype="float32", skip_tokenizer_init=True, **options)
        said.append([list(output.outputs[0].token_ids) for output in answer(llm, prompts_of())])
        counted = llm.collective_rpc(executed_by)
        assert len(counted) == processes
        assert all(each == counted[0] for each in counted)
        del llm
        cleanup_dist_env_and_memory()
    assert said[0] == said[1]


def executed_by(worker):
    """Return what a worker's routers executed."""
    return worker.model_runner.get_model().routed.executed
