"""The journal: what was measured survives, whatever happens, and nothing else gets in."""

from __future__ import annotations

import dataclasses
import os
import re
import resource
import zlib

import msgspec
import pytest
import torch
from samples import NEVER_NOISE, PROTOCOLS, SETUP, SOFTWARE, point_record, replaced

from fp8gate.calibrate.device.cpu import Cpu
from fp8gate.calibrate.planning.visit_journal import VisitRecord
from fp8gate.calibrate.points.point_worker import PointBench
from fp8gate.calibrate.points.setup import Setup
from fp8gate.calibrate.sweep.journal import JournalError, SweepJournal, content_of
from fp8gate.calibrate.sweep.run_sweep import sweep
from fp8gate.filter.contract.bounds import Spread
from fp8gate.filter.contract.shapes import LinearShape
from fp8gate.filter.contract.table import Grid

FIRST, SECOND, THIRD = (point_record((m, 16, 16)) for m in (16, 32, 48))
OTHER_SETUPS = [
    replaced(SETUP, software=replaced(SOFTWARE, torch="2.12.0")),
    replaced(SETUP, device=replaced(SETUP.device, threads=1)),
    replaced(SETUP, protocols={**PROTOCOLS, "rowwise": replaced(PROTOCOLS["rowwise"], settle_s=1.0)}),
]


@pytest.fixture
def written(tmp_path):
    """The path of a journal that holds FIRST and SECOND."""
    with SweepJournal(tmp_path, SETUP) as journal:
        journal.append(FIRST)
        journal.append(SECOND)
    return journal.path


def reopen(path, **options):
    with SweepJournal(path.parent, SETUP, **options) as journal:
        return journal


def test_a_new_journal_is_empty_but_for_its_header(tmp_path):
    with SweepJournal(tmp_path / "new" / "folder", SETUP) as journal:
        assert journal.records == []
    assert msgspec.json.decode(content_of(journal.path.read_bytes()[:-1]), type=Setup) == SETUP


def test_what_was_appended_is_there_again(written):
    with SweepJournal(written.parent, SETUP) as journal:
        assert journal.records == [FIRST, SECOND]
        journal.append(THIRD)
        assert journal.records == [FIRST, SECOND, THIRD]
    assert reopen(written).records == [FIRST, SECOND, THIRD]


def test_an_appended_point_is_in_the_file_at_once(tmp_path):
    with SweepJournal(tmp_path, SETUP) as journal:
        journal.append(FIRST)
        last_line = journal.path.read_bytes().splitlines()[-1]
        assert msgspec.json.decode(content_of(last_line), type=type(FIRST)) == FIRST


def test_an_appended_point_is_on_the_disk_when_append_returns(tmp_path, monkeypatch):
    synced = []
    with SweepJournal(tmp_path, SETUP) as journal:
        fsync = os.fsync
        monkeypatch.setattr(os, "fsync", lambda handle: synced.append(os.fstat(handle).st_size) or fsync(handle))
        journal.append(FIRST)
        assert synced == [journal.path.stat().st_size]


def test_a_last_line_cut_anywhere_is_dropped_and_written_over(written):
    content = written.read_bytes()
    before_last = content.rindex(b"\n", 0, -1) + 1
    assert len(content) - before_last > 100
    for length in range(before_last, len(content), 9):
        written.write_bytes(content[:length])
        with SweepJournal(written.parent, SETUP) as journal:
            assert journal.records == [FIRST]
            journal.append(SECOND)
        assert written.read_bytes() == content


def test_a_header_cut_anywhere_is_written_again(tmp_path):
    path = reopen(tmp_path / "any").path
    content = path.read_bytes()
    for length in range(0, len(content), 25):
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


