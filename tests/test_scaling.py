"""The simulated sweeps: small ones that can be counted by hand, and the table in docs/many-gpus.md."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fp8gate.filter.contract.shapes import LinearShape

ROOT = Path(__file__).parent.parent


@pytest.fixture
def scaling(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import scaling

    monkeypatch.setattr(scaling, "STARTING_S", 10.0)
    monkeypatch.setattr(scaling, "WORKERS", 2)
    return scaling


def cost(scaling, n=16, *, m=16, repeat=False, compiling_s=5.0, loading_s=0.0, measuring_s=1.0):
    return scaling.Cost(LinearShape(m, 16, n), repeat, compiling_s, loading_s, measuring_s)


def swept(scaling, costs, ranks, base_s=0.0, pair_s=0.0):
    return scaling.simulate(costs, scaling.Loading(base_s, pair_s), ranks)


def test_one_device_measures_what_two_workers_compile(scaling):
    """Two points are ready after 15 s and measured until 17, the third, begun at 16, after 21."""
    costs = [cost(scaling, n) for n in (16, 32, 48)]
    sweep = swept(scaling, costs, 1)
    assert sweep.total_s == 22.0
    assert sweep.idle == pytest.approx(1 - 3 / 22)


def test_the_first_point_of_each_process_takes_longer_to_compile(scaling):
    """Both first points took 9 s rather than 5: every process of every rank begins so."""
    costs = [cost(scaling, n, compiling_s=s) for n, s in ((16, 9.0), (32, 9.0), (48, 5.0), (64, 5.0))]
    assert scaling.without_cold_starts(costs)[1] == 4.0
    assert swept(scaling, costs, 2).total_s == 10 + 9 + 2
    assert swept(scaling, costs, 1).total_s == 10 + 9 + 1 + 5 + 1 + 1


def test_two_devices_share_them(scaling):
    assert swept(scaling, [cost(scaling, n) for n in (16, 32, 48)], 2).total_s == 17.0


def test_repeats_are_measured_by_every_rank(scaling):
    costs = [cost(scaling), cost(scaling, repeat=True)]
    assert swept(scaling, costs, 2).repeats_s == 1.0
    assert swept(scaling, costs, 2).total_s == 17.0
    assert swept(scaling, costs, 2).idle == pytest.approx(1 - 3 / 34)


def test_a_machine_tunes_each_pair_of_dimensions_once(scaling):
    """Ready at 15: n = 32, new in all three pairs, until 19, and again, until 20. At 24: n = 16, new in two."""
    costs = [cost(scaling, 16), cost(scaling, 32), cost(scaling, 32, repeat=True)]
    sweep = swept(scaling, costs, 1, pair_s=1.0)
    assert sweep.total_s == 27.0
    assert sweep.idle == pytest.approx(1 - (4 + 1 + 3) / 27)


def test_loading_is_fitted_over_new_pairs(scaling):
    costs = [cost(scaling, 16, loading_s=3.5), cost(scaling, 32, loading_s=2.5), cost(scaling, 32, loading_s=0.5)]
    loading = scaling.fit_loading(costs)
    assert (loading.base_s, loading.pair_s) == (pytest.approx(0.5), pytest.approx(1.0))


def test_the_table_in_the_docs_is_what_the_script_prints(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import scaling

    marked = re.search(
        r"<!-- scaling -->\n(.*?)\n<!-- /scaling -->", (ROOT / "docs" / "many-gpus.md").read_text(), re.S
    )
    assert marked
    costs = scaling.read_costs(scaling.COSTS)
    assert scaling.report(costs, [1, 8, 64, 512]) == marked[1]
    totals = [scaling.simulate(costs, scaling.fit_loading(costs), ranks).total_s for ranks in (1, 2, 4, 8, 64)]
    assert totals == sorted(totals, reverse=True)
