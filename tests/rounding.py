"""How far two ways to compute the same thing may lie apart.

To the bit they agree only where one process computes the same thing in the same order, from tensors that lie alike in
memory. Another process may have another number of threads, and a weight mapped from a file another alignment; either
changes the order of a sum, and so do another batch size and another kernel.
"""

import torch


def rounding(expected: torch.Tensor, terms: int) -> float:
    """Return the largest difference between two orders of summing `terms` numbers.

    Each addition rounds by half an `eps` of the sum so far at most, and roundings are as often up as down: the error
    of a sum grows as the square root of its length. Eight of these deviations do not happen by chance.

    Args:
        expected: the sums; their largest magnitude and their dtype count.
        terms: length of the longest chain of additions that leads to one of them.
    """
    largest = expected.abs().max().item() if expected.numel() else 0.0
    return 4 * torch.finfo(expected.dtype).eps * terms**0.5 * largest


def assert_same_in_low_precision(found: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    """Assert that two runs of some layers in a low precision differ by roundings alone.

    Each layer rounds, and the next amplifies it, in a single number now and then by much: the root mean square is
    bound closely, and each number by a share of the largest that one branch more or less would exceed.

    Args:
        found, expected: of equal shape.
        dtype: that was computed in.
    """
    found, expected, eps = found.float(), expected.float(), torch.finfo(dtype).eps
    error = (found - expected).square().mean().sqrt() / expected.square().mean().sqrt()
    assert error < 6 * eps, f"root mean square of the difference, {error / eps:.1f} eps"
    torch.testing.assert_close(found, expected, rtol=0, atol=40 * eps * expected.abs().max().item())
