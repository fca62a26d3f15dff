"""Say of a quantized base what it is: nothing here computes with one, as routers are trained beside whole weights."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from utils.io.errors import UserError

FORMATS = {
    "GPTQ or AWQ": re.compile(r"\.(qweight|qzeros|g_idx|scales)$"),
    "bitsandbytes": re.compile(r"\.((nested_)?(absmax|quant_map)|SCB|weight_format|quant_state\.\w+)$"),
    "compressed-tensors": re.compile(r"\.weight_(packed|shape|zero_point|scale|g_idx|global_scale)$"),
    "FP8": re.compile(r"\.(weight_scale_inv|weight_scale|input_scale|activation_scale|[kv]_scale)$"),
    "quanto": re.compile(r"\.weight\._(data|scale|shift|packed)$|\.(input|output)_scale$"),
    "MXFP4": re.compile(r"_(blocks|scales)$"),
    "HQQ": re.compile(r"\.(W_q|meta)$"),
}
"""Format -> names of the weights that only it has."""


def refuse_quantized(directory: str | Path, config: dict[str, Any], names: Iterable[str]) -> None:
    """Refuse a quantized model.

    Args:
        config: its `config.json`.
        names: of its weights.

    Raises:
        UserError: it is one; the message says of which kind.
    """
    found = None
    described = config.get("quantization_config")
    if described is not None:
        fields = described if isinstance(described, dict) else {}
        bits = next((fields[name] for name in ("bits", "w_bit", "num_bits") if name in fields), None)
        bits = bits or (4 if fields.get("load_in_4bit") else 8 if fields.get("load_in_8bit") else None)
        method = fields.get("quant_method") or fields.get("quantization_method") or "unnamed"
        found = f"quantization_config in config.json: {method}" + (f", {bits} bits" if bits else "")
    else:
        for name in sorted(names):
            kind = next((kind for kind, pattern in FORMATS.items() if pattern.search(name)), None)
            if kind:
                found = f"{kind}'s weight {name}"
                break
    if found:
        raise UserError(
            f"{directory}: a quantized model ({found}), and routers need a base with whole weights: name the model "
            "that it was made from"
        )
