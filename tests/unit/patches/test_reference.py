"""The reference that the self-test trusts: known values, and that it can tell a wrong router from a right one."""

from __future__ import annotations

import math

import pytest

from reap.patches.selftest import problem_of, reference_row, reference_scores


def test_scores_of_known_logits() -> None:
    got = reference_scores([0.0, 100.0, -1000.0, float("nan"), float("-inf")])
    assert got == pytest.approx([math.sqrt(math.log(2)), 10.0, 0.0, 0.0, 0.0])


def test_the_choice_is_by_bias_and_the_weight_is_not() -> None:
    ids, weights, _ = reference_row([4.0, 1.0, 2.0], [0.0, 9.0, 0.0], None, False, 1.0, 2)
    assert ids == [1, 0]
    assert weights == pytest.approx([math.sqrt(math.log1p(math.e)), math.sqrt(math.log1p(math.e**4))])


def test_the_lowest_id_wins_a_tie_and_a_sum_of_zero_stays_zero() -> None:
    ids, weights, _ = reference_row([float("-inf")] * 9, None, None, True, 2.5, 3)
    assert (ids, weights) == ([0, 1, 2], [0.0, 0.0, 0.0])


def test_a_table_is_obeyed_whatever_the_scores() -> None:
    ids, weights, _ = reference_row([5.0, 0.0, 1.0, 2.0], [9.0, 9.0, 9.0, 9.0], [3, 1], True, 2.0, 2)
    assert ids == [3, 1]
    assert sum(weights) == pytest.approx(2.0)


ROW = [3.0, 2.0, 1.0, 0.0]
RIGHT_IDS, RIGHT_WEIGHTS, _ = reference_row(ROW, None, None, True, 2.5, 2)


@pytest.mark.parametrize(
    ("ids", "weights", "right"),
    [
        (RIGHT_IDS, RIGHT_WEIGHTS, True),
        ([1, 0], RIGHT_WEIGHTS[::-1], False),
        ([0, 2], RIGHT_WEIGHTS, False),
        ([0, 0], RIGHT_WEIGHTS, False),
        ([0, 4], RIGHT_WEIGHTS, False),
        ([0, -1], RIGHT_WEIGHTS, False),
        (RIGHT_IDS, [RIGHT_WEIGHTS[0] + 1e-4, RIGHT_WEIGHTS[1]], False),
        (RIGHT_IDS, [float("nan"), RIGHT_WEIGHTS[1]], False),
    ],
)
def test_a_wrong_router_is_told_from_a_right_one(ids: list[int], weights: list[float], right: bool) -> None:
    assert (problem_of(ids, weights, ROW, None, None) is None) is right


def test_experts_that_fp32_cannot_tell_apart_may_swap_but_their_weights_must_fit() -> None:
    row, bias = [1.0, 1.0, -5.0], [8.0, 8.0 + 1e-7, 8.0]
    assert reference_row(row, bias, None, True, 1.0, 2)[0] == [1, 0]
    assert problem_of([0, 1], [0.5, 0.5], row, bias, None, scale=1.0) is None
    assert problem_of([0, 1], [0.6, 0.4], row, bias, None, scale=1.0) is not None
