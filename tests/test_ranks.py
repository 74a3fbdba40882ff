"""Which rank a process is, and which GPU is its own."""

from __future__ import annotations

import pytest

from fp8gate.calibrate.ranks.environment import RankEnvironment, claim_gpu

TORCHRUN = {"RANK": "5", "WORLD_SIZE": "16", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
PLACE = RankEnvironment(rank=5, world=16, local_rank=1, local_world=4)


def test_torchrun_says_where_a_process_stands():
    assert RankEnvironment.from_environment(TORCHRUN) == PLACE


@pytest.mark.parametrize("environment", [{}, {"RANK": "0"}, {"WORLD_SIZE": "2"}])
def test_without_a_launcher_there_is_no_place(environment):
    assert RankEnvironment.from_environment(environment) is None


def test_a_launcher_that_does_not_count_a_machines_ranks_has_one_machine():
    environment = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}
    assert RankEnvironment.from_environment(environment) == RankEnvironment(
        rank=1, world=2, local_rank=1, local_world=2
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"LOCAL_RANK": None}, "LOCAL_RANK: expected beside RANK"),
        ({"RANK": "x"}, "RANK: expected a number"),
        ({"RANK": "16"}, "expected ranks below 16"),
        ({"LOCAL_RANK": "4"}, "expected ranks below 16 and 4; got 5 and 4"),
        ({"LOCAL_WORLD_SIZE": "17"}, "expected ranks below"),
    ],
)
def test_a_place_that_cannot_be_is_an_error(changes, message):
    environment = {name: value for name, value in {**TORCHRUN, **changes}.items() if value is not None}
    with pytest.raises(ValueError, match=message):
        RankEnvironment.from_environment(environment)


@pytest.mark.parametrize(
    ("visible", "own"),
    [
        pytest.param(None, "1", id="all GPUs of the machine"),
        pytest.param("4,5,6,7", "5", id="those of a job"),
        pytest.param("GPU-a,GPU-b,GPU-c,GPU-d", "GPU-b", id="by UUID"),
        pytest.param("3", "3", id="given to this rank alone"),
        pytest.param("", "", id="none: a CPU"),
    ],
)
def test_each_rank_sees_its_own_gpu(monkeypatch, visible, own):
    monkeypatch.setattr("fp8gate.calibrate.ranks.environment._gpus", lambda: ["0", "1", "2", "3"])
    environment = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    claim_gpu(PLACE, environment)
    assert environment["CUDA_VISIBLE_DEVICES"] == own


def test_without_any_gpu_nothing_is_set(monkeypatch):
    monkeypatch.setattr("fp8gate.calibrate.ranks.environment._gpus", list)
    environment = {}
    claim_gpu(PLACE, environment)
    assert environment == {}


@pytest.mark.parametrize("visible", [None, "0,1"])
def test_more_ranks_than_gpus_are_an_error(monkeypatch, visible):
    monkeypatch.setattr("fp8gate.calibrate.ranks.environment._gpus", lambda: ["0", "1"])
    environment = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    with pytest.raises(ValueError, match="a GPU for each of 4 ranks on this machine; there are 2"):
        claim_gpu(RankEnvironment(rank=2, world=4, local_rank=2, local_world=4), environment)


def test_one_rank_on_a_machine_of_one_gpu_keeps_it(monkeypatch):
    monkeypatch.setattr("fp8gate.calibrate.ranks.environment._gpus", lambda: ["0"])
    environment = {}
    claim_gpu(RankEnvironment(rank=0, world=1, local_rank=0, local_world=1), environment)
    assert environment == {"CUDA_VISIBLE_DEVICES": "0"}
