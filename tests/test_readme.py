"""README.md, CONTRIBUTING.md and docs/ tell the truth: snippets run, commands parse, outputs are what is printed."""

from __future__ import annotations

import re
import shlex
import sys
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import pytest
from commands import parse
from documents import ROOT, script
from torchao.float8.float8_linear import Float8Linear

from fp8gate.filter.policy.findings import FilterWarning

if sys.version_info >= (3, 11):
    import tomllib

blocks = script("blocks")
TEXTS: dict[str, str] = {str(path.relative_to(ROOT)): path.read_text() for path in blocks.PAGES}
README = TEXTS["README.md"]
TRAINING_CODE = TEXTS["docs/training-code.md"]
SNIPPETS = [(name, i, source) for name, page in TEXTS.items() for i, source in enumerate(blocks.fences(page, "python"))]
COMMANDS = {command: name for name, page in TEXTS.items() for command in blocks.commands(page)}
OPTIONAL = ("accelerate",)
MAX_LINES = 150  # what a stranger reads

ignored_warnings = pytest.mark.filterwarnings(f"ignore::{FilterWarning.__module__}.FilterWarning")


needs_tomllib = pytest.mark.skipif(sys.version_info < (3, 11), reason="tomllib")


def project() -> dict[str, Any]:
    found: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return found


def snippet(page: str, containing: str) -> str:
    (found,) = (source for source in blocks.fences(page, "python") if containing in source)
    return found


def test_a_stranger_reads_the_readme_to_its_end() -> None:
    assert len(README.splitlines()) <= MAX_LINES


@ignored_warnings
@pytest.mark.parametrize(("page", "i", "source"), SNIPPETS, ids=lambda value: str(value)[:40].splitlines()[0])
def test_every_snippet_runs(page: str, i: int, source: str) -> None:
    for package in OPTIONAL:
        if package in source and find_spec(package) is None:
            pytest.skip(f"not installed: {package}")
    blocks.run_snippet(source)


@ignored_warnings
@pytest.mark.parametrize("page", [README, TRAINING_CODE, TEXTS["docs/getting-started.md"]])
def test_the_torchao_snippet_converts_only_what_wins(page: str) -> None:
    source = next(source for source in blocks.fences(page, "python") if "convert_to_float8_training(model" in source)
    namespace, printed = blocks.run_snippet(source)
    modules = dict(namespace["model"].named_modules())
    assert isinstance(modules["model.layers.0.mlp.up_proj"], Float8Linear)
    assert not isinstance(modules["model.layers.0.self_attn.v_proj"], Float8Linear)
    converted = sum(isinstance(module, Float8Linear) for module in modules.values())
    assert f"converted {converted} of 225 linears" in printed


@ignored_warnings
def test_the_parallel_snippet_refuses_what_loses_on_a_rank() -> None:
    wants_float8 = blocks.run_snippet(snippet(TRAINING_CODE, "ColwiseParallel()"))[0]["wants_float8"]
    assert not wants_float8(SimpleNamespace(in_features=8192, out_features=8192), "layers.3.attention.wq")
    decision = wants_float8.decisions["layers.3.attention.wq"]
    assert (decision.m, decision.k, decision.n) == (4096, 8192, 1024)


def test_a_wrong_snippet_is_found() -> None:
    with pytest.raises(TypeError):
        blocks.run_snippet("from fp8gate import auto_filter\nauto_filter('rowwise', token=8192)")


@pytest.mark.filterwarnings("ignore::fp8gate.StaleTableWarning")
@pytest.mark.parametrize("name", blocks.BLOCKS)
def test_a_block_is_what_is_printed(name: str) -> None:
    (page,) = (page for page in TEXTS.values() if f"<!-- {name} -->" in page)
    assert blocks.rewritten(page, [name]) == page, f"run: make docs, or python docs/blocks.py {name}"


def test_every_block_is_known_and_on_one_page() -> None:
    found = [match["name"] for page in TEXTS.values() for match in blocks.BLOCK.finditer(page)]
    assert sorted(found) == sorted(blocks.BLOCKS)


def test_a_block_is_made_anew_and_the_rest_of_the_page_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(blocks.BLOCKS, "counted", lambda above: f"{len(above)}\n")
    page = "one\n<!-- counted -->\nold\n<!-- /counted -->\ntwo <!-- other -->\nkept\n<!-- /other -->\n"
    assert blocks.rewritten(page, ["counted"]) == page.replace("old", "4")


