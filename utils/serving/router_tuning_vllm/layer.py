"""A routed decoder layer: over any pre-norm layer of vLLM with `self_attn`, `mlp` and two norms.

The semantics are those of the checkpoint's `execution_mod.py`: `h' = h + M F(x) + (1 - M) S(x)`. By token, a skipped
token still has keys and values where attention or block are routed; by sequence it has none, and the decision is of
the prompt, kept for its decode steps.
"""

import torch
from vllm.config import CompilationMode, VllmConfig
from vllm.forward_context import get_forward_context
from vllm.logger import init_logger
from vllm.utils.torch_utils import direct_register_custom_op

from .attention import VERIFIED, SplitProjection, attend_from, attend_in, takes_apart
from .batch import Batch, Choice, Routed
from .gate import Gate, Router, Substitute

logger = init_logger("vllm.router_tuning")

COMPARISONS = 4
"""Batches in which a layer's skipping is compared with the masked form, for a backend that isn't verified."""

Outputs = tuple[torch.Tensor, torch.Tensor]
"""What a layer of vLLM returns: its last branch and the residual stream before it, each [tokens, hidden_size]."""


class RoutedLayer:
    """Mixed into the class of a layer that exists; `init_routing` takes the place of `__init__`."""

    def init_routing(self, vllm_config: VllmConfig, name: str, index: int, routed: Routed) -> None:
        """Add what routing needs.

        Args:
            name: under which the custom op finds the layer.
            index: of the layer.
            routed: what all routed layers share.
        """
        compilation = vllm_config.compilation_config
        self.name, self.compiled = name, compilation.mode != CompilationMode.NONE
        compilation.static_forward_context[name] = self
        self.routed, self.gates = routed, {}
        hidden_size = vllm_config.model_config.hf_config.hidden_size
        for number, place in enumerate(routed.routing.places):
            if place.layer == index:
                router = Router(hidden_size)
                substitute = None if place.rank is None else Substitute(hidden_size, place.rank)
                setattr(self, place.module_name("router"), router)
                if substitute is not None:
                    setattr(self, place.module_name("substitute"), substitute)
                self.gates[place.branch] = Gate(place, number, router, substitute, routed)
        by_token = routed.routing.level == "token"
        self.attend = attend_from if by_token else attend_in
        if by_token and set(self.gates) != {"mlp"}:
            self.self_attn.qkv_proj.quant_method = SplitProjection(self.self_attn.q_size)
        self.last = index == routed.routing.places[-1].layer
        self.to_compare = 0 if self.self_attn.attn.attn_backend.get_name() in VERIFIED else COMPARISONS

    def forward(self, positions, hidden_states, residual, **kwargs):
        """Run the layer as vLLM's own does; under `torch.compile` as one opaque op."""
        if not self.compiled:
            return self.run(positions, hidden_states, residual)
        if residual is None:
            residual = torch.zeros_like(hidden_states)
        outputs = torch.empty_like(hidden_states), torch.empty_like(residual)
        torch.ops.vllm.routed_layer(positions, hidden_states, residual, *outputs, self.name)
        return outputs

    def run(self, positions: torch.Tensor, hidden_states: torch.Tensor, residual: torch.Tensor | None) -> Outputs:
        """Run the layer; may write to `hidden_states` and `residual`, as vLLM's norms do."""
        batch = self.routed.batch(self.self_attn.attn.layer_name)
        if batch is None:
            return super().forward(positions, hidden_states, residual)
        padded = len(hidden_states)
        if batch.tokens < padded:  # a CUDA graph around this has a fixed size
            positions, hidden_states = positions[: batch.tokens], hidden_states[: batch.tokens]
            residual = None if residual is None else residual[: batch.tokens]
        if residual is None:
            normed, stream = self.input_layernorm(hidden_states), hidden_states
        else:
            normed, stream = self.input_layernorm(hidden_states, residual)
        run = self._block if "block" in self.gates else self._branches
        outputs = run(positions, normed, stream, batch)
        if self.last:
            self.routed.publish()
        if batch.tokens < padded:
            outputs = tuple(torch.nn.functional.pad(each, (0, 0, 0, padded - batch.tokens)) for each in outputs)
        return outputs

    def _branches(self, positions: torch.Tensor, normed: torch.Tensor, stream: torch.Tensor, batch: Batch) -> Outputs:
        """Run attention and MLP, one or both of which are gated."""
        gate = self.gates.get("attn")
        attention = (
            self.self_attn(positions, normed) if gate is None else self._attention(gate, positions, normed, batch)
        )
        normed, stream = self.post_attention_layernorm(attention, stream)
        gate = self.gates.get("mlp")
        if gate is None:
            return self.mlp(normed), stream
        choice = gate.choose(normed, batch)
        if self.routed.execution == "masked":
            return gate.merge(choice, self.mlp(normed), normed), stream
        if choice.count == batch.tokens:
            return self.mlp(normed), stream
        return gate.place(choice, self.mlp(normed[choice.tokens]) if choice.count else None, normed), stream

    def _attention(self, gate: Gate, positions: torch.Tensor, normed: torch.Tensor, batch: Batch) -> torch.Tensor:
        choice = gate.choose(normed, batch)
        if not self._skips(positions, normed, batch, choice):
            return gate.merge(choice, self.self_attn(positions, normed), normed)
        attention = self.attend(self.self_attn, positions, normed, batch, choice)
        return attention if choice.count == batch.tokens else gate.place(choice, attention, normed)

    def _block(self, positions: torch.Tensor, normed: torch.Tensor, stream: torch.Tensor, batch: Batch) -> Outputs:
        """Run attention and MLP, gated together: what is skipped keeps its residual stream."""
        gate = self.gates["block"]
        choice = gate.choose(normed, batch)
        if not self._skips(positions, normed, batch, choice):
            attention = self.self_attn(positions, normed)
            kept = choice.kept.unsqueeze(-1)
            # the norm may write to what it is given, and both are needed afterwards
            inner, summed = self.post_attention_layernorm(attention, stream.clone())
            return gate.merge(choice, self.mlp(inner), normed), torch.where(kept, summed, stream)
        attention = self.attend(self.self_attn, positions, normed, batch, choice)
        if choice.count == batch.tokens:
            inner, stream = self.post_attention_layernorm(attention, stream)
            return self.mlp(inner), stream
        if attention is None:
            return gate.place(choice, None, normed), stream
        inner, summed = self.post_attention_layernorm(attention, stream[choice.tokens])
        return gate.place(choice, self.mlp(inner), normed), stream.index_copy_(0, choice.tokens, summed)

    def _skips(self, positions: torch.Tensor, normed: torch.Tensor, batch: Batch, choice: Choice) -> bool:
        """Tell whether attention may be left out for what is not kept; otherwise all of it is computed, and dropped."""
        if self.routed.execution == "masked":
            return False
        if not takes_apart(self.self_attn.attn):
            self._mask_from_now_on("its metadata can't be taken apart")
            return False
        if self.to_compare > 0 and 0 < choice.count < batch.tokens:
            self.to_compare -= 1
            found = self.attend(self.self_attn, positions, normed, batch, choice)
            expected = self.self_attn(positions, normed)[choice.tokens]
            error = (found - expected).float().square().mean() / expected.float().square().mean()
            if not error.sqrt() <= 6 * torch.finfo(expected.dtype).eps:  # not so for NaN either
                self._mask_from_now_on("what is left of it gives other numbers")
                return False
        return True

    def _mask_from_now_on(self, reason: str) -> None:
        name = self.self_attn.attn.attn_backend.get_name()
        logger.warning("attention backend %s: %s; from now on everything is computed, and masked", name, reason)
        self.routed.execution = "masked"


def _routed_layer(
    positions: torch.Tensor,
    hidden_states: torch.Tensor,
    residual: torch.Tensor,
    output: torch.Tensor,
    output_residual: torch.Tensor,
    name: str,
) -> None:
    layer = get_forward_context().no_compile_layers[name]
    # `run` writes to what it is given, which the op has not said it would do with its inputs
    given = output.copy_(hidden_states), output_residual.copy_(residual)
    for result, place in zip(layer.run(positions, *given), given, strict=True):
        if result is not place:
            place.copy_(result)


def _routed_layer_fake(
    positions: torch.Tensor,
    hidden_states: torch.Tensor,
    residual: torch.Tensor,
    output: torch.Tensor,
    output_residual: torch.Tensor,
    name: str,
) -> None:
    return


# Opaque to torch.compile, which can't trace shapes that depend on data; `EngineSettings` cuts CUDA graphs at it.
direct_register_custom_op(
    op_name="routed_layer",
    op_func=_routed_layer,
    mutates_args=["output", "output_residual"],
    fake_impl=_routed_layer_fake,
)
