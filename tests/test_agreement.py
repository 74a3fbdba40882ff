"""Ranks compare their decisions: real processes over gloo, of which some differ and some are killed.

Importing torch takes longer than anything that the ranks do. So one process imports it and forks all ranks, and the
groups of ranks run at the same time. Each rank lives through several scenes and leaves a file about each. Every wait
has a limit, and a process that is still alive after `ALL_GROUPS_LIMIT_S` is killed.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import time
from collections.abc import Callable, Iterable
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeAlias

import msgspec
import pytest
import torch.distributed as dist
from builders import make_point, make_table, write_file

from fp8gate import AutoFilter, auto_filter
from fp8gate.filter import agreement
from fp8gate.filter.agreement import MAX_NAMED
from fp8gate.filter.contract.errors import InputError

TOKENS = 32
SURE, CLOSE = (64, 128), (128, 64)  # (in_features, out_features)
TABLE = make_table(make_point(TOKENS, *SURE, 1.5), make_point(TOKENS, *CLOSE, 1.2))
OTHER = make_table(make_point(TOKENS, *SURE, 1.5), make_point(TOKENS, *CLOSE, 0.8))
BLOCKS = MAX_NAMED + 3  # each has one layer that the tables disagree on

RANKS = range(3)
PATIENT_S = 60.0  # the limit for what must happen
IMPATIENT_S = 1.5  # the timeout of ranks that wait for one that does not answer
ALL_GROUPS_LIMIT_S = 120.0  # they take 4 s on two idle cores


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """How `agree` ended on one rank. error: the name of its class, or empty."""

    error: str
    message: str
    elapsed_s: float


# --- what runs in the ranks' processes -------------------------------------------------------------------------


class Linear(msgspec.Struct, frozen=True):
    in_features: int
    out_features: int


class RankFiles:
    """The files by which the ranks of one group tell the test, and each other, how far they are."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def tell(self, scene: str, rank: int, text: bytes = b"") -> None:
        (self.folder / scene).mkdir(exist_ok=True)
        (self.folder / scene / f"{rank}.partial").write_bytes(text)
        (self.folder / scene / f"{rank}.partial").rename(self.folder / scene / str(rank))

    def wait_for(self, scene: str, *ranks: int) -> None:
        until_s = time.monotonic() + PATIENT_S
        while not all((self.folder / scene / str(rank)).exists() for rank in ranks):
            assert time.monotonic() < until_s, f"{scene}: rank {ranks}"
            time.sleep(0.01)

    def outcomes(self, scene: str) -> dict[int, Outcome]:
        """rank -> what it told of this scene."""
        told = sorted((self.folder / scene).iterdir())
        return {int(file.name): msgspec.json.decode(file.read_bytes(), type=Outcome) for file in told}


Scenes: TypeAlias = Callable[[int, RankFiles], None]


def asked(table: Path, *, tokens: int = TOKENS, prefix: str = "layers") -> AutoFilter:
    """A filter that has decided about every layer of a model."""
    wants_float8 = auto_filter("rowwise", tokens=tokens, tables=table, on_outside="ignore")
    for i in range(BLOCKS):
        wants_float8(Linear(*SURE), f"{prefix}.{i}.w1")
        wants_float8(Linear(*CLOSE), f"{prefix}.{i}.w2")
    return wants_float8


def agreeing(
    wants_float8: AutoFilter, group: dist.ProcessGroup | None = None, *, timeout_s: float = PATIENT_S
) -> bytes:
    """The `Outcome` of `agree`, as JSON."""
    error: Exception | None = None
    start_s = time.monotonic()
    try:
        wants_float8.agree(group, timeout_s=timeout_s)
    except Exception as caught:  # whatever it is, a test sees it
        error = caught
    elapsed_s = time.monotonic() - start_s
    outcome = Outcome(error=type(error).__name__ if error else "", message=str(error or ""), elapsed_s=elapsed_s)
    return msgspec.json.encode(outcome)


