"""The table of transformers' ways to call a model: what each does to a routed one.

`GENERATE` has every field of `GenerationConfig` and every argument of `generate`, `FORWARD` every keyword of `forward`.
A test walks both, and fails over an option that a later transformers adds.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from model_zoo import VOCAB_SIZE, make_base, random_tokens
from tokenizers import Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import BPE
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedTokenizerFast,
    StaticCache,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    WatermarkingConfig,
)
from transformers.generation import CompileConfig, GenerationMixin, MaxLengthCriteria
from transformers.generation.streamers import BaseStreamer

BOTH = ("sequence", "token")


@dataclass(frozen=True)
class Option:
    """What an option does.

    Args:
        keywords: of the call, or a function of the model that makes them anew.
        plain: the tokens are those of plain generation, and not only those of the dense specification.
        refused: the levels at which it is a `ValueError` before anything is computed; all executions alike.
        refused_sparse: it is refused in sparse execution alone.
        message: a part of the refusal.
        batch: number of prompts, where not any will do.
    """

    keywords: dict[str, Any] | Callable[[Any], dict[str, Any]]
    plain: bool = False
    refused: tuple[str, ...] = ()
    refused_sparse: bool = False
    message: str = ""
    batch: int = 2

    def make(self, model) -> dict[str, Any]:
        """Return the keywords for one call of `model`."""
        return dict(self.keywords) if isinstance(self.keywords, dict) else self.keywords(model)


class Recorder(BaseStreamer):
    """A streamer that keeps nothing."""

    def put(self, value):
        pass

    def end(self):
        pass


@functools.cache
def tokenizer(size: int = VOCAB_SIZE) -> PreTrainedTokenizerFast:
    """Letters and pairs of them."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    pairs = [(one, other) for one in letters for other in letters][: size - 3 - len(letters)]
    words = ["<pad>", "<s>", "</s>", *letters, *map("".join, pairs)]
    made = Tokenizer(BPE({word: index for index, word in enumerate(words)}, pairs))
    made.decoder = Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


@functools.cache
def assistant(vocab_size: int = VOCAB_SIZE):
    """A dense model that drafts, with a generation config of its own."""
    return make_base("llama", seed=7, vocab_size=vocab_size)


def drafting(**options) -> Callable:
    """Keywords of assisted decoding with one more option."""
    return lambda model: {"assistant_model": assistant(), **options}


def custom_loop(model, input_ids, logits_processor, stopping_criteria, generation_config, **kwargs):
    """Generate by transformers' own loop, handed over as a function."""
    return GenerationMixin._sample(model, input_ids, logits_processor, stopping_criteria, generation_config, **kwargs)


def embedded(model) -> dict[str, Any]:
    """A prompt's embeddings."""
    with torch.no_grad():
        return {"inputs_embeds": model.get_input_embeddings()(random_tokens(2, 9, seed=11))}


def filled_cache(model, past: int) -> dict[str, Any]:
    """A dense model's cache of the first tokens of the prompt."""
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(random_tokens(2, past, seed=11), past_key_values=cache, route=False)
    return {"past_key_values": cache}


def sampled(**options) -> Option:
    """An option of sampling."""
    return Option({"do_sample": True, **options})


def to_heal() -> torch.Tensor:
    """A prompt that ends in a token with which others begin."""
    return tokenizer()("bananasinpyjamasaree", return_tensors="pt").input_ids


FROM_THE_HUB = {"refused": BOTH, "message": "trust_remote_code"}
"""Strategies that transformers moved out: itself it asks for `trust_remote_code`, and that is refused as well."""

