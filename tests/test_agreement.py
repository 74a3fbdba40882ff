"""Ranks compare their decisions: real processes over gloo, of which some differ, some are stopped, some are killed.

Importing torch takes longer than anything that the ranks do. So one process imports it and forks all ranks, and the
groups of ranks run at the same time. Each rank lives through several scenes and leaves a file about each. Every wait
has a limit, and a process that is still alive after `ALL_GROUPS_LIMIT_S` is killed. `test_rank_exchange.py` has more
cases of ranks that are out of step, as threads.
"""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import os
import re
import signal
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeAlias

import msgspec
import pytest
import torch.distributed as dist
from builders import make_point, make_table, write_file
from plans import make_plan

from fp8gate import AutoFilter, Parallel, auto_filter
from fp8gate.filter import layer_filter as filter_module
from fp8gate.filter.contract.errors import InputError
from fp8gate.filter.contract.table import Table
from fp8gate.filter.ranks.agreement import MAX_NAMED, MAX_TIMEOUT_S, differences
from fp8gate.filter.ranks.rank_exchange import READ_S, RankExchange

TOKENS = 32
SURE, CLOSE = (64, 128), (128, 64)  # (in_features, out_features)
TABLE = make_table(make_point(TOKENS, *SURE, 1.5), make_point(TOKENS, *CLOSE, 1.2))
OTHER = make_table(make_point(TOKENS, *SURE, 1.5), make_point(TOKENS, *CLOSE, 0.8))
BLOCKS = MAX_NAMED + 3  # each has one layer that the tables disagree on

RANKS = range(3)
PATIENT_S = 60.0  # the limit for what must happen
IMPATIENT_S = 1.5  # the timeout of ranks that wait for one that does not answer
LATEST_S = IMPATIENT_S + 5.0  # when all of them have ended, whatever the others do
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

    def pid(self, rank: int) -> int:
        self.wait_for("pid", rank)
        return int((self.folder / "pid" / str(rank)).read_text())

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


def meet(files: RankFiles, rank: int, *ranks: int, scene: str = "meeting") -> None:
    """Wait for these ranks, so that a timeout which begins now finds them there."""
    files.tell(scene, rank)
    files.wait_for(scene, *ranks)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def stop() -> None:
    """Another rank lets it go on."""
    os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep(0.1)  # a signal takes a moment to reach all threads


def sleep_long() -> None:
    time.sleep(0.3)  # far longer than rank 0 takes from here to its end


@contextlib.contextmanager
def stopping_before(method: str, act: Callable[[], None] | None = stop) -> Iterator[None]:
    """`act` happens in this process before the exchange takes this step."""
    original = getattr(RankExchange, method)

    def acting(exchange: RankExchange, *args: Any) -> Any:
        if act:
            act()
        return original(exchange, *args)

    setattr(RankExchange, method, acting)
    yield
    setattr(RankExchange, method, original)


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


def scenes_of_ranks_out_of_step(rank: int, files: RankFiles) -> None:
    """Rank 2 answers when the others have given up. Then rank 1 leaves out calls, as if an error had ended them."""
    same, other = asked(files.folder / "same.yaml"), asked(files.folder / "other.yaml")
    if rank == 2:
        files.wait_for("late", 0, 1)
    else:
        meet(files, rank, 0, 1)
    files.tell("late", rank, agreeing(same, timeout_s=IMPATIENT_S))
    files.wait_for("late", 2)
    files.tell("same after the late one", rank, agreeing(same))
    if rank == 1:
        files.wait_for("rank 1 is elsewhere", 0, 2)
    else:
        files.tell("rank 1 is elsewhere", rank, agreeing(same, timeout_s=IMPATIENT_S))
    files.tell("same after it is back", rank, agreeing(same))
    files.tell("another call", rank, agreeing(other if rank == 1 else same))
    files.tell("same after another call", rank, agreeing(same))