def scenes_with_a_tcp_store(rank: int, files: RankFiles) -> None:
    """All answer, some alike and some not. Then rank 2 is killed, then rank 0, in which the store lives."""
    same, other = asked(files.folder / "same.yaml"), asked(files.folder / "other.yaml")
    longer = asked(files.folder / "same.yaml", tokens=2 * TOKENS)
    renamed = asked(files.folder / "same.yaml", prefix="blocks")
    files.tell("same", rank, agreeing(same))
    files.tell("same again", rank, agreeing(same))
    files.tell("another table", rank, agreeing(other if rank == 1 else same))
    files.tell("same after all", rank, agreeing(same))
    files.tell("other tokens", rank, agreeing(longer if rank == 2 else same))
    files.tell("other names", rank, agreeing(renamed if rank == 0 else same))
    files.tell("three opinions", rank, agreeing((same, other, longer)[rank]))
    groups = {"group that agrees": dist.new_group([0, 1]), "group that does not": dist.new_group([1, 2])}
    for name, group in groups.items():
        if group is not dist.GroupMember.NON_GROUP_MEMBER:
            files.tell(name, rank, agreeing(other if rank == 2 else same, group))
    files.tell("all after groups", rank, agreeing(same))
    if rank == 2:
        die()
    meet(files, rank, 0, 1)
    files.tell("rank 2 is dead", rank, agreeing(same, timeout_s=IMPATIENT_S))
    if rank == 0:
        files.wait_for("rank 1 asks", 1)
        time.sleep(0.2)  # now it waits for an answer
        die()
    files.tell("rank 1 asks", rank)
    files.tell("rank 0 dies", rank, agreeing(same))
    files.tell("rank 0 is dead", rank, agreeing(same))


def scenes_with_a_file_store(rank: int, files: RankFiles) -> None:
    same, other = asked(files.folder / "same.yaml"), asked(files.folder / "other.yaml")
    files.tell("same", rank, agreeing(same))
    files.tell("another table", rank, agreeing(other if rank == 1 else same))
    if rank == 0:
        die()
    meet(files, rank, 1, 2)
    files.tell("rank 0 is dead", rank, agreeing(same, timeout_s=IMPATIENT_S))


def scene_of_a_rank_that_comes_late(rank: int, files: RankFiles) -> None:
    """Rank 2 answers when the others have given up. All the texts that it finds agree with its own."""
    same = asked(files.folder / "same.yaml")
    if rank == 2:
        files.wait_for("late", 0, 1)
    else:
        meet(files, rank, 0, 1)
    files.tell("late", rank, agreeing(same, timeout_s=IMPATIENT_S))
    files.wait_for("late", 2)  # the store lives in rank 0


def scene_of_an_error_that_ends_rank_0(rank: int, files: RankFiles) -> None:
    """Nobody catches the error, so the store is gone as soon as rank 0 knows. The other ranks must be told before."""
    read_all = agreement.RankExchange.read_all

    def read_late(exchange: agreement.RankExchange, topic: str, *args: Any) -> dict[int, str]:
        if topic == "content":
            time.sleep(0.3)  # far longer than rank 0 takes from here to its end
        return read_all(exchange, topic, *args)

    if rank == 1:  # no other rank waits for its table, which is that of rank 0
        agreement.RankExchange.read_all = read_late  # type: ignore[method-assign]
    table = "other.yaml" if rank == 2 else "same.yaml"
    files.tell("another table", rank, agreeing(asked(files.folder / table)))
    if rank == 0:
        die()


def meet(files: RankFiles, rank: int, *ranks: int) -> None:
    """Wait for these ranks, so that a timeout which begins now finds them there."""
    files.tell("meeting", rank)
    files.wait_for("meeting", *ranks)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


# --- what starts and ends them ---------------------------------------------------------------------------------

GROUPS: dict[str, Scenes] = {
    "tcp": scenes_with_a_tcp_store,
    "file": scenes_with_a_file_store,
    "late": scene_of_a_rank_that_comes_late,
    "error": scene_of_an_error_that_ends_rank_0,
}


