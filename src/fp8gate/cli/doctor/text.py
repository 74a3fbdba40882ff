"""A checkup as text for people and as JSON for programs. Pure."""

from __future__ import annotations

from typing import Any

import msgspec

from fp8gate.calibrate.device.host_load import BUSY
from fp8gate.casts import VARIABLE
from fp8gate.cli.doctor.checkup import Checkup, DeviceFacts
from fp8gate.cli.doctor.found_files import FoundFile
from fp8gate.cli.doctor.next_steps import next_steps, problems
from fp8gate.filter.terminal_table import render_table


def checkup_json(checkup: Checkup) -> dict[str, Any]:
    data: dict[str, Any] = msgspec.to_builtins(checkup)
    return {**data, "problems": problems(checkup), "next": [step._asdict() for step in next_steps(checkup)]}


def checkup_text(checkup: Checkup) -> str:
    found = problems(checkup)
    versions = ", ".join(f"{name} {version or 'not installed'}" for name, version in checkup.versions.items())
    parts = [
        _device_text(checkup.device),
        versions,
        "\n".join(_host_lines(checkup)),
        _files_text("table", checkup.tables)
        + ("" if checkup.tables else f"; measured devices: {', '.join(checkup.measured) or 'none'}"),
        _files_text("plan", checkup.plans),
        "\n".join(["to be done:", *(f"- {one}" for one in found)]) if found else "all is well",
        "\n".join(["next:", *(f"  {step.command}\n    {step.why}" for step in next_steps(checkup))]),
    ]
    return "\n\n".join(parts)


def _device_text(device: DeviceFacts | None) -> str:
    if device is None:
        return "device unknown: torch is not installed"
    facts = [device.kind]
    facts += [f"{device.memory_gib} GiB"] if device.memory_gib else []
    facts += [f"driver {device.driver}"] if device.driver else []
    facts += [f"compute capability {device.capability}"] if device.capability else []
    float8 = "float8 runs" if device.runs_float8 else "float8 does not run"
    facts.append(f"{float8}, but gains nothing" if device.kind == "cpu" and device.runs_float8 else float8)
    return f"{device.name}: {', '.join(facts)}"


def _host_lines(checkup: Checkup) -> list[str]:
    load = "unknown" if checkup.load is None else f"{checkup.load:.1f}"
    busy = checkup.load is not None and checkup.load > BUSY * checkup.processors
    searched = ", then ".join(f"{path} ({what})" for path, what in checkup.places.items())
    asked = [] if checkup.casts is None else [f"the environment has {VARIABLE}={checkup.casts}"]
    return [
        f"host: load {load} on {checkup.processors} processors" + (", too busy to measure now" if busy else ""),
        f"tables and plans are searched in {searched or 'no folder: none is there'}",
        f"calibrate and plan write to {checkup.out or 'no folder'}",
        *asked,
    ]


def _files_text(kind: str, files: tuple[FoundFile, ...]) -> str:
    if not files:
        return f"{kind}s for this device: none"
    rows = [(one.what, one.measured, one.stale or one.problem or "no", one.path) for one in files]
    return render_table((kind, "measured", "stale", "file"), rows)
