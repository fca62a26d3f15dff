"""What `finetune_mod.py` makes of the rows before training starts."""

import logging

from datasets import Dataset

from entrypoints.finetune.finetune_mod import at_most
from utils.data.splitting import set_aside


def test_a_regression_learns_from_so_many_rows_and_the_log_says_so(caplog):
    caplog.set_level(logging.INFO)
    train_set, calibration_set = set_aside(Dataset.from_dict({"number": list(range(80))}), 8)
    assert at_most(train_set, 72) is train_set
    assert not caplog.messages
    assert at_most(train_set, 50)["number"][:] == list(range(50))
    assert caplog.messages == ["the regression learns from 50 of 72 rows (--regression_rows)"]
    assert calibration_set["number"][:] == list(range(72, 80))
