"""What a routed model computes, written down a second time, from the contract and with plain loops.

One row, one layer and one token at a time; pooling, sigmoid, threshold, causal and sliding-window masks are its own.
From the base model it takes embeddings, norms, attention, MLP, rotary embedding and head. It works on the real tokens
alone: what padding does, it cannot do.
"""

import math

import torch

Place = int | tuple[int, str]


def reference_forward(
    base,
    routers: dict[Place, torch.Tensor],
    granularity: str,
    threshold,
    input_ids,
    attention_mask=None,
    prompt_tokens: int | None = None,
):
    """Run the base model with routers over its layers.

    Args:
        base: a dense `ForCausalLM` model in float32.
        routers: layer index, or for `attn_mlp` (layer index, `attn` or `mlp`) -> weight, float32 [1, hidden_size], or
            for experts [num_experts, hidden_size].
        granularity, threshold: of the routing; the threshold one for all routers, or one for each, or for
            each several, one for each expert.
        input_ids: int64 [batch, tokens].
        attention_mask: 1 for real tokens, [batch, tokens]; None for all.
        prompt_tokens: a sequence is decided on the real ones among its first so many tokens; None for all.

    Returns:
        logits float32 [batch, tokens, vocabulary], zero at padding; scores and gates, by the keys of the routers,
        [batch] (sequence level), [batch, tokens] (token level, nan at padding) or [batch, tokens, top_k] (experts).
    """
    target, level = granularity.rsplit("_", 1)
    batch, tokens = input_ids.shape
    shape = (batch,) if level == "sequence" else (batch, tokens)
    if target == "expert":
        shape = (batch, tokens, base.config.num_experts_per_tok)
    scores = {index: torch.full(shape, math.nan) for index in routers}
    gates = {index: torch.full(shape, math.nan) for index in routers}
    logits = torch.zeros(batch, tokens, base.config.vocab_size)
    each = threshold if isinstance(threshold, tuple) else (threshold,) * len(routers)
    thresholds = dict(zip(routers, each, strict=True))
    for row in range(batch):
        real = [t for t in range(tokens) if attention_mask is None or attention_mask[row, t] == 1]
        hidden = base.model.embed_tokens(input_ids[row, real])  # [real, hidden]
        for index, layer in enumerate(base.model.layers):
            window = _window(base.config, index)

            def kept(normed, index, row=row, real=real):
                """Return for each real token whether the router `index` keeps it; write down scores and gates."""
                weight = routers[index].double()[0]
                if level == "sequence":
                    prompt = [t for t, position in enumerate(real) if prompt_tokens is None or position < prompt_tokens]
                    pooled = sum(normed[t].double() for t in prompt) / len(prompt)
                    score = 1 / (1 + math.exp(-float(pooled @ weight)))
                    scores[index][row], gates[index][row] = score, float(score >= thresholds[index])
                    return [score >= thresholds[index]] * len(real)
                result = []
                for t, position in enumerate(real):
                    score = 1 / (1 + math.exp(-float(normed[t].double() @ weight)))
                    scores[index][row, position], gates[index][row, position] = score, float(score >= thresholds[index])
                    result.append(score >= thresholds[index])
                return result

            everything = [True] * len(real)
            before = hidden.clone()
            normed = layer.input_layernorm(hidden)
            before_attention = {"attn": index, "block": index, "attn_mlp": (index, "attn")}.get(target)
            keep = kept(normed, before_attention) if before_attention in routers else everything
            attention = _attention(base, layer, normed, real, window)
            hidden = torch.stack([hidden[t] + attention[t] if keep[t] else hidden[t] for t in range(len(real))])
            normed = layer.post_attention_layernorm(hidden)
            before_mlp = {"mlp": index, "attn_mlp": (index, "mlp")}.get(target)
            keep_mlp = kept(normed, before_mlp) if before_mlp in routers else everything

            def mlp(t, index=index, row=row, real=real, layer=layer, normed=normed):
                """Return the MLP's output for one real token, and write down what its experts decided."""
                if target != "expert" or index not in routers:
                    return layer.mlp(normed[None, t : t + 1])[0, 0]  # experts take three dimensions
                decided, output = _experts(layer.mlp, normed[t], routers[index], thresholds[index])
                for k, (score, executed) in enumerate(decided):
                    scores[index][row, real[t], k], gates[index][row, real[t], k] = score, float(executed)
                return output

            hidden = torch.stack([hidden[t] + mlp(t) if keep_mlp[t] else hidden[t] for t in range(len(real))])
            if target == "block":
                hidden = torch.stack([hidden[t] if keep[t] else before[t] for t in range(len(real))])
        logits[row, real] = base.lm_head(base.model.norm(hidden))
    return logits, scores, gates


def _experts(block, token, weight, threshold: float | tuple[float, ...]):
    """Return each assignment's score and whether it is executed, and the output of a block of experts for one token."""
    _, gate_weights, chosen = block.gate(token[None])
    decided, output = [], torch.zeros_like(token)
    for gate_weight, expert in zip(gate_weights[0], chosen[0].tolist(), strict=True):
        score = 1 / (1 + math.exp(-float(token.double() @ weight[expert].double())))
        executed = score >= (threshold[expert] if isinstance(threshold, tuple) else threshold)
        decided.append((score, executed))
        if executed:
            gate, up = (block.experts.gate_up_proj[expert] @ token).chunk(2)
            output = output + gate_weight * (block.experts.down_proj[expert] @ (block.experts.act_fn(gate) * up))
    if hasattr(block, "shared_experts"):
        output = output + block.shared_experts(token)
    if hasattr(block, "shared_expert"):
        output = output + torch.sigmoid(block.shared_expert_gate(token)) * block.shared_expert(token)
    return decided, output


def _window(config, index: int) -> int | None:
    """Return how many tokens a query of layer `index` sees, itself included; None for all before it."""
    layer_types = getattr(config, "layer_types", None)
    if layer_types is not None and layer_types[index] == "full_attention":
        return None
    return getattr(config, "sliding_window", None)


def _attention(base, layer, normed, real: list[int], window: int | None) -> torch.Tensor:
    """Return the attention's output [real, hidden] for the normed input of tokens at the positions `real`."""
    mask = torch.full((len(real), len(real)), torch.finfo(normed.dtype).min)
    for q, query in enumerate(real):
        for k, key in enumerate(real):
            if key <= query and (window is None or query - key < window):
                mask[q, k] = 0.0
    positions = torch.tensor([real])
    output, _ = layer.self_attn(
        hidden_states=normed[None],
        attention_mask=mask[None, None],
        position_ids=positions,
        position_embeddings=base.model.rotary_emb(normed[None], position_ids=positions),
        past_key_values=None,
    )
    return output[0]