GENERATE: dict[str, Option] = {
    # arguments of `generate`
    "inputs": Option({}, plain=True),
    "generation_config": Option({"generation_config": GenerationConfig(max_new_tokens=6, num_beams=2)}),
    "logits_processor": Option({"logits_processor": LogitsProcessorList([TemperatureLogitsWarper(0.5)])}, plain=True),
    "stopping_criteria": Option({"stopping_criteria": StoppingCriteriaList([MaxLengthCriteria(12)])}),
    "prefix_allowed_tokens_fn": Option({"prefix_allowed_tokens_fn": lambda row, ids: list(range(50))}),
    "synced_gpus": Option({"synced_gpus": True}, refused_sparse=True, message="execution='dense'"),
    "assistant_model": Option(drafting(), plain=True, batch=1),
    "streamer": Option({"streamer": Recorder()}, plain=True, batch=1),
    "negative_prompt_ids": Option({"negative_prompt_ids": random_tokens(2, 3), "guidance_scale": 1.5}),
    "negative_prompt_attention_mask": Option(
        {
            "negative_prompt_ids": random_tokens(2, 3),
            "negative_prompt_attention_mask": torch.tensor([[0, 1, 1], [1, 1, 1]]),
            "guidance_scale": 1.5,
        }
    ),
    "custom_generate": Option({"custom_generate": custom_loop}, plain=True),
    "custom_generate, from the hub": Option(
        {"custom_generate": "someone/loop", "trust_remote_code": True}, refused=BOTH, message="custom_generate='someone"
    ),
    "tokenizer": Option(lambda model: {"tokenizer": tokenizer(), "stop_strings": ["ab"]}),
    "assistant_tokenizer": Option(
        lambda model: {
            "assistant_model": assistant(200),
            "tokenizer": tokenizer(),
            "assistant_tokenizer": tokenizer(200),
        },
        plain=True,
        batch=1,
    ),
    # of the forward, by `generate`
    "inputs_embeds": Option(embedded),
    "attention_mask": Option({"attention_mask": torch.tensor([[0, 0, 0] + [1] * 6, [1] * 9])}),
    "position_ids": Option({"position_ids": torch.arange(9).expand(2, -1)}, plain=True),
    "past_key_values": Option(lambda model: {"past_key_values": DynamicCache(config=model.config)}, plain=True),
    "past_key_values, without decisions": Option(
        lambda model: filled_cache(model, 4), refused=("sequence",), message="no decision"
    ),
    "past_key_values, of a fixed size": Option(
        lambda model: {"past_key_values": StaticCache(config=model.config, max_cache_len=32)}, plain=True
    ),
    "logits_to_keep": Option({"logits_to_keep": 4}, refused=("sequence",), message="logits_to_keep=4", plain=True),
    "token_mask": Option({"token_mask": torch.ones(2, 9).bool()}, refused=BOTH, message="token_mask"),
    "states_at": Option({"states_at": torch.tensor([0])}, refused=BOTH, message="states_at"),
    # the length
    "max_length": Option({"max_length": 12, "max_new_tokens": None}),
    "max_new_tokens": Option({"max_new_tokens": 3}),
    "min_length": Option({"min_length": 12, "eos_token_id": list(range(1, 60))}),
    "min_new_tokens": Option({"min_new_tokens": 3, "eos_token_id": list(range(1, 60))}),
    "early_stopping": Option({"num_beams": 3, "early_stopping": True, "eos_token_id": list(range(1, 40))}),
    "max_time": Option({"max_time": 1000.0}, plain=True),
    "stop_strings": Option(lambda model: {"stop_strings": ["z", "cd"], "tokenizer": tokenizer()}),
    # the strategy
    "do_sample": sampled(),
    "num_beams": Option({"num_beams": 3}),
    "use_mtp": Option({"use_mtp": True}, refused=BOTH, message="use_mtp=True"),
    # the cache
    "use_cache": Option({"use_cache": False}, plain=True),
    "use_cache, beams": Option({"use_cache": False, "num_beams": 3}),
    "use_cache, guidance": Option(
        {"use_cache": False, "guidance_scale": 1.5}, refused=("sequence",), message="guidance_scale=1.5"
    ),
    "cache_implementation": Option({"cache_implementation": "dynamic"}, plain=True),
    "cache_implementation, static": Option({"cache_implementation": "static"}, plain=True),
    "cache_implementation, static beams": Option({"cache_implementation": "static", "num_beams": 3}),
    "cache_implementation, offloaded static": Option(
        {"cache_implementation": "offloaded_static"}, refused=BOTH, message="'offloaded_static'"
    ),
    "cache_implementation, offloaded": Option(
        {"cache_implementation": "offloaded"}, refused=BOTH, message="'offloaded'"
    ),
    "cache_implementation, quantized": Option(
        {"cache_implementation": "quantized"}, refused=BOTH, message="'quantized'"
    ),
    "cache_config": Option({"cache_config": {"nbits": 4}}, plain=True),
    "max_cache_len": Option({"max_cache_len": 64}, plain=True),
    "prefill_chunk_size": Option(
        {"prefill_chunk_size": 4}, plain=True, refused=("sequence",), message="prefill_chunk_size=4"
    ),
    # the logits
    "temperature": sampled(temperature=0.7),
    "top_k": sampled(top_k=5),
    "top_p": sampled(top_p=0.7),
    "min_p": sampled(min_p=0.1),
    "top_h": sampled(top_h=0.4),
    "typical_p": sampled(typical_p=0.6),
    "epsilon_cutoff": sampled(epsilon_cutoff=0.01),
    "eta_cutoff": sampled(eta_cutoff=0.01),
    "repetition_penalty": Option({"repetition_penalty": 1.5}),
    "encoder_repetition_penalty": Option({"encoder_repetition_penalty": 1.5}),
    "length_penalty": Option({"num_beams": 2, "length_penalty": 2.0, "eos_token_id": list(range(1, 40))}),
    "no_repeat_ngram_size": Option({"no_repeat_ngram_size": 2}),
    "bad_words_ids": Option({"bad_words_ids": [[index] for index in range(50, 200)]}),
    "renormalize_logits": Option({"renormalize_logits": True}, plain=True),
    "forced_bos_token_id": Option({"forced_bos_token_id": 5}, plain=True),
    "forced_eos_token_id": Option({"forced_eos_token_id": 5}),
    "remove_invalid_values": Option({"remove_invalid_values": True}, plain=True),
    "exponential_decay_length_penalty": Option(
        {"exponential_decay_length_penalty": (2, 1.5), "eos_token_id": list(range(1, 9))}
    ),
    "suppress_tokens": Option({"suppress_tokens": list(range(50, 200))}),
    "begin_suppress_tokens": Option({"begin_suppress_tokens": list(range(50, 200))}),
    "sequence_bias": Option({"sequence_bias": {(7,): 5.0}}),
    "token_healing": Option(
        lambda model: {"token_healing": True, "tokenizer": tokenizer(), "inputs": to_heal()}, batch=1
    ),
    "guidance_scale": Option({"guidance_scale": 1.5}),
    "watermarking_config": Option({"watermarking_config": WatermarkingConfig(bias=5.0)}),
    # what comes back
    "num_return_sequences": sampled(num_return_sequences=2),
    "output_attentions": Option(
        {"output_attentions": True, "return_dict_in_generate": True}, refused_sparse=True, message="execution='dense'"
    ),
    "output_hidden_states": Option({"output_hidden_states": True, "return_dict_in_generate": True}, plain=True),
    "output_scores": Option({"output_scores": True, "return_dict_in_generate": True}, plain=True),
    "output_logits": Option({"output_logits": True, "return_dict_in_generate": True}, plain=True),
    "return_dict_in_generate": Option({"return_dict_in_generate": True}, plain=True),
    # special tokens
    "pad_token_id": Option({"pad_token_id": 3, "eos_token_id": list(range(4, 60))}),
    "bos_token_id": Option({"bos_token_id": 5}, plain=True),
    "eos_token_id": Option({"eos_token_id": list(range(1, 60))}),
    "encoder_no_repeat_ngram_size": Option({"encoder_no_repeat_ngram_size": 0}, plain=True),
    "decoder_start_token_id": Option({"decoder_start_token_id": 5}, plain=True),
    # drafts
    "is_assistant": Option({"is_assistant": True, "return_dict_in_generate": True, "output_scores": True}),
    "num_assistant_tokens": Option(drafting(num_assistant_tokens=3), plain=True, batch=1),
    "num_assistant_tokens_schedule": Option(drafting(num_assistant_tokens_schedule="constant"), plain=True, batch=1),
    "assistant_confidence_threshold": Option(drafting(assistant_confidence_threshold=0.1), plain=True, batch=1),
    "prompt_lookup_num_tokens": Option({"prompt_lookup_num_tokens": 3}, plain=True, batch=1),
    "max_matching_ngram_size": Option(
        {"prompt_lookup_num_tokens": 3, "max_matching_ngram_size": 1}, plain=True, batch=1
    ),
    "assistant_early_exit": Option(
        {"assistant_early_exit": 2}, refused=BOTH, message="assistant_early_exit=2", batch=1
    ),
    "assistant_lookbehind": Option(drafting(assistant_lookbehind=4), plain=True, batch=1),
    "target_lookbehind": Option(drafting(target_lookbehind=4), plain=True, batch=1),
    "assistant_ensemble_weight": Option(drafting(assistant_ensemble_weight=0.5, do_sample=True), batch=1),
    "speculation_type": Option(
        drafting(speculation_type="dflash"), refused=BOTH, message="speculation_type='dflash'", batch=1
    ),
    # performance
    "compile_config": Option({"compile_config": CompileConfig()}, plain=True),
    "disable_compile": Option({"disable_compile": True}, plain=True),
    "continuous_batching_config": Option({}, plain=True),  # of `generate_batch`, which has a test of its own
    # moved to the hub
    "low_memory": Option({"low_memory": True}, plain=True),
    "penalty_alpha": Option({"penalty_alpha": 0.6, "top_k": 4}, **FROM_THE_HUB),
    "dola_layers": Option({"dola_layers": "high"}, **FROM_THE_HUB),
    "diversity_penalty": Option({"num_beams": 2, "num_beam_groups": 2, "diversity_penalty": 0.5}, **FROM_THE_HUB),
    "num_beam_groups": Option({"num_beams": 2, "num_beam_groups": 2, "trust_remote_code": True}, **FROM_THE_HUB),
    "constraints": Option({"num_beams": 2, "constraints": [object()], "trust_remote_code": True}, **FROM_THE_HUB),
    "force_words_ids": Option({"num_beams": 2, "force_words_ids": [[5]]}, **FROM_THE_HUB),
}

