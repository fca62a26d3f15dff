"""Generate by what the caller says alone, whatever a model's files say of sampling, beams, penalties and caches."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import GenerationConfig, PreTrainedModel


@contextmanager
def generation_by(model: PreTrainedModel, **options: Any) -> Iterator[GenerationConfig]:
    """Yield these options of `generate` as its `generation_config`; within the block no other ones enter.

    By itself transformers fills in what an option leaves out from `generation_config.json`, so that a base which
    generates with beams, or several answers, would do so here as well.

    Args:
        model: any language model; afterwards it is what it was.
        **options: of transformers' `GenerationConfig`.
    """
    own, wanted = model.generation_config, GenerationConfig(**options)
    model.generation_config = wanted
    try:
        yield wanted
    finally:
        model.generation_config = own
