"""The wheel holds what the source folders hold, under one import name, and nothing else."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist, and the wheel built from that sdist."""
    checkout = tmp_path_factory.mktemp("checkout") / "fp8gate"
    ignored = shutil.ignore_patterns(".*", "__pycache__", "dist")
    shutil.copytree(ROOT, checkout, symlinks=True, ignore=ignored)
    (checkout / "thresholds" / "journal-00000000.jsonl").write_text("{}\n")  # what a sweep leaves beside its tables
    dist = tmp_path_factory.mktemp("dist")
    subprocess.run([sys.executable, "-m", "build", "--no-isolation", "--outdir", dist, checkout], check=True)
    return dist


def expected_files() -> set[str]:
    """Everything tracked in the four source folders, under its installed name."""
    files = {f"fp8gate/{name}" for name in ("__init__.py", "__main__.py", "py.typed")}
    package = ROOT / "src" / "fp8gate"
    for folder in ("casts", "cli", "torchtitan"):
        files |= {f"fp8gate/{path.relative_to(package)}" for path in (package / folder).rglob("*.py")}
    code = (("calibrate", "*.py"), ("filter", "*.py"))
    data = (("calibrate", "*.jinja"), ("filter", "*.json"), ("thresholds", "*.yaml"))
    for folder, pattern in (*code, *data):
        files |= {f"fp8gate/{path.relative_to(ROOT)}" for path in (ROOT / folder).rglob(pattern)}
    return files


def test_the_wheel_holds_the_four_folders_and_nothing_else(built: Path) -> None:
    names = zipfile.ZipFile(next(built.glob("*.whl"))).namelist()
    assert {name for name in names if ".dist-info/" not in name} == expected_files()


def test_an_installed_wheel_explains_a_model_from_its_own_tables(built: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(next(built.glob("*.whl"))).extractall(tmp_path)
    script = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import fp8gate\n"
        f"assert {str(tmp_path)!r} in fp8gate.__file__\n"
        "from fp8gate.cli import app; app(sys.argv[1:])"
    )
    command = [sys.executable, "-I", "-c", script, "explain", "llama3-8b", "--recipe", "rowwise", "--tokens", "8192"]
    result = subprocess.run([*command, "--device", "NVIDIA H200"], capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "model.layers.*.self_attn.k_proj" in result.stdout


def test_the_source_folders_are_linked_into_the_package() -> None:
    for folder in ("calibrate", "filter", "thresholds"):
        assert (ROOT / "src" / "fp8gate" / folder).resolve() == ROOT / folder