PACKED = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]]).expand(2, -1)
STARTS = torch.tensor([0, 4, 9], dtype=torch.int32)
MASK = torch.tensor([[0, 0, 0] + [1] * 6, [1] * 9])


def packed(**keywords) -> Option:
    """Rows of several texts each."""
    return Option(keywords, refused=("sequence",), message="of one sequence each")


FORWARD: dict[str, Option] = {
    "input_ids": Option({}),
    "attention_mask": Option({"attention_mask": MASK}),
    "attention_mask, of pairs": Option(
        {"attention_mask": torch.zeros(2, 1, 9, 9).masked_fill(torch.ones(9, 9).triu(1).bool(), torch.finfo().min)},
        refused=("sequence",),
        message="needs the 2D attention_mask",
    ),
    "position_ids": Option({"position_ids": torch.arange(9)[None]}),
    "position_ids, later": Option({"position_ids": torch.arange(5, 14)[None]}),
    "position_ids, padded": Option({"attention_mask": MASK, "position_ids": MASK.cumsum(-1).sub(1).clamp(min=0)}),
    "position_ids, packed": packed(position_ids=PACKED, use_cache=False),
    "position_ids, packed, cached": packed(position_ids=PACKED),
    "past_key_values": Option(lambda model: {"past_key_values": DynamicCache(config=model.config)}),
    "inputs_embeds": Option(
        lambda model: {"input_ids": None, "inputs_embeds": model.get_input_embeddings()(random_tokens(2, 9))}
    ),
    "labels": Option({"labels": random_tokens(2, 9)}),
    "use_cache": Option({"use_cache": False}),
    "logits_to_keep": Option({"logits_to_keep": 3}),
    "logits_to_keep, by index": Option({"logits_to_keep": torch.tensor([1, 8])}),
    "return_dict": Option({"return_dict": True}),
    "num_items_in_batch": Option({"labels": random_tokens(2, 9), "num_items_in_batch": torch.tensor(7)}),
    "output_hidden_states": Option({"output_hidden_states": True}),
    "output_attentions": Option({"output_attentions": True}, refused_sparse=True, message="execution='dense'"),
    "output_router_logits": Option({"output_router_logits": True}),
    "cu_seq_lens_q": packed(cu_seq_lens_q=STARTS, position_ids=PACKED, use_cache=False),
    "cu_seq_lens_k": packed(cu_seq_lens_k=STARTS, position_ids=PACKED, use_cache=False),
    "max_length_q": Option({"max_length_q": 9}),
    "max_length_k": Option({"max_length_k": 9}),
    "is_causal": Option({"is_causal": False}, refused=BOTH, message="is_causal=False"),
    "is_causal, as it is": Option({"is_causal": True}),
    "seq_idx": packed(seq_idx=torch.tensor([[0] * 4 + [1] * 5] * 2, dtype=torch.int32), use_cache=False),
    # ours
    "route": Option({}),
    "execution": Option({}),
    "drafted": Option({"drafted": True, "logits_to_keep": 3}),
    "token_mask": Option({"token_mask": MASK.bool()}),
    "token_mask, of another shape": Option(
        {"token_mask": MASK[:, 1:].bool()}, refused=("sequence",), message="token_mask has the shape"
    ),
    "states_at": Option({"states_at": torch.tensor([3, 4])}),
    "gate_rule": Option({}),  # of training, which has tests of its own
}

PAGED = {"write_index", "read_index", "cache", "block_table", "logits_indices", "logits_processor_args"}
"""What continuous batching hands to a forward besides; `generate_batch` has a test of its own."""
