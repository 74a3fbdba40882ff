"""fp8gate.casts under DTensor's tensor parallelism, on two processes: equal bits, and what is replaced."""

from __future__ import annotations

import functools
import json

import pytest
from casts_ranks import compare
from forked import Processes, rank_environments


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recomputes", "expected"),
    [
        (
            False,
            [
                "3 of 6 float8 casts replaced; left to Inductor: 3 along rows alone, which it does well",
                "5 of 6 float8 casts replaced; left to Inductor: 1 along rows alone, which it does well",
            ],
        ),
        (
            True,
            [
                "0 of 4 float8 casts replaced; left to Inductor: 4 along rows alone, which it does well",
                "8 of 10 float8 casts replaced; left to Inductor: 2 along rows alone, which it does well",
            ],
        ),
    ],
)
def test_casts_are_replaced_under_tensor_parallelism_with_equal_bits(
    processes: Processes, recomputes: bool, expected: list[str]
) -> None:
    """Every column form is. The weight of the first linear is the one whose columns are divided among the ranks."""
    script = functools.partial(compare, recomputes=recomputes)
    ranks = [processes.start(script, CUDA_VISIBLE_DEVICES="", **where) for where in rank_environments(2)]
    for rank in ranks:
        assert rank.exit_code() == 0, rank.said
    assert json.loads(ranks[0].said.splitlines()[-1]) == expected
