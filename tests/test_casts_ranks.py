"""fp8gate.casts under DTensor's tensor parallelism, on two processes: equal bits, and what is replaced."""

from __future__ import annotations

import json

import pytest
from casts_ranks import compare
from forked import Processes, rank_environments


@pytest.mark.slow
def test_casts_are_replaced_under_tensor_parallelism_with_equal_bits(processes: Processes) -> None:
    """Every column form is. The weight of the first linear is the one whose columns are divided among the ranks."""
    ranks = [processes.start(compare, CUDA_VISIBLE_DEVICES="", **where) for where in rank_environments(2)]
    for rank in ranks:
        assert rank.exit_code() == 0, rank.said
    assert json.loads(ranks[0].said.splitlines()[-1]) == [
        "3 of 6 float8 casts replaced; left to Inductor: 3 along rows alone, which it does well",
        "5 of 6 float8 casts replaced; left to Inductor: 1 along rows alone, which it does well",
    ]