@pytest.mark.parametrize("change", [0x01, 0x20, 0x80])
def test_any_changed_byte_is_found_and_nothing_is_changed(written, change):
    content = written.read_bytes()
    second = content.index(b"\n") + 1
    for i in range(second, content.index(b"\n", second)):
        damaged = content[:i] + bytes([content[i] ^ change]) + content[i + 1 :]
        written.write_bytes(damaged)
        with pytest.raises(JournalError, match=rf"^{re.escape(str(written))}:2: .*--fresh"):
            reopen(written)
        assert written.read_bytes() == damaged


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (lambda text: text.replace(b'"bwd_us":[100.0,', b'"bwd_us":[', 1), "expected as many samples"),
        (lambda text: text.replace(b'"fwd_us"', b'"status":"failed","fwd_us"', 1), "expected samples if and only if"),
        (lambda text: text.replace(b'"bf16"', b'"bf16_again"', 1), "expected bf16 among them"),
        (lambda text: text.replace(b'"m":16', b'"m":-16', 1), "Expected `int` >= 1"),
        (lambda text: text.replace(b"100.0", b"-100.0", 1), "Expected `float` > 0"),
        (lambda text: text.replace(b'Z"', b'"', 1), "Expected `datetime` with a timezone"),
    ],
)
def test_a_record_is_checked_though_its_checksum_is_right(written, damage, problem):
    header, record, *rest = written.read_bytes().splitlines(keepends=True)
    content = damage(content_of(record[:-1]))
    assert content != content_of(record[:-1])
    written.write_bytes(b"".join([header, line_of(content), *rest]))
    with pytest.raises(JournalError, match=rf":2: .*{problem}"):
        reopen(written)


def test_a_visit_is_checked_too():
    visit = VisitRecord(convert=(), round=1, measured_at=FIRST.measured_at, fwd_us=1.0, bwd_us=2.0)
    assert visit.problem() is None
    assert "expected times if and only if" in replaced(visit, bwd_us=None).problem()
    assert "expected times if and only if" in replaced(visit, status="failed").problem()


def test_a_journal_that_is_not_this_ones_is_left_as_it_is(written):
    other = SweepJournal(written.parent, OTHER_SETUPS[0])
    written.rename(other.path)
    cut = other.path.read_bytes()[:-5]
    other.path.write_bytes(cut)
    with pytest.raises(JournalError, match=":1: is of another set-up"), other:
        pass
    assert other.path.read_bytes() == cut


@pytest.mark.parametrize("fresh", [False, True])
def test_no_link_is_followed(written, fresh):
    elsewhere = written.rename(written.with_name("elsewhere"))
    content = elsewhere.read_bytes()
    written.symlink_to(elsewhere)
    with pytest.raises(JournalError, match="expected a regular file, found a symbolic link"):
        reopen(written, fresh=fresh)
    assert elsewhere.read_bytes() == content


def test_a_pipe_is_refused_at_once(written):
    written.unlink()
    os.mkfifo(written)
    with pytest.raises(JournalError, match="expected a regular file, found something else"):
        reopen(written)


def test_a_full_disk_names_the_file_and_loses_nothing(written):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with SweepJournal(written.parent, SETUP) as journal:
        resource.setrlimit(resource.RLIMIT_FSIZE, (written.stat().st_size + 100, hard))
        try:
            with pytest.raises(OSError, match=re.escape(str(written))):
                journal.append(THIRD)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert journal.records == [FIRST, SECOND]
    assert reopen(written).records == [FIRST, SECOND]


def line_of(content):
    return b'["%08x", %b]\n' % (zlib.crc32(content), content)


def test_a_damaged_journal_can_be_put_aside(written):
    written.write_bytes(written.read_bytes().replace(b'"m":16', b'"m":-'))
    journal = reopen(written, fresh=True)
    assert journal.records == []
    assert b'"m":-' in journal.set_aside.read_bytes()


@pytest.mark.parametrize("fresh", [False, True])
def test_only_one_process_can_have_it_open(written, fresh):
    content = written.read_bytes()
    with SweepJournal(written.parent, SETUP), pytest.raises(JournalError, match="another sweep is writing to it"):
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
    with SweepJournal(written.parent, other_setup) as other:
        assert other.records == []
        assert other.path != written
        assert other.others() == [written]
    assert reopen(written).records == [FIRST, SECOND]


def test_others_are_journals_only(written):
    written.with_name("rowwise.yaml").touch()
    assert reopen(written).others() == []


def test_a_journal_of_another_setup_under_this_ones_name_is_refused(written):
    other = SweepJournal(written.parent, OTHER_SETUPS[0])
    written.rename(other.path)
    with pytest.raises(JournalError, match=":1: is of another set-up"), other:
        pass


def test_fresh_keeps_the_old_journal_aside(written):
    content = written.read_bytes()
    with SweepJournal(written.parent, SETUP, fresh=True) as journal:
        assert journal.records == []
        journal.append(THIRD)
        assert journal.others() == []
    assert journal.set_aside.parent == written.parent
    assert journal.set_aside.read_bytes() == content
    assert reopen(written).records == [THIRD]


