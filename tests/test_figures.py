"""The README's pictures are of the tables as they are: `make figures` draws them again."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from PIL import Image

from fp8gate.calibrate.report.map_figures import SOURCE
from fp8gate.calibrate.report.page.pictures import tables_hash
from fp8gate.filter.contract.table import read_table
from fp8gate.filter.locate.find_table import table_files

ROOT = Path(__file__).parent.parent
FIGURES = sorted((ROOT / "docs" / "figures").glob("*.png"))
MAX_BYTES = 300_000


@pytest.mark.parametrize("figure", FIGURES, ids=lambda path: path.name)
def test_a_committed_picture_shows_the_committed_tables(figure):
    tables = map(read_table, table_files(ROOT / "thresholds" / "nvidia-h200"))
    assert Image.open(figure).text == {SOURCE: tables_hash(tables)}, "the tables have changed: make figures"
    assert figure.stat().st_size < MAX_BYTES


def test_the_pictures_are_those_that_the_readme_shows_and_make_draws():
    shown = set(re.findall(r"docs/figures/[\w-]+\.png", (ROOT / "README.md").read_text()))
    drawn = set(re.findall(r"docs/figures/[\w-]+\.png", (ROOT / "Makefile").read_text()))
    assert shown == drawn == {str(path.relative_to(ROOT)) for path in FIGURES}
