"""Answers of ranks and micro-batches become one."""

from megatron_ext.parts import Metrics, TokenPart, UpdatePart, add_metrics, merge_update

SHARES: tuple[Metrics, ...] = (
    {"a": (1.0, 2.0, "mean"), "b": (3.0, 1.0, "max"), "c": (1.0, 1.0, "sum")},
    {"a": (5.0, 1.0, "mean"), "b": (2.0, 1.0, "max"), "c": (4.0, 1.0, "sum")},
    {"d": (0.0, 0.0, "mean")},
)


def test_metrics_add_up_by_kind_and_one_that_only_some_have_is_added_over_them():
    merged: Metrics = {}
    for share in SHARES:
        add_metrics(merged, share)
    assert merged == {"a": (6.0, 3.0, "mean"), "b": (3.0, 2.0, "max"), "c": (5.0, 2.0, "sum"), "d": (0.0, 0.0, "mean")}
    assert SHARES[0]["a"] == (1.0, 2.0, "mean")  # shares stay as they are


def test_an_update_divides_means_at_the_end_and_leaves_out_a_mean_over_nothing():
    parts = [UpdatePart(share, grad_norm=2.0, lr=0.1, skipped=False, seen=TokenPart()) for share in SHARES]
    assert merge_update(parts) == {
        "a": 2.0, "b": 3.0, "c": 5.0, "train/grad_norm": 2.0, "train/lr": 0.1, "train/skipped_updates": 0.0
    }  # fmt: skip
