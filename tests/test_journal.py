"""The journal: what was measured survives, whatever happens, and nothing else gets in."""

from __future__ import annotations

import re

import msgspec
import pytest
from samples import PROTOCOLS, SETUP, SOFTWARE, point_record, replaced

from fp8gate.calibrate.sweep.journal import Journal, JournalError, Setup

FIRST, SECOND, THIRD = (point_record((m, 16, 16)) for m in (16, 32, 48))
OTHER_SETUPS = [
    replaced(SETUP, software=replaced(SOFTWARE, torch="2.12.0")),
    replaced(SETUP, device=replaced(SETUP.device, threads=1)),
    replaced(SETUP, protocols={**PROTOCOLS, "rowwise": replaced(PROTOCOLS["rowwise"], settle_s=1.0)}),
]


@pytest.fixture
def written(tmp_path):
    """The path of a journal that holds FIRST and SECOND."""
    with Journal(tmp_path, SETUP) as journal:
        journal.append(FIRST)
        journal.append(SECOND)
    return journal.path


def reopen(path, **options):
    with Journal(path.parent, SETUP, **options) as journal:
        return journal


def test_a_new_journal_is_empty_but_for_its_header(tmp_path):
    with Journal(tmp_path / "new" / "folder", SETUP) as journal:
        assert journal.records == []
    assert msgspec.json.decode(journal.path.read_bytes(), type=Setup) == SETUP


def test_what_was_appended_is_there_again(written):
    with Journal(written.parent, SETUP) as journal:
        assert journal.records == [FIRST, SECOND]
        journal.append(THIRD)
        assert journal.records == [FIRST, SECOND, THIRD]
    assert reopen(written).records == [FIRST, SECOND, THIRD]


def test_an_appended_point_is_in_the_file_at_once(tmp_path):
    with Journal(tmp_path, SETUP) as journal:
        journal.append(FIRST)
        last_line = journal.path.read_bytes().splitlines()[-1]
        assert msgspec.json.decode(last_line, type=type(FIRST)) == FIRST


def test_a_last_line_cut_anywhere_is_dropped_and_written_over(written):
    content = written.read_bytes()
    before_last = content.rindex(b"\n", 0, -1) + 1
    assert len(content) - before_last > 100
    for length in range(before_last, len(content)):
        written.write_bytes(content[:length])
        with Journal(written.parent, SETUP) as journal:
            assert journal.records == [FIRST]
            journal.append(SECOND)
        assert written.read_bytes() == content


def test_a_header_cut_anywhere_is_written_again(tmp_path):
    path = reopen(tmp_path / "any").path
    content = path.read_bytes()
    for length in range(0, len(content), 10):
        path.write_bytes(content[:length])
        assert reopen(path).records == []
        assert path.read_bytes() == content


@pytest.mark.parametrize(
    ("line", "damage"),
    [
        (2, lambda text: text.replace(b'"m":16', b'"m":"16"')),
        (2, lambda text: text.replace(b'"timing_s"', b'"timing"', 1)),
        (3, lambda text: text[:-20] + b"\n"),
        (3, lambda text: text.replace(b"{", b"\x00", 1)),
        (2, lambda text: b"\n" + text),
    ],
)
def test_a_damaged_line_is_named(written, line, damage):
    lines = written.read_bytes().splitlines(keepends=True)
    lines[line - 1] = damage(lines[line - 1])
    written.write_bytes(b"".join(lines))
    with pytest.raises(JournalError, match=rf"^{re.escape(str(written))}:{line}: .*--fresh"):
        reopen(written)
    assert written.read_bytes() == b"".join(lines)


def test_a_damaged_journal_can_be_put_aside(written):
    written.write_bytes(written.read_bytes().replace(b'"m":16', b'"m":-'))
    journal = reopen(written, fresh=True)
    assert journal.records == []
    assert b'"m":-' in journal.set_aside.read_bytes()


@pytest.mark.parametrize("fresh", [False, True])
def test_only_one_process_can_have_it_open(written, fresh):
    content = written.read_bytes()
    with Journal(written.parent, SETUP), pytest.raises(JournalError, match="another sweep is writing to it"):
        reopen(written, fresh=fresh)
    assert written.read_bytes() == content
    assert reopen(written).records == [FIRST, SECOND]


def test_a_damaged_journal_is_not_left_locked(written):
    written.write_bytes(b"damaged\n")
    for _ in range(2):
        with pytest.raises(JournalError, match=":1: "):
            reopen(written)


@pytest.mark.parametrize("other_setup", OTHER_SETUPS, ids=["software", "device", "protocol"])
def test_another_setup_has_another_file(written, other_setup):
    with Journal(written.parent, other_setup) as other:
        assert other.records == []
        assert other.path != written
        assert other.others() == [written]
    assert reopen(written).records == [FIRST, SECOND]


def test_others_are_journals_only(written):
    written.with_name("rowwise.yaml").touch()
    assert reopen(written).others() == []


def test_a_journal_of_another_setup_under_this_ones_name_is_refused(written):
    other = Journal(written.parent, OTHER_SETUPS[0])
    written.rename(other.path)
    with pytest.raises(JournalError, match=":1: is of another set-up"), other:
        pass


def test_fresh_keeps_the_old_journal_aside(written):
    content = written.read_bytes()
    with Journal(written.parent, SETUP, fresh=True) as journal:
        assert journal.records == []
        journal.append(THIRD)
        assert journal.others() == []
    assert journal.set_aside.parent == written.parent
    assert journal.set_aside.read_bytes() == content
    assert reopen(written).records == [THIRD]


def test_fresh_again_and_again_keeps_every_journal(tmp_path):
    for record in (FIRST, SECOND, THIRD):
        with Journal(tmp_path, SETUP, fresh=True) as journal:
            journal.append(record)
    kept = sorted(path.read_bytes().splitlines()[1] for path in tmp_path.glob("journal-*.jsonl.*"))
    assert kept == sorted(msgspec.json.encode(record) for record in (FIRST, SECOND))


def test_fresh_has_nothing_to_keep_at_first(tmp_path):
    journal = reopen(tmp_path / "any", fresh=True)
    assert (journal.records, journal.set_aside) == ([], None)
    assert reopen(tmp_path / "any").set_aside is None
