"""A generated log follows the statistics of the real ones."""

from __future__ import annotations

import numpy as np

from maskmoe_kernels.experiments.skip.generator import calibration


def test_log_follows_the_counts(log: dict[str, np.ndarray]) -> None:
    starts = (log["session_position"] == 1).nonzero()[0]
    count = len(starts)

    def assert_shares(values: np.ndarray, counts: dict, within: float) -> None:
        total = sum(counts.values())
        for name, expected in counts.items():
            assert abs((values == name).mean() - expected / total) < within, name

    lengths = dict(zip(range(10, 21), calibration.SESSION_LENGTHS, strict=True))
    assert_shares(log["session_length"][starts], lengths, 5 * 0.5 / count**0.5)
    assert_shares(log["context_type"][starts], calibration.CONTEXTS, 5 * 0.5 / count**0.5)
    assert abs(log["premium"][starts].mean() - calibration.PREMIUM) < 5 * 0.4 / count**0.5
    assert_shares(log["hist_user_behavior_reason_end"], calibration.END, 0.01)
    assert_shares(log["hist_user_behavior_reason_start"], calibration.START, 0.05)
    skip = log["skip_2"]
    assert abs(skip.mean() - calibration.SKIP) < 0.03
    after = log["session_position"][1:] > 1
    for before, expected in (
        (True, calibration.SKIP_AFTER_SKIP),
        (False, calibration.SKIP_AFTER_PLAY),
    ):
        assert abs(skip[1:][after & (skip[:-1] == before)].mean() - expected) < 0.05
    assert (log["skip_2"] >= log["skip_1"]).all()
    assert (log["skip_3"] >= log["skip_2"]).all()
    assert not (log["not_skipped"] & log["skip_3"]).any()