def scenes_of_ranks_that_stop_or_die_half_way(rank: int, files: RankFiles) -> None:
    """Rank 2 is stopped before it answers, then stopped and at last killed when it has answered."""
    same = asked(files.folder / "same.yaml")
    files.tell("pid", rank, str(os.getpid()).encode())
    for scene in ("stopped before", "stopped half way"):
        if rank == 2:
            with stopping_before("join" if scene == "stopped before" else "finish"):
                files.tell(f"{scene}, itself", 2, agreeing(same, timeout_s=IMPATIENT_S))
        else:
            meet(files, rank, 0, 1, scene=f"meeting, {scene}")
            files.tell(scene, rank, agreeing(same, timeout_s=IMPATIENT_S))
            files.wait_for(scene, 0, 1)
            os.kill(files.pid(2), signal.SIGCONT)
        files.wait_for(f"{scene}, itself", 2)
        files.tell(f"same after {scene}", rank, agreeing(same))
    with stopping_before("finish", die if rank == 2 else None):
        files.tell("killed half way", rank, agreeing(same, timeout_s=IMPATIENT_S))


def scenes_of_a_stopped_store(rank: int, files: RankFiles) -> None:
    """Rank 0, in which the store lives, is stopped: while the others wait for it, and before they ask."""
    same, other = asked(files.folder / "same.yaml"), asked(files.folder / "other.yaml")
    files.tell("pid", rank, str(os.getpid()).encode())
    for scene in ("stopped while they wait", "stopped before they ask"):
        if rank == 0:
            files.tell(f"stopping, {scene}", 0)
            if scene == "stopped while they wait":
                files.wait_for(f"asking, {scene}", 1, 2)
                time.sleep(0.3)  # now they wait for an answer
            stop()
        else:
            files.wait_for(f"stopping, {scene}", 0)
            time.sleep(0.0 if scene == "stopped while they wait" else 0.3)  # now rank 0 is stopped
            files.tell(f"asking, {scene}", rank)
            files.tell(scene, rank, agreeing(same, timeout_s=IMPATIENT_S))
            files.wait_for(scene, 1, 2)
            os.kill(files.pid(0), signal.SIGCONT)
        files.tell(f"same after {scene}", rank, agreeing(same))
        files.tell(f"differing after {scene}", rank, agreeing(other if rank == 0 else same))


def scene_of_an_error_that_ends_rank_0(rank: int, files: RankFiles) -> None:
    """Nobody catches the error, so the store is gone as soon as rank 0 knows. The other ranks must be told before."""
    table = "other.yaml" if rank == 2 else "same.yaml"
    wants_float8 = asked(files.folder / table)
    with stopping_before("read_all", sleep_long if rank == 1 else None):  # no other rank waits for what it tells
        files.tell("another table", rank, agreeing(wants_float8))
    if rank == 0:
        die()


# --- what starts and ends them ---------------------------------------------------------------------------------