def test_fresh_again_and_again_keeps_every_journal(tmp_path):
    for record in (FIRST, SECOND, THIRD):
        with SweepJournal(tmp_path, SETUP, fresh=True) as journal:
            journal.append(record)
    kept = sorted(content_of(path.read_bytes().splitlines()[1]) for path in tmp_path.glob("journal-*.jsonl.*"))
    assert kept == sorted(msgspec.json.encode(record) for record in (FIRST, SECOND))


def test_a_journal_keeps_which_tables_its_fresh_start_replaces(written):
    assert reopen(written, replaces=["rowwise"]).replaces == ()  # it was not begun so
    for options in ({"fresh": True, "replaces": ["rowwise"]}, {}, {"replaces": ["tensorwise"]}):
        with SweepJournal(written.parent, SETUP, **options) as journal:
            journal.append(THIRD)
        assert journal.replaces == ("rowwise",)
    assert journal.records == [THIRD] * 3
    assert reopen(written, fresh=True).replaces == reopen(written).replaces == ()


@pytest.mark.parametrize("replaces", [b'"rowwise"', b'["columnwise"]'])
def test_a_header_that_replaces_no_recipe_is_refused(tmp_path, replaces):
    path = reopen(tmp_path / "any").path
    content = content_of(path.read_bytes()[:-1])
    path.write_bytes(line_of(content[:-1] + b',"replaces":' + replaces + b"}"))
    with pytest.raises(JournalError, match=r":1: .*--fresh"):
        reopen(path)


def test_fresh_has_nothing_to_keep_at_first(tmp_path):
    journal = reopen(tmp_path / "any", fresh=True)
    assert (journal.records, journal.set_aside) == ([], None)
    assert reopen(tmp_path / "any").set_aside is None


# Journals that were written before this release: whatever is renamed, they keep their names and are read.

CPU_PROTOCOL = (
    '{"timer":"wall_clock","compile":false,"inductor":{},"bf16":"eager","l2":"cold",'
    '"data":"x, grad ~ N(0, 1); w ~ N(0, 0.02)","settle_s":0.1,"run_s":0.05,"pause_s":0.15,"rounds":[10,30],'
    '"confidence":0.99,"threshold":1.0,"tolerance":0.01,"near":0.03,"near_s":1.0,"control":0.2}'
)
CPU_HEADER = (
    '{"device":{"name":"CPU AMD EPYC","kind":"cpu","threads":2,"memory_gib":23.5},'
    '"software":{"torch":"2.13.0","torchao":"0.18.0","fp8gate":"0.1.0"},'
    f'"protocols":{{"tensorwise":{CPU_PROTOCOL},"rowwise":{CPU_PROTOCOL},"rowwise_with_gw_hp":{CPU_PROTOCOL}}}}}'
)
GPU_PROTOCOL = (
    '{"timer":"cuda_graphs","compile":true,"inductor":{},"bf16":"eager","l2":"cold",'
    '"data":"x, grad ~ N(0, 1); w ~ N(0, 0.02)","settle_s":0.1,"run_s":0.05,"pause_s":0.15,"rounds":[10,30],'
    '"confidence":0.99,"threshold":1.0,"tolerance":0.01,"near":0.03,"near_s":1.0,"control":0.005}'
)
EMULATING = GPU_PROTOCOL.replace("{}", '{"emulate_precision_casts":true}')
GPU_HEADER = (
    '{"device":{"name":"NVIDIA H200","kind":"cuda","capability":"9.0","multiprocessors":132,"memory_gib":139.8,'
    '"l2_mib":60.0,"power_limit_w":700.0},'
    '"software":{"torch":"2.13.0","torchao":"0.18.0","triton":"3.6.0","cuda":"13.0","driver":"580.159.04",'
    '"fp8gate":"0.1.0"},'
    f'"protocols":{{"tensorwise":{GPU_PROTOCOL},"rowwise":{EMULATING},"rowwise_with_gw_hp":{GPU_PROTOCOL}}}}}'
)
TEN = "[{0},{0},{0},{0},{0},{0},{0},{0},{0},{0}]"
ARMS = (
    f'"bf16":{{"fwd_us":{TEN.format(40.0)},"bwd_us":{TEN.format(60.0)},"errors":{{"output":0.00168}}}},'
    f'"rowwise":{{"fwd_us":{TEN.format(30.5)},"bwd_us":{TEN.format(49.5)},"errors":{{"output":0.03891,"grad_x":null}}}}'
)
CONTROL_ARM = f',"bf16_again":{{"fwd_us":{TEN.format(40.1)},"bwd_us":{TEN.format(60.0)}}}'
STAGES = '{"compiling_s":0.269,"loading_s":0.012,"settling_s":0.054,"timing_s":0.27}'
RECORDS = (
    f'{{"m":32,"k":32,"n":48,"measured_at":"2026-11-25T22:38:30Z","stages":{STAGES},"process":32557,'
    f'"measured_on":"node7 cpu 0","host":"node7","repeat":false,"sm_clock_mhz":[],"arms":{{{ARMS}}}}}',
    f'{{"m":32,"k":64,"n":48,"measured_at":"2026-11-25T22:38:31Z","stages":{STAGES},"process":32557,'
    f'"measured_on":"node7 cpu 0","host":"node7","repeat":false,"sm_clock_mhz":[],"arms":{{{ARMS}{CONTROL_ARM}}}}}',
    f'{{"m":32,"k":64,"n":48,"measured_at":"2026-11-25T22:38:32Z","stages":{STAGES},"process":32558,'
    f'"measured_on":"node7 cpu 0","host":"node7","repeat":true,"sm_clock_mhz":[],"arms":{{{ARMS}}}}}',
)


