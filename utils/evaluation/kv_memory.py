"""What the keys and values of a cache take, counted from its tensors."""

from transformers import Cache


def kv_bytes_by_layer(cache: Cache) -> list[int]:
    """Return the bytes of keys and values of each layer; 0 for a layer that has stored nothing."""
    return [
        sum(tensor.numel() * tensor.element_size() for tensor in (layer.keys, layer.values) if tensor is not None)
        for layer in cache.layers
    ]
