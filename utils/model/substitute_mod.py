"""What a skipped branch returns instead of nothing: a cheap linear map of the input that the branch would have read.

`h' = h + M F(x) + (1 - M) S(x)`, with `x` the normed input, `F` the branch and `S(x) = U D x + b`, of a rank far below
the hidden size. Without a substitute `S = 0`, the published method (Eq. 3). How it is fitted is not needed to run it:
`utils/pipeline/substitutes.py`. This file travels inside every checkpoint.
"""

import torch
from torch import nn


class MoDSubstitute(nn.Module):
    """Map a branch's normed input to what stands in for its output. Starts at zero, which is no substitute.

    Not made of `nn.Linear`, as quantization and adapters that look for these are to leave it alone.

    Args:
        hidden_size: of inputs and outputs.
        rank: of the map.
    """

    def __init__(self, hidden_size: int, rank: int):
        super().__init__()
        self.down = nn.Parameter(torch.zeros(rank, hidden_size))
        self.up = nn.Parameter(torch.zeros(hidden_size, rank))
        self.bias = nn.Parameter(torch.zeros(hidden_size))

    def forward(self, normed: torch.Tensor) -> torch.Tensor:
        """Return `S(x)`, [..., hidden_size] in the dtype of `normed` [..., hidden_size]."""
        low = nn.functional.linear(normed.to(self.down.dtype), self.down)
        return nn.functional.linear(low.to(self.up.dtype), self.up, self.bias).to(normed.dtype)
