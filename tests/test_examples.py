"""The examples run, on the CPU, with the real packages. Those of an optional package are skipped where it is missing.

The sizes and the table are made up so that exactly the feed forward layers win; float8 is computed for real.
"""

from __future__ import annotations

import functools
import os
import re
import subprocess
import sys
from collections.abc import Callable
from importlib import util
from pathlib import Path

import msgspec
import pytest
from builders import make_point, make_table, write_file
from float8_gathers import count_float8_gathers
from forked import MAX_WAIT_S, Processes, rank_environments, run_script

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
WITHOUT_GPU = {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}

SEQUENCE, DIM, HIDDEN, VOCAB, KV = 64, 64, 256, 512, 16
SIZES = ("--sequence", SEQUENCE, "--dim", DIM, "--hidden", HIDDEN, "--vocab", VOCAB, "--steps", 2)
TABLE = make_table(
    make_point(SEQUENCE, DIM, KV, 0.5),
    make_point(SEQUENCE, DIM, DIM, 0.9),
    make_point(SEQUENCE, DIM, HIDDEN, 1.5),
    make_point(SEQUENCE, HIDDEN, DIM, 1.2),
    make_point(SEQUENCE, DIM, VOCAB, 1.5),
)


def needs(*packages: str) -> pytest.MarkDecorator:
    """A package that is there and cannot be imported is a failure, not a reason to skip."""
    missing = [package for package in packages if util.find_spec(package) is None]
    return pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}")


@pytest.fixture
def table(tmp_path: Path) -> Path:
    return write_file(TABLE, tmp_path / "rowwise.yaml")


@pytest.fixture
def tensorwise_table(tmp_path: Path) -> Path:
    return write_file(msgspec.structs.replace(TABLE, recipe="tensorwise"), tmp_path / "tensorwise.yaml")


@pytest.fixture
def run(processes: Processes) -> Callable[..., str]:
    """Runs an example to its end; what it says. ranks: how many processes, as torchrun starts them.

    runner: what each of them does with the script and its arguments.
    """

    def run_example(name: str, *arguments: object, ranks: int = 0, runner: Callable[..., None] = run_script) -> str:
        script = functools.partial(runner, EXAMPLES / name, *arguments)
        environments = rank_environments(ranks) if ranks else [{}]
        running = [processes.start(script, **WITHOUT_GPU, **environment) for environment in environments]
        for process in running:
            assert process.exit_code() == 0, process.said
        return "\n".join(process.said for process in running)

    return run_example


def losses(out: str) -> list[float]:
    return [float(loss) for loss in re.findall(r"step \d+: loss (\S+)", out)]


def assert_only_the_feed_forward_was_converted(out: str, recipe: str = "rowwise") -> None:
    in_float8 = re.findall(r"^\S+\.(\w+) +2 +\d+ +\d+ +\d+ +float8 ", out, flags=re.M)
    assert sorted(in_float8) in (["w1", "w2", "w3"], ["down_proj", "gate_proj", "up_proj"])
    assert f"converted 6 of 15 linears to float8 {recipe}" in out
    assert "\n6 Float8Linear in the model" in out


def test_torchao_trains_what_it_converted(run: Callable[..., str], table: Path) -> None:
    out = run("torchao_convert.py", *SIZES, "--tables", table)
    assert_only_the_feed_forward_was_converted(out)
    first, second = losses(out)
    assert second < first


def test_torchao_converts_a_real_size_by_a_committed_table_without_a_gpu(run: Callable[..., str]) -> None:
    out = run("torchao_convert.py")
    assert re.search(r"^layers.\*.feed_forward.w1 +2 +8192 +4096 +14336 +float8", out, flags=re.M)
    assert re.search(r"^layers.\*.attention.wk +2 +8192 +4096 +1024 +bf16", out, flags=re.M)
    assert "trained nothing: there is no GPU here" in out
    assert losses(out) == []


WITHOUT_ARGUMENTS = [
    pytest.param("torchao_convert.py", marks=needs()),
    pytest.param("accelerate_trainer.py", marks=needs("accelerate", "transformers")),
    pytest.param("lightning_fabric.py", marks=needs("lightning")),
]