def test_the_row_shown_is_in_the_committed_table() -> None:
    row = re.search(r"^  - \[8192, 4096, 1024, .*\]$", TEXTS["docs/table-format.md"], flags=re.M)
    assert row
    assert row[0] in (ROOT / "thresholds" / "nvidia-h200" / "rowwise.yaml").read_text().splitlines()


def arguments_of_fp8gate(command: str) -> list[str] | None:
    """What a command shown in a document gives to fp8gate, directly, under torchrun or by make; None if nothing."""
    words = shlex.split(command)
    if "fp8gate" in words[:1]:
        return words[1:]
    if "-m" in words and words[words.index("-m") + 1] == "fp8gate":
        return words[words.index("-m") + 2 :]
    passed_on = [word[5:] for word in words if word.startswith("ARGS=")]
    return [words[1], *shlex.split(passed_on[0])] if words[0] == "make" and passed_on else None


OF_FP8GATE = [command for command in COMMANDS if arguments_of_fp8gate(command)]


@pytest.mark.parametrize("command", OF_FP8GATE)
def test_a_command_shown_has_these_options(command: str) -> None:
    parse(shlex.join(["fp8gate", *(arguments_of_fp8gate(command) or [])]))


def test_every_way_of_starting_it_is_among_them() -> None:
    starts = {shlex.split(command)[0] for command in OF_FP8GATE}
    assert starts == {"fp8gate", "make", "torchrun", "srun"}


def test_every_make_target_shown_exists() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.M))
    shown = {shlex.split(command)[1] for command in COMMANDS if command.startswith("make ")}
    assert {"calibrate", "test", "verify", "check"} <= shown <= targets
    readme = [command for command in blocks.commands(README) if command.startswith("make ")]
    assert readme == ["make calibrate", "make test"]


def test_every_script_shown_exists() -> None:
    shown = {word for page in TEXTS.values() for word in re.findall(r"\b(?:benchmarks|examples|docs)/[\w-]+\.py", page)}
    assert len(shown) > 5
    assert [name for name in shown if not (ROOT / name).is_file()] == []


def extras_shown() -> set[str]:
    return {
        extra
        for page in TEXTS.values()
        for extras in re.findall(r"'\.\[([\w,]+)\]'", page)
        for extra in extras.split(",")
    }


@needs_tomllib
def test_every_extra_shown_exists() -> None:
    assert {"calibrate", "models"} <= extras_shown() <= set(project()["optional-dependencies"])


@needs_tomllib
def test_the_requirements_are_those_that_pip_checks() -> None:
    assert project()["requires-python"] == ">=3.10"
    assert "| Python | 3.10 or newer |" in README
    assert {"torch>=2.11", "torchao>=0.18"} <= set(project()["optional-dependencies"]["calibrate"])
    assert "| torch | 2.11 or newer, " in README
    assert "| torchao | 0.18 or newer |" in README


@pytest.mark.parametrize("name", [name for name in TEXTS if "/" not in name])
def test_every_link_of_a_page_outside_of_docs_leads_somewhere(name: str) -> None:
    """Those inside docs/ are checked by mkdocs."""
    links = re.findall(r"\]\(([^)#]+)[^)]*\)|(?:src|srcset)=\"([^\"]+)\"", TEXTS[name])
    targets = [target for found in links for target in found if target and "://" not in target]
    assert targets
    assert [target for target in targets if not (ROOT / target).is_file()] == []


def test_the_headline_numbers_are_those_of_the_comparison() -> None:
    comparison = (ROOT / "docs" / "comparison.md").read_text()
    assert re.search(r"^\| H200 tables, interpolated \|.*\| 38 of 38, ", comparison, flags=re.M)
    assert re.search(r"^\| torchao's rule \|.*\| 27 of 38, ", comparison, flags=re.M)
    line = " ".join(README.split())
    assert f"right for {27 / 38:.0%}".replace("%", " %") in line
    plans = (ROOT / "docs" / "plans.md").read_text()
    assert re.search(r"llama3-70b TP 8 +\| rowwise .*\+3.2% \(8\) .*\+7.4% \(8\)", plans)
    assert re.search(r"llama3-70b TP 8 +\| rowwise .*-0.2% \(8\) .*\+5.8% \(8\)", plans)
    assert "gains 5.8 % over bf16 on one H100, where the rule gains nothing" in line
    assert "gains 7.4 % over bf16 on one H200, where torchao's rule gains 3.2 %" in line
    assert re.search(r"\| rowwise    \| plan .*\+6.7% .*\+0.2% ", plans)
    assert "trains 6.7 % faster than in bf16, and only 0.2 % faster than by torchao's rule" in line