GROUPS: dict[str, Scenes] = {
    "tcp": scenes_with_a_tcp_store,
    "file": scenes_with_a_file_store,
    "step": scenes_of_ranks_out_of_step,
    "error": scene_of_an_error_that_ends_rank_0,
}
SLOW_GROUPS: dict[str, Scenes] = {
    "rank": scenes_of_ranks_that_stop_or_die_half_way,
    "store": scenes_of_a_stopped_store,
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
    (GROUPS | SLOW_GROUPS)[name](rank, files)


def run_groups(folder: Path, names: Sequence[str]) -> None:
    """Fork all ranks of these groups from this process and wait for their ends."""
    fork = multiprocessing.get_context("fork")
    members = [(name, rank, RankFiles(folder / name)) for name in names for rank in RANKS]
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


def lived_through(folder: Path, names: Sequence[str]) -> dict[str, RankFiles]:
    """What the ranks of each group have told."""
    for name in names:
        write_file(TABLE, folder / name / "same.yaml")
        write_file(OTHER, folder / name / "other.yaml")
    process = multiprocessing.get_context("spawn").Process(target=run_groups, args=(folder, names))
    process.start()
    try:
        process.join(2 * ALL_GROUPS_LIMIT_S)
    finally:
        process.kill()
        process.join()
    return {name: RankFiles(folder / name) for name in names}


@pytest.fixture(scope="module")
def groups(tmp_path_factory: pytest.TempPathFactory) -> dict[str, RankFiles]:
    return lived_through(tmp_path_factory.mktemp("agreement"), list(GROUPS))


@pytest.fixture(scope="module")
def slow_groups(tmp_path_factory: pytest.TempPathFactory) -> dict[str, RankFiles]:
    return lived_through(tmp_path_factory.mktemp("stopped"), list(SLOW_GROUPS))


# --- the tests -------------------------------------------------------------------------------------------------


def require_all_agree(files: RankFiles, scene: str) -> None:
    outcomes = files.outcomes(scene)
    assert {rank: outcome.error for rank, outcome in outcomes.items()} == dict.fromkeys(RANKS, "")
    assert all(outcome.elapsed_s < PATIENT_S / 2 for outcome in outcomes.values())


@pytest.mark.parametrize("scene", ["same", "same again", "same after all", "all after groups"])
def test_ranks_that_decided_the_same_agree(groups: dict[str, RankFiles], scene: str) -> None:
    require_all_agree(groups["tcp"], scene)


def the_error(outcomes: dict[int, Outcome], error: str, ranks: Iterable[int] = RANKS) -> list[str]:
    """The lines of the error that exactly these ranks raised, with the same message on all of them."""
    assert {rank: outcome.error for rank, outcome in outcomes.items()} == dict.fromkeys(ranks, error)
    (message,) = {outcome.message for outcome in outcomes.values()}
    return [line.strip() for line in message.splitlines()]


def test_another_table_is_named_with_the_ranks_and_the_first_layers(groups: dict[str, RankFiles]) -> None:
    _, who, file, table, *layers = the_error(groups["tcp"].outcomes("another table"), "RanksDisagreeError")
    assert who == "rank 0, 2 against rank 1:"
    assert re.fullmatch(r"table: sha256 \w{12} against sha256 \w{12}", table)
    assert re.fullmatch(r"file: \S+/same\.yaml against \S+/other\.yaml", file)
    at = f"at ({TOKENS}, 128, 64)"
    assert layers == [f"layers.{i}.w2: float8 {at} against bf16 {at}" for i in range(MAX_NAMED)] + ["and 3 more"]


def test_other_tokens_are_named_even_if_they_change_no_decision(groups: dict[str, RankFiles]) -> None:
    _, *lines = the_error(groups["tcp"].outcomes("other tokens"), "RanksDisagreeError")
    assert lines[:2] == ["rank 0, 1 against rank 2:", f"tokens: {TOKENS} against {2 * TOKENS}"]
    assert lines[2] == f"layers.0.w1: float8 at ({TOKENS}, 64, 128) against float8 at ({2 * TOKENS}, 64, 128)"


def test_layers_that_only_some_ranks_have_are_named(groups: dict[str, RankFiles]) -> None:
    _, who, *layers = the_error(groups["tcp"].outcomes("other names"), "RanksDisagreeError")
    assert who == "rank 0 against rank 1, 2:"
    assert layers[0] == f"blocks.0.w1: float8 at ({TOKENS}, 64, 128) against not given"
    assert layers[MAX_NAMED:] == [f"and {4 * BLOCKS - MAX_NAMED} more"]


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
    assert all(IMPATIENT_S <= outcome.elapsed_s < LATEST_S for outcome in outcomes.values())


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


def test_a_rank_that_comes_late_does_not_believe_that_all_agree(groups: dict[str, RankFiles]) -> None:
    outcomes = groups["step"].outcomes("late")
    assert [outcomes[rank].error for rank in RANKS] == ["RanksMissingError"] * 3
    assert outcomes[0].message == f"rank 2 did not answer within {IMPATIENT_S:g} s"
    assert outcomes[2].message.startswith(f"rank 0, 1 did not answer within {IMPATIENT_S:g} s; earlier, others gave up")
    assert all(outcome.elapsed_s < LATEST_S for outcome in outcomes.values())
    require_all_agree(groups["step"], "same after the late one")


def test_a_rank_that_left_out_a_call_is_named_and_heard_at_the_next(groups: dict[str, RankFiles]) -> None:
    lines = the_error(groups["step"].outcomes("rank 1 is elsewhere"), "RanksMissingError", (0, 2))
    assert lines == [f"rank 1 did not answer within {IMPATIENT_S:g} s"]
    require_all_agree(groups["step"], "same after it is back")
    assert the_error(groups["step"].outcomes("another call"), "RanksDisagreeError")[1] == "rank 0, 2 against rank 1:"
    require_all_agree(groups["step"], "same after another call")


# --- ranks that are stopped ------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("scene", "complaint"),
    [
        ("stopped before", f"rank 2 did not answer within {IMPATIENT_S:g} s"),
        ("stopped half way", f"rank 2 answered, but did not read the other answers within {IMPATIENT_S + READ_S:g} s"),
        ("killed half way", f"rank 2 answered, but did not read the other answers within {IMPATIENT_S + READ_S:g} s"),
    ],
)
def test_a_rank_that_is_stopped_or_killed_half_way_is_named_in_time(
    slow_groups: dict[str, RankFiles], scene: str, complaint: str
) -> None:
    outcomes = slow_groups["rank"].outcomes(scene)
    assert the_error(outcomes, "RanksMissingError", (0, 1)) == [complaint]
    assert all(IMPATIENT_S <= outcome.elapsed_s < LATEST_S for outcome in outcomes.values())
    if scene != "killed half way":
        require_all_agree(slow_groups["rank"], f"same after {scene}")