def setup_of(header):
    return msgspec.json.decode(header, type=Setup)


@pytest.mark.parametrize(
    ("header", "name"), [(CPU_HEADER, "journal-9b5894d6.jsonl"), (GPU_HEADER, "journal-5932c6fa.jsonl")]
)
def test_a_setup_keeps_its_header_and_its_file(tmp_path, header, name):
    with SweepJournal(tmp_path, setup_of(header)) as journal:
        assert journal.path == tmp_path / name
        assert content_of(journal.path.read_bytes()[:-1]) == header.encode()


def test_an_earlier_journal_is_gone_on_with_and_nothing_is_measured_again(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Cpu, "identity", lambda kind, device, local_rank: f"node7 cpu {local_rank}")
    monkeypatch.setattr(Cpu, "defaults", dataclasses.replace(Cpu.defaults, noise=NEVER_NOISE))
    monkeypatch.setattr(PointBench, "measure", lambda bench, point: pytest.fail(f"{point.task} is measured again"))
    path = tmp_path / "cpu-amd-epyc" / "journal-9b5894d6.jsonl"
    path.parent.mkdir()
    path.write_text("".join(f"{line}\n" for line in (CPU_HEADER, *RECORDS)))
    result = sweep(
        Grid(),
        [LinearShape(32, 32, 48), LinearShape(32, 64, 48)],
        recipes=["rowwise"],
        device=torch.device("cpu"),
        setup=setup_of(CPU_HEADER),
        out=tmp_path,
    )
    assert (result.report.measured, result.report.resumed, result.remaining) == (0, 3, 0)
    assert [content_of(line).decode() for line in path.read_bytes().splitlines()] == [CPU_HEADER, *RECORDS]
    assert "had no checksums" in capsys.readouterr().err
    (table,) = result.tables.values()
    assert [point.numbers for point in table.points] == [(40.0, 60.0, 30.5, 49.5, 1.25, 1.25, 1.25)] * 2
    assert table.protocol.spread == Spread(points=1, median=0.0, p95=0.0, worst=0.0)
    assert table.protocol.controls == Spread(points=1, median=0.001, p95=0.001, worst=0.001)


def test_a_journal_without_checksums_is_read_once_more_and_has_them_then(tmp_path):
    header = setup_of(CPU_HEADER)
    path = SweepJournal(tmp_path, header).path
    path.write_text("".join(f"{line}\n" for line in (CPU_HEADER, *RECORDS)) + '{"cut')
    with SweepJournal(tmp_path, header) as journal:
        assert journal.had_no_checksums
        assert len(journal.records) == len(RECORDS)
        journal.append(journal.records[0])
        with pytest.raises(JournalError, match="another sweep is writing to it"), SweepJournal(tmp_path, header):
            pass
    with SweepJournal(tmp_path, header) as again:
        assert not again.had_no_checksums
        assert again.records == journal.records
    assert list(tmp_path.iterdir()) == [path]


def test_a_journal_without_checksums_stays_as_it_is_if_the_new_one_cannot_be_written(tmp_path, monkeypatch):
    path = SweepJournal(tmp_path, setup_of(CPU_HEADER)).path
    path.write_text(f"{CPU_HEADER}\n{RECORDS[0]}\n")
    before = path.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space left"), SweepJournal(tmp_path, setup_of(CPU_HEADER)):
        pass
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