def make_store(name: str, rank: int, files: RankFiles) -> dist.Store:
    """Rank 0 keeps a TCP store, on a port that the system chooses."""
    if name == "file":
        return dist.FileStore(str(files.folder / "store"), len(RANKS))
    limit = timedelta(seconds=PATIENT_S)
    if rank == 0:
        store = dist.TCPStore("127.0.0.1", 0, len(RANKS), is_master=True, timeout=limit, wait_for_workers=False)
        files.tell("port", 0, str(store.port).encode())
        return store
    files.wait_for("port", 0)
    port = int((files.folder / "port" / "0").read_text())
    return dist.TCPStore("127.0.0.1", port, len(RANKS), is_master=False, timeout=limit)


def run_rank(name: str, rank: int, files: RankFiles) -> None:
    store = make_store(name, rank, files)
    limit = timedelta(seconds=PATIENT_S)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=len(RANKS), timeout=limit)
    GROUPS[name](rank, files)


def run_groups(folder: Path) -> None:
    """Fork all ranks of all groups from this process and wait for their ends."""
    fork = multiprocessing.get_context("fork")
    members = [(name, rank, RankFiles(folder / name)) for name in GROUPS for rank in RANKS]
    processes = [fork.Process(target=run_rank, args=member) for member in members]
    try:
        for process in processes:
            process.start()
        until_s = time.monotonic() + ALL_GROUPS_LIMIT_S
        for process in processes:
            process.join(max(0.0, until_s - time.monotonic()))
    finally:
        for process in processes:
            process.kill()  # does nothing to one that has ended
            process.join()


@pytest.fixture(scope="module")
def groups(tmp_path_factory: pytest.TempPathFactory) -> dict[str, RankFiles]:
    """What the ranks of each group have told."""
    folder = tmp_path_factory.mktemp("agreement")
    for name in GROUPS:
        write_file(TABLE, folder / name / "same.yaml")
        write_file(OTHER, folder / name / "other.yaml")
    process = multiprocessing.get_context("spawn").Process(target=run_groups, args=(folder,))
    process.start()
    try:
        process.join(2 * ALL_GROUPS_LIMIT_S)
    finally:
        process.kill()
        process.join()
    return {name: RankFiles(folder / name) for name in GROUPS}


# --- the tests -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scene", ["same", "same again", "same after all", "all after groups"])
def test_ranks_that_decided_the_same_agree(groups: dict[str, RankFiles], scene: str) -> None:
    outcomes = groups["tcp"].outcomes(scene)
    assert {rank: outcome.error for rank, outcome in outcomes.items()} == dict.fromkeys(RANKS, "")
    assert all(outcome.elapsed_s < PATIENT_S / 2 for outcome in outcomes.values())


def the_error(outcomes: dict[int, Outcome], error: str, ranks: Iterable[int] = RANKS) -> list[str]:
    """The lines of the error that exactly these ranks raised, with the same message on all of them."""
    assert {rank: outcome.error for rank, outcome in outcomes.items()} == dict.fromkeys(ranks, error)
    (message,) = {outcome.message for outcome in outcomes.values()}
    return [line.strip() for line in message.splitlines()]


def test_another_table_is_named_with_the_ranks_and_the_first_layers(groups: dict[str, RankFiles]) -> None:
    _, who, table, file, *layers = the_error(groups["tcp"].outcomes("another table"), "RanksDisagreeError")
    assert who == "rank 0, 2 against rank 1:"
    assert re.fullmatch(r"table: sha256 \w{12} against sha256 \w{12}", table)
    assert re.fullmatch(r"file: \S+/same\.yaml against \S+/other\.yaml", file)
    assert layers == [f"layers.{i}.w2: float8 against bf16" for i in range(MAX_NAMED)] + ["and 3 more layers"]


def test_other_tokens_are_named_even_if_they_change_no_decision(groups: dict[str, RankFiles]) -> None:
    _, *lines = the_error(groups["tcp"].outcomes("other tokens"), "RanksDisagreeError")
    assert lines == ["rank 0, 1 against rank 2:", f"tokens: {TOKENS} against {2 * TOKENS}"]