@pytest.mark.slow
@pytest.mark.parametrize("scene", ["stopped while they wait", "stopped before they ask"])
def test_a_stopped_store_ends_the_waiting_in_time(slow_groups: dict[str, RankFiles], scene: str) -> None:
    outcomes = slow_groups["store"].outcomes(scene)
    assert the_error(outcomes, "RanksMissingError", (1, 2)) == [
        f"the rank that keeps torch.distributed's store does not answer within {IMPATIENT_S:g} s"
    ]
    assert all(IMPATIENT_S <= outcome.elapsed_s < LATEST_S for outcome in outcomes.values())
    require_all_agree(slow_groups["store"], f"same after {scene}")
    lines = the_error(slow_groups["store"].outcomes(f"differing after {scene}"), "RanksDisagreeError")
    assert lines[1] == "rank 0 against rank 1, 2:"


# --- what is compared ------------------------------------------------------------------------------------------

W1, W2, HEAD = "layers.0.w1", "layers.0.w2", "lm_head"
AT = f"at ({TOKENS}, 64, 128)"
SHA = r"sha256 \w{12}"


@pytest.fixture
def compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """What `agree` names if two ranks differ in the arguments of their filters."""
    told: list[dict[str, Any]] = []
    monkeypatch.setattr(filter_module, "require_agreement", lambda decided, *_: told.append(decided))

    def tell(layers: Sequence[str] = (W1,), table: Table = TABLE, **arguments: Any) -> None:
        path = write_file(table, tmp_path / f"{len(told)}.yaml")
        made = {"recipe": table.recipe, "tokens": TOKENS, "tables": path, "on_outside": "ignore", **arguments}
        wants_float8 = auto_filter(**made)
        wants_float8.check([(fqn, Linear(*SURE)) for fqn in layers])
        wants_float8.agree()

    def compare(left: dict[str, Any], right: dict[str, Any]) -> list[str]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tell(**left)
            tell(**right)
        return list(differences(*told))

    return compare


def planned(**fields: Any) -> dict[str, Any]:
    """A plan for other layers than those asked about, so that it changes no decision."""
    return {"plan": make_plan(tokens=TOKENS, **fields)}


def whole(tp: int, **more: str) -> dict[str, Any]:
    return {"parallel": Parallel(tp=tp, plan={"layers.*.w1": "replicated", **more})}


