"""Which rank a process is, and which GPU is its own."""

from __future__ import annotations

import pytest

from fp8gate.calibrate.device.cpu import Cpu
from fp8gate.calibrate.device.cuda.kind import Cuda
from fp8gate.calibrate.ranks.environment import RankEnvironment
from fp8gate.filter.contract.errors import InputError

TORCHRUN = {"RANK": "5", "WORLD_SIZE": "16", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
FIFTH = RankEnvironment(rank=5, world=16, local_rank=1, local_world=4)


def test_torchrun_says_which_rank_a_process_is():
    assert RankEnvironment.from_environment(TORCHRUN) == FIFTH


@pytest.mark.parametrize("environment", [{}, {"RANK": "0"}, {"WORLD_SIZE": "2"}])
def test_without_a_launcher_a_process_has_no_rank(environment):
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
def test_a_rank_that_cannot_be_is_an_error(changes, message):
    environment = {name: value for name, value in {**TORCHRUN, **changes}.items() if value is not None}
    with pytest.raises(InputError, match=message):
        RankEnvironment.from_environment(environment)


@pytest.fixture
def claim(monkeypatch):
    """What CUDA_VISIBLE_DEVICES becomes for a rank of a machine with so many GPUs; None where nothing is set."""

    def claim_gpu(rank, world, *, gpus, visible=None):
        monkeypatch.setattr("fp8gate.calibrate.device.cuda.kind.gpu_count", lambda: gpus)
        environment = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
        Cuda().claim(rank, world, environment)
        return environment.get("CUDA_VISIBLE_DEVICES")

    return claim_gpu


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
def test_each_rank_sees_its_own_gpu(claim, visible, own):
    assert claim(1, 4, gpus=4, visible=visible) == own


def test_without_any_gpu_nothing_is_set(claim):
    assert claim(1, 4, gpus=0) is None


@pytest.mark.parametrize("visible", [None, "0,1"])
def test_more_ranks_than_gpus_are_an_error(claim, visible):
    with pytest.raises(InputError, match="a GPU for each of 4 ranks on this machine; there are 2"):
        claim(2, 4, gpus=2, visible=visible)


def test_one_rank_on_a_machine_of_one_gpu_keeps_it(claim):
    assert claim(0, 1, gpus=1) == "0"


def test_ranks_share_a_processor():
    environment = {}
    Cpu().claim(1, 2, environment)
    assert environment == {}