@pytest.mark.slow
@pytest.mark.parametrize("name", WITHOUT_ARGUMENTS)
def test_without_arguments_and_a_gpu_an_example_needs_little_memory(name: str) -> None:
    environment = {**os.environ, **WITHOUT_GPU, "PYTHONPATH": str(ROOT / "src")}
    process = subprocess.Popen([sys.executable, EXAMPLES / name], env=environment, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    assert usage.ru_maxrss < 2 * 2**20  # KiB


def test_a_model_too_large_for_a_laptop_is_not_trained_on_it(processes: Processes) -> None:
    process = processes.start(
        functools.partial(run_script, EXAMPLES / "torchao_convert.py", "--steps", 1), **WITHOUT_GPU
    )
    assert process.exit_code() == 2
    assert "training this model would take 23 GiB; give a tiny one: --dim 64" in process.said


def test_fsdp2_says_that_it_needs_torchrun(processes: Processes) -> None:
    process = processes.start(functools.partial(run_script, EXAMPLES / "fsdp2.py"), **WITHOUT_GPU)
    assert process.exit_code() == 1
    assert "needs torchrun: torchrun --nproc-per-node=2 examples/fsdp2.py" in process.said


def test_fsdp2_decides_on_every_rank_without_a_gpu(run: Callable[..., str]) -> None:
    out = run("fsdp2.py", ranks=2)
    assert out.count("trained nothing: there is no GPU here") == 1
    assert re.search(r"^converted [1-9]\d? of 15 linears", out, flags=re.M)


@pytest.mark.parametrize("ranks", [1, 2])
def test_fsdp2_converts_and_trains_on_every_rank(run: Callable[..., str], table: Path, ranks: int) -> None:
    out = run("fsdp2.py", *SIZES, "--tables", table, ranks=ranks)
    assert_only_the_feed_forward_was_converted(out)
    assert sorted(re.findall(r"rank (\d), step 1: loss \d", out)) == [str(rank) for rank in range(ranks)]


@pytest.mark.parametrize("ranks", [1, 2])
def test_fsdp2_gathers_converted_weights_in_float8(run: Callable[..., str], tensorwise_table: Path, ranks: int) -> None:
    """Each of 6 weights is gathered in the forward and the backward of 2 steps; the first has no scale to go by."""
    asked = (*SIZES, "--recipe", "tensorwise", "--tables", tensorwise_table, "--float8-all-gather")
    out = run("fsdp2.py", *asked, ranks=ranks, runner=count_float8_gathers)
    assert_only_the_feed_forward_was_converted(out, "tensorwise")
    assert out.count("UnmeasuredSettingWarning: float8_config.enable_fsdp_float8_all_gather is True") == ranks
    assert out.count("24 casts before gathering, 12 by a known scale") == ranks
    assert all(0 < loss < 10 for loss in losses(out))
    assert len(losses(out)) == 2 * ranks


def test_fsdp2_gathers_in_bf16_unless_asked(run: Callable[..., str], tensorwise_table: Path) -> None:
    asked = (*SIZES, "--recipe", "tensorwise", "--tables", tensorwise_table)
    out = run("fsdp2.py", *asked, ranks=2, runner=count_float8_gathers)
    assert_only_the_feed_forward_was_converted(out, "tensorwise")
    assert out.count("0 casts before gathering") == 2
    assert "UnmeasuredSettingWarning" not in out


def test_only_tensorwise_gathers_in_float8(processes: Processes) -> None:
    script = functools.partial(run_script, EXAMPLES / "fsdp2.py", "--float8-all-gather")
    process = processes.start(script, **WITHOUT_GPU)
    assert process.exit_code() == 2
    assert "--float8-all-gather needs --recipe tensorwise" in process.said


@pytest.mark.slow
def test_torchrun_starts_fsdp2(table: Path) -> None:
    """By the command that the example gives, in a fresh Python."""
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "fsdp2.py", *map(str, SIZES)]
    environment = {**os.environ, **WITHOUT_GPU, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    process = subprocess.run(
        [sys.executable, *command, "--tables", str(table)],
        cwd=EXAMPLES,
        env=environment,
        capture_output=True,
        text=True,
        timeout=MAX_WAIT_S,
    )
    assert process.returncode == 0, process.stderr
    assert_only_the_feed_forward_was_converted(process.stdout)
    assert sorted(re.findall(r"rank (\d), step 1: loss \d", process.stdout)) == ["0", "1"]


@needs("accelerate", "transformers")
@pytest.mark.parametrize("framework", ["accelerate", "trainer"])
def test_accelerate_and_trainer_convert_and_train(run: Callable[..., str], table: Path, framework: str) -> None:
    out = run("accelerate_trainer.py", framework, *SIZES, "--tables", table)
    assert_only_the_feed_forward_was_converted(out)
    assert all(0 < loss < 10 for loss in losses(out))
    assert len(losses(out)) == 2


@needs("lightning")
def test_fabric_trains_what_was_converted(run: Callable[..., str], table: Path) -> None:
    out = run("lightning_fabric.py", *SIZES, "--tables", table)
    assert_only_the_feed_forward_was_converted(out)
    first, second = losses(out)
    assert second < first


@needs("lightning")
def test_fabric_divides_the_converted_model_by_fsdp2(run: Callable[..., str], table: Path) -> None:
    out = run("lightning_fabric.py", *SIZES, "--tables", table, ranks=2)
    assert_only_the_feed_forward_was_converted(out)
    assert sorted(re.findall(r"rank (\d), step 1: loss \d", out)) == ["0", "1"]
