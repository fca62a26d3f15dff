"""What a routed model computes, written down a second time, from the contract and with plain loops.

One row, one layer and one token at a time; pooling, sigmoid, threshold, causal and sliding-window masks are its own.
From the base model it takes embeddings, norms, attention, MLP, rotary embedding and head. It works on the real tokens
alone: what padding does, it cannot do.
"""

import math

import torch


def reference_forward(
    base,
    routers: dict[int, torch.Tensor],
    granularity: str,
    threshold: float | tuple[float, ...],
    input_ids,
    attention_mask=None,
    prompt_tokens: int | None = None,
):
    """Run the base model with routers over its layers.

    Args:
        base: a dense `ForCausalLM` model in float32.
        routers: layer index -> weight, float32 [1, hidden_size].
        granularity, threshold: of the routing; the threshold one for all routers, or one for each.
        input_ids: int64 [batch, tokens].
        attention_mask: 1 for real tokens, [batch, tokens]; None for all.
        prompt_tokens: a sequence is decided on the real ones among its first so many tokens; None for all.

    Returns:
        logits float32 [batch, tokens, vocabulary], zero at padding; scores and gates, layer index -> [batch]
        (sequence level) or [batch, tokens] (token level, nan at padding).
    """
    target, level = granularity.split("_")
    batch, tokens = input_ids.shape
    shape = (batch,) if level == "sequence" else (batch, tokens)
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

            def kept(normed, index=index, row=row, real=real):
                """Return for each real token whether it is kept, and write down scores and gates."""
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
            keep = kept(normed) if index in routers and target in ("attn", "block") else everything
            attention = _attention(base, layer, normed, real, window)
            keep_attention = keep if target in ("attn", "block") else everything
            hidden = torch.stack(
                [hidden[t] + attention[t] if keep_attention[t] else hidden[t] for t in range(len(real))]
            )
            normed = layer.post_attention_layernorm(hidden)
            keep_mlp = kept(normed) if index in routers and target == "mlp" else everything
            hidden = torch.stack(
                [hidden[t] + layer.mlp(normed[t]) if keep_mlp[t] else hidden[t] for t in range(len(real))]
            )
            if target == "block":
                hidden = torch.stack([hidden[t] if keep[t] else before[t] for t in range(len(real))])
        logits[row, real] = base.lm_head(base.model.norm(hidden))
    return logits, scores, gates


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
