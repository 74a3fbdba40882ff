"""The software that a table was measured with against that of this machine, release by release."""

from __future__ import annotations

from importlib import metadata

import pytest

from fp8gate.filter.contract import software_check as module
from fp8gate.filter.contract.software_check import PACKAGES, stale
from fp8gate.filter.contract.table import Software

HERE = {"torch": "2.13.0+cpu", "torchao": "0.18.0", "triton": "3.6.0"}
DRIVER = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.65.06  Release Build\n"


@pytest.fixture(autouse=True)
def installed(tmp_path, monkeypatch):
    """What is installed here, and the driver's file. A test may change both."""
    here = dict(HERE)

    def version(package):
        if package not in here:
            raise metadata.PackageNotFoundError(package)
        return here[package]

    monkeypatch.setattr(metadata, "version", version)
    monkeypatch.setattr(module, "DRIVER_VERSION", tmp_path / "version")
    (tmp_path / "version").write_text(DRIVER)
    return here


def differences(**versions):
    return stale(Software(**{"torch": "2.13.0", "torchao": "0.18.0", "fp8gate": "0.1.0", **versions}))


@pytest.mark.parametrize(
    ("versions", "difference"),
    [
        ({}, None),
        ({"torch": "2.13.0+cu130"}, None),
        ({"torch": "2.11.0"}, "torch 2.11.0, here 2.13.0"),
        ({"torch": "2.13.1"}, "torch 2.13.1, here 2.13.0"),
        ({"torchao": "0.17.0"}, "torchao 0.17.0, here 0.18.0"),
        ({"triton": "3.6.0"}, None),
        ({"triton": "3.5.1"}, "triton 3.5.1, here 3.6.0"),
        ({"driver": "580.65.06"}, None),
        ({"driver": "575.57.08"}, "driver 575.57.08, here 580.65.06"),
        ({"torch": "2.11.0", "triton": "3.5.1"}, "torch 2.11.0, here 2.13.0; triton 3.5.1, here 3.6.0"),
        ({"fp8gate": "0.0.1", "cuda": "12.0"}, None),
    ],
)
def test_the_releases_that_differ_are_named(versions, difference):
    assert differences(**versions) == difference


@pytest.mark.parametrize("package", PACKAGES)
def test_every_package_is_compared(package, installed):
    installed[package] = "9.9.9"
    measured = {name: version.split("+")[0] for name, version in HERE.items()}
    assert differences(**measured) == f"{package} {measured[package]}, here 9.9.9"


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_that_is_not_installed_here_does_not_differ(package, installed):
    del installed[package]
    assert differences(**{package: "0.0.1"}) is None


@pytest.mark.parametrize("content", [None, "", "no driver 1.2 stated here\n"])
def test_a_driver_that_cannot_be_asked_does_not_differ(tmp_path, content):
    (tmp_path / "version").unlink() if content is None else (tmp_path / "version").write_text(content)
    assert differences(driver="1.0") is None


def test_what_is_compared_is_what_decides_how_kernels_are_made():
    assert PACKAGES == ("torch", "torchao", "triton")