def test_layers_that_only_some_ranks_have_are_named(groups: dict[str, RankFiles]) -> None:
    _, who, *layers = the_error(groups["tcp"].outcomes("other names"), "RanksDisagreeError")
    assert who == "rank 0 against rank 1, 2:"
    assert layers[0] == "blocks.0.w1: float8 against not asked"
    assert layers[MAX_NAMED:] == [f"and {4 * BLOCKS - MAX_NAMED} more layers"]


def test_every_opinion_is_compared_with_the_first(groups: dict[str, RankFiles]) -> None:
    lines = the_error(groups["tcp"].outcomes("three opinions"), "RanksDisagreeError")
    assert [line for line in lines if line.startswith("rank")] == ["rank 0 against rank 1:", "rank 0 against rank 2:"]


def test_a_group_compares_only_its_own_ranks(groups: dict[str, RankFiles]) -> None:
    agreed = groups["tcp"].outcomes("group that agrees")
    assert {rank: outcome.error for rank, outcome in agreed.items()} == {0: "", 1: ""}
    lines = the_error(groups["tcp"].outcomes("group that does not"), "RanksDisagreeError", (1, 2))
    assert lines[1] == "rank 1 against rank 2:"


def test_a_dead_rank_is_named_in_time(groups: dict[str, RankFiles]) -> None:
    outcomes = groups["tcp"].outcomes("rank 2 is dead")
    assert the_error(outcomes, "RanksMissingError", (0, 1)) == [f"rank 2 did not answer within {IMPATIENT_S:g} s"]
    assert all(IMPATIENT_S <= outcome.elapsed_s < PATIENT_S / 2 for outcome in outcomes.values())


@pytest.mark.parametrize("scene", ["rank 0 dies", "rank 0 is dead"])
def test_the_death_of_the_rank_that_keeps_the_store_ends_the_waiting(groups: dict[str, RankFiles], scene: str) -> None:
    outcomes = groups["tcp"].outcomes(scene)
    (line, *_) = the_error(outcomes, "RanksMissingError", (1,))
    assert "store does not answer" in line
    assert outcomes[1].elapsed_s < PATIENT_S / 2


def test_a_store_in_a_file_serves_as_well(groups: dict[str, RankFiles]) -> None:
    files = groups["file"]
    assert {rank: outcome.error for rank, outcome in files.outcomes("same").items()} == dict.fromkeys(RANKS, "")
    assert the_error(files.outcomes("another table"), "RanksDisagreeError")[1] == "rank 0, 2 against rank 1:"
    lines = the_error(files.outcomes("rank 0 is dead"), "RanksMissingError", (1, 2))
    assert lines == [f"rank 0 did not answer within {IMPATIENT_S:g} s"]


def test_all_ranks_know_of_a_difference_before_it_ends_one(groups: dict[str, RankFiles]) -> None:
    the_error(groups["error"].outcomes("another table"), "RanksDisagreeError")


def test_without_a_process_group_it_says_what_to_call_first(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="init_process_group"):
        asked(write_file(TABLE, tmp_path / "rowwise.yaml")).agree()


def test_a_rank_that_comes_late_does_not_believe_that_all_agree(groups: dict[str, RankFiles]) -> None:
    outcomes = groups["late"].outcomes("late")
    assert [outcomes[rank].error for rank in RANKS] == ["RanksMissingError"] * 3
    assert outcomes[0].message == f"rank 2 did not answer within {IMPATIENT_S:g} s"
    assert outcomes[2].message.startswith("rank 0, 1 gave up before this rank answered")


def test_nothing_decided_is_nothing_to_agree_on(tmp_path: Path) -> None:
    path = write_file(TABLE, tmp_path / "t.yaml")
    with pytest.raises(InputError, match=r"^agree: nothing is decided yet; call check\(model\) first$"):
        auto_filter("rowwise", tokens=TOKENS, tables=path).agree()