@pytest.mark.parametrize(
    ("left", "right", "named"),
    [
        ({}, {"table": make_table(make_point(TOKENS, *SURE, 1.6))}, [f"table: {SHA} against {SHA}"]),
        (
            {},
            {"table": msgspec.structs.replace(TABLE, recipe="tensorwise")},
            [f"table: {SHA} against {SHA}", "recipe: rowwise against tensorwise"],
        ),
        (
            {},
            {"tokens": 2 * TOKENS, "parallel": Parallel(cp=2)},
            [f"tokens: {TOKENS} against {2 * TOKENS}", "parallel.cp: 1 against 2"],
        ),
        ({}, {"min_speedup": 1.1}, [r"min_speedup: 1\.05x or, for a shared input, 1\.00x against 1\.1"]),
        ({}, {"min_speedup": 1.05}, [r"min_speedup: 1\.05x or, for a shared input, 1\.00x against 1\.05"]),
        ({}, {"lookup": "nearest"}, ["lookup: interpolate against nearest"]),
        ({}, {"filter_fqns": ["head"]}, [r"filter_fqns: \[\] against \['head'\]"]),
        ({}, planned(), [f"plan: none against {SHA}"]),
        (planned(), planned(control=0.997), [f"plan: {SHA} against {SHA}"]),
        (whole(2), whole(4), [r"parallel\.tp: 2 against 4"]),
        (whole(2), whole(2, norm="sequence"), [r"parallel\.plan\[1\]: not given against norm is sequence"]),
        ({"layers": [HEAD]}, {"layers": [HEAD], "recompute": "full"}, ["recompute: none against full"]),
        (
            {"recompute": lambda _: True},
            {"recompute": lambda _: False},
            [re.escape(f"{W1}: float8 {AT}, recomputed against float8 {AT}")],
        ),
        ({}, {"layers": [W1, W2]}, [re.escape(f"{W2}: not given against float8 {AT}")]),
        ({}, {"filter_fqns": [W1]}, [r"filter_fqns: \[\] against \['layers\.0\.w1'\]", f"{W1}: float8 .* bf16 .*"]),
    ],
    ids=[
        *("table", "recipe", "tokens, cp", "min_speedup", "the default", "lookup", "filter_fqns", "a plan"),
        *("another plan", "tp", "patterns", "recompute", "predicates", "layers", "answers"),
    ],
)
def test_all_that_decides_is_compared(
    compared: Callable[..., list[str]], left: dict[str, Any], right: dict[str, Any], named: list[str]
) -> None:
    found = compared(left, right)
    assert len(found) == len(named), found
    for line, pattern in zip(found, named, strict=True):
        assert re.fullmatch(pattern, line), line


def test_rows_and_sizes_are_compared_though_the_answer_is_the_same(compared: Callable[..., list[str]]) -> None:
    (rows,) = compared({"parallel": Parallel(cp=1)}, {"parallel": Parallel(cp=2)})[1:]
    assert rows == f"{W1}: float8 at (32, 64, 128) against float8 at (16, 64, 128)"


def test_the_same_arguments_differ_in_nothing(compared: Callable[..., list[str]]) -> None:
    same = {**planned(), **whole(2), "recompute": "full", "filter_fqns": ["b", "a"]}
    assert compared(same, {**same, "filter_fqns": ["a", "b", "a"]}) == []


def test_a_topic_of_one_rank_only_is_named() -> None:
    """The ranks may run different releases."""
    assert list(differences({"layers": {}}, {"layers": {}, "colour": "red"})) == ["colour: not given against red"]


# --- what is refused -------------------------------------------------------------------------------------------


def test_without_a_process_group_it_says_what_to_call_first(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="init_process_group"):
        asked(write_file(TABLE, tmp_path / "rowwise.yaml")).agree()


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[AutoFilter]:
    """The filter of a group with a single rank."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield asked(write_file(TABLE, tmp_path / "rowwise.yaml"))
    dist.destroy_process_group()


@pytest.mark.parametrize(
    "timeout_s", [-1, 0, 0.0, math.nan, math.inf, -math.inf, MAX_TIMEOUT_S + 1, 10**400, True, "5", None]
)
def test_a_timeout_out_of_range_is_refused(alone: AutoFilter, timeout_s: Any) -> None:
    with pytest.raises(InputError, match=r"^timeout_s: expected seconds above 0 and at most 604800; got "):
        alone.agree(timeout_s=timeout_s)


@pytest.mark.parametrize("timeout_s", [0.5, 1, MAX_TIMEOUT_S])
def test_a_timeout_in_range_is_taken(alone: AutoFilter, timeout_s: float) -> None:
    alone.agree(timeout_s=timeout_s)


def test_nothing_decided_is_nothing_to_agree_on(tmp_path: Path) -> None:
    path = write_file(TABLE, tmp_path / "t.yaml")
    with pytest.raises(InputError, match=r"^agree: nothing is decided yet; call check\(model\) first$"):
        auto_filter("rowwise", tokens=TOKENS, tables=path).agree()
