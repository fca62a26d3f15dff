"""Order rows so that those in a batch are about equally long, the same on every process and after a resume.

Transformers' own `group_by_length` (5.23) draws its order from the process's random state: after the first epoch a
resumed run sees other batches than the run it continues, and processes agree only while nothing else has drawn on
theirs. Here the order follows from the seed and the epoch alone; accelerate calls `set_epoch`.
"""

from collections.abc import Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler


class LengthGroupedSampler(Sampler[int]):
    """Yield row indices; each run of `batch_size` of them has similar lengths.

    Rows are shuffled, sorted by length within pools of 50 batches, cut into batches, and the batches shuffled. The
    batch of the longest rows comes first, so that too little memory shows at once, and an incomplete one comes last.

    Args:
        lengths: tokens of each row; a list or an array (a `datasets` column is read item by item: take `column[:]`).
        batch_size: rows that are computed together: those of one micro-batch times the number of processes.
        seed: another seed gives another order.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int = 0) -> None:
        self.lengths = np.asarray(lengths, dtype=np.int64)
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of that epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        random = np.random.default_rng([self.seed, self.epoch])
        order = random.permutation(len(self.lengths))
        pool = 50 * self.batch_size
        for start in range(0, len(order), pool):
            rows = order[start : start + pool]
            order[start : start + pool] = rows[np.argsort(-self.lengths[rows], kind="stable")]
        complete = len(order) // self.batch_size * self.batch_size
        batches = random.permutation(order[:complete].reshape(-1, self.batch_size))
        if len(batches):
            longest = int(self.lengths[batches].sum(axis=1).argmax())
            batches[[0, longest]] = batches[[longest, 0]]
        yield from batches.ravel().tolist()
        yield from order[complete:].tolist()
