"""A torch that is newer than all that were tested is said once before measuring, and installs all the same."""

from __future__ import annotations

import re
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from fp8gate.calibrate.device.torch_release import NEWEST_TESTED, untested
from fp8gate.cli import options
from fp8gate.cli.app import app

ROOT = Path(__file__).parent.parent
NEWEST = ".".join(map(str, NEWEST_TESTED))
OLDEST_ON_A_CPU = (2, 12)
"""Before, torch multiplies on a CPU with one scale a tensor only, which leaves out two of the three recipes."""
NEXT = f"{NEWEST_TESTED[0]}.{NEWEST_TESTED[1] + 1}"


@pytest.mark.parametrize("version", ["2.11.0", "2.13.0+cpu", f"{NEWEST}.0", f"{NEWEST}.7+cu132", "unknown", None])
def test_nothing_is_said_of_a_tested_or_unknown_release(version: str | None) -> None:
    assert untested(version) is None


@pytest.mark.parametrize("version", [f"{NEXT}.0", f"{NEXT}.0.dev20270101+cu132", "3.0.0"])
def test_a_newer_release_is_named_with_what_to_do(version: str) -> None:
    said = untested(version)
    assert said is not None
    assert said.startswith(f"torch {version} is newer than {NEWEST}, the last release that fp8gate was tested with. ")
    assert said.endswith(f": pip install 'torch<{NEXT}'")


def test_the_last_number_is_no_decimal() -> None:
    assert untested("2.9.0") is None
    assert untested("2.100.0") is not None


@pytest.fixture
def newer_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the release after the newest tested were installed."""
    monkeypatch.setattr(options, "installed_version", lambda package: f"{NEXT}.0" if package == "torch" else None)


SHAPE = ["32", "32", "32", "--recipe", "rowwise", "--device", "cpu"]


@pytest.mark.usefixtures("newer_torch")
def test_a_command_that_measures_says_it_once() -> None:
    result = CliRunner().invoke(app, ["breakdown", *SHAPE])
    assert "kernels sum to" in result.stdout
    assert result.stderr.count(f"torch {NEXT}.0 is newer than") == 1


@pytest.mark.usefixtures("newer_torch")
@pytest.mark.parametrize(("rank", "times"), [("0", 1), ("1", 0)])
def test_of_several_ranks_the_first_says_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], rank: str, times: int
) -> None:
    monkeypatch.setenv("RANK", rank)
    options.start_measuring("cpu", workers=0)
    assert capsys.readouterr().err.count("is newer than") == times


@pytest.mark.usefixtures("newer_torch")
def test_a_command_that_does_not_measure_says_nothing() -> None:
    result = CliRunner().invoke(app, ["verify", "--files"])
    assert "is newer than" not in result.stderr


def test_the_installed_release_is_one_that_was_tested() -> None:
    assert untested(metadata.version("torch")) is None


def test_continuous_integration_tests_up_to_the_newest() -> None:
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    constrained = re.findall(r"^torch==(\S+)", (ROOT / "constraints.txt").read_text(), flags=re.M)
    releases = {*workflow["jobs"]["torch"]["strategy"]["matrix"]["torch"], *constrained}
    minors = sorted(tuple(map(int, release.split(".")[:2])) for release in releases)
    assert minors == [(2, minor) for minor in range(OLDEST_ON_A_CPU[1], NEWEST_TESTED[1] + 1)]
    assert f"[2.{OLDEST_ON_A_CPU[1]} to {NEWEST}](docs/torch-versions.md)" in (ROOT / "README.md").read_text()
