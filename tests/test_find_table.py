"""The places where tables are searched, their order, and the device that a table is for."""

from __future__ import annotations

import os

import msgspec
import pytest
from builders import DEVICE, make_point, make_table, write_file, write_folder

from fp8gate import auto_filter
from fp8gate.filter.contract import find_table as module
from fp8gate.filter.contract.devices import cpu_name, device_slug
from fp8gate.filter.contract.errors import InputError
from fp8gate.filter.contract.find_table import ENVIRONMENT, find_table, measured_devices, packaged_thresholds
from fp8gate.filter.contract.table import TableError


def table_of(device: str = "NVIDIA H200", recipe: str = "rowwise", speedup: float = 1.5):
    return make_table(
        make_point(16, 16, 16, speedup),
        recipe=recipe,
        device=msgspec.structs.replace(DEVICE, name=device),
    )


@pytest.fixture(autouse=True)
def packaged(tmp_path, monkeypatch):
    """FP8GATE_THRESHOLDS is not set, and the packaged table says 3.0x."""
    folder = write_folder(tmp_path / "packaged", table_of(speedup=3.0))
    monkeypatch.delenv(ENVIRONMENT, raising=False)
    monkeypatch.setattr(module, "packaged_thresholds", lambda: folder)
    return folder


def speedup_found(**places):
    return find_table("rowwise", device="NVIDIA H200", **places)[0].points[0].speedup


# --- order -----------------------------------------------------------------------------------------------------


def test_argument_beats_environment_beats_packaged(tmp_path, monkeypatch):
    argument = write_folder(tmp_path / "argument", table_of(speedup=1.0))
    environment = write_folder(tmp_path / "environment", table_of(speedup=2.0))
    assert speedup_found() == 3.0
    monkeypatch.setenv(ENVIRONMENT, str(environment))
    assert speedup_found() == 2.0
    assert speedup_found(tables=argument) == 1.0
    assert speedup_found(tables=str(argument)) == 1.0


def test_environment_may_name_a_file(tmp_path, monkeypatch):
    path = write_file(table_of(speedup=2.0), tmp_path / "any name.yaml")
    monkeypatch.setenv(ENVIRONMENT, str(path))
    assert find_table("rowwise") == (table_of(speedup=2.0), path)


def test_argument_that_lacks_the_table_is_not_passed_over(tmp_path):
    folder = write_folder(tmp_path / "argument", table_of("NVIDIA B200"))
    with pytest.raises(TableError, match="no rowwise table for 'NVIDIA H200'"):
        find_table("rowwise", device="NVIDIA H200", tables=folder)


def test_missing_place_is_named(tmp_path):
    with pytest.raises(TableError, match=r"nowhere: cannot be read: .*No such file"):
        find_table("rowwise", device="NVIDIA H200", tables=tmp_path / "nowhere")


@pytest.mark.parametrize("by", ["argument", "environment"])
@pytest.mark.parametrize("kind", ["pipe", "device", "too long", "too many links"])
def test_what_is_neither_file_nor_folder_is_refused_at_once(tmp_path, monkeypatch, kind, by):
    place = {"device": "/dev/zero", "too long": f"/{'a' * 5000}"}.get(kind, str(tmp_path / "place"))
    if kind == "pipe":
        os.mkfifo(place)
    elif kind == "too many links":
        os.symlink(place, place)
    if by == "environment":
        monkeypatch.setenv(ENVIRONMENT, place)
    with pytest.raises(
        TableError, match=r"^/.*cannot be read: (expected a regular file|File name too|Too many levels)"
    ):
        find_table("rowwise", device="NVIDIA H200", tables=place if by == "argument" else None)


@pytest.mark.parametrize("device", ["A" * 300, "A" * 5000])
def test_a_device_name_that_no_folder_can_have_is_refused(packaged, device):
    with pytest.raises(TableError, match="no rowwise table for 'AAA"):
        find_table("rowwise", device=device)


def test_packaged_tables_are_in_the_package():
    assert packaged_thresholds().parts[-2:] == ("fp8gate", "thresholds")


def test_path_found_is_given_too(packaged):
    assert find_table("rowwise", device="NVIDIA H200")[1] == packaged / "nvidia-h200" / "rowwise.yaml"


# --- device ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["NVIDIA H200", "nvidia h200", "NVIDIA  H200 ", "nvidia-h200", "Nvidia_H200"])
def test_device_name_matches_after_normalising(name, packaged):
    table, _ = find_table("rowwise", device=name)
    assert table.device.name == "NVIDIA H200"
    file = packaged / "nvidia-h200" / "rowwise.yaml"
    assert find_table("rowwise", device=name, tables=file)[1] == file


@pytest.mark.parametrize("name", ["H200", "NVIDIA H20", "NVIDIA H200 NVL", "NVIDIAH200", "NVIDIA H100"])
def test_device_name_is_never_guessed(name, packaged):
    with pytest.raises(TableError, match=f"no rowwise table for '{name}'"):
        find_table("rowwise", device=name)
    with pytest.raises(TableError, match=rf"\$\.device\.name: expected {name}, found NVIDIA H200"):
        find_table("rowwise", device=name, tables=packaged / "nvidia-h200" / "rowwise.yaml")


@pytest.mark.parametrize(
    ("name", "slug"), [("NVIDIA H200", "nvidia-h200"), ("CPU Intel(R) Xeon(R) @ 2.0GHz", "cpu-intel-r-xeon-r-2-0ghz")]
)
def test_slug_has_only_letters_digits_and_dashes(name, slug):
    assert device_slug(name) == slug


@pytest.mark.parametrize("name", ["", " ", "../.."])
def test_name_without_letters_is_refused(name):
    with pytest.raises(InputError, match="device: expected a name such as 'NVIDIA H200', got"):
        device_slug(name)


def test_unknown_device_error_lists_devices_and_the_command(tmp_path):
    folder = write_folder(tmp_path / "two", table_of("NVIDIA H200"), table_of("NVIDIA B200"))
    write_folder(folder, table_of("NVIDIA L40S", recipe="tensorwise"))  # has no rowwise table
    with pytest.raises(TableError) as error:
        find_table("rowwise", device="NVIDIA H100", tables=folder)
    assert str(error.value) == (
        f"{folder}: no rowwise table for 'NVIDIA H100' (nvidia-h100/rowwise.yaml); devices there: NVIDIA B200, "
        "NVIDIA H200. To measure this device, run on it: fp8gate calibrate --recipes rowwise --out DIR; "
        "then pass tables=DIR"
    )


def test_folder_without_tables_says_none(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(TableError, match=r"devices there: none\. To measure"):
        find_table("rowwise", device="NVIDIA H200", tables=tmp_path / "empty")


def test_a_broken_table_of_another_device_hides_nothing(tmp_path):
    folder = write_folder(tmp_path / "t", table_of("NVIDIA H200"), table_of("NVIDIA B200"))
    (folder / "nvidia-b200" / "rowwise.yaml").write_text("schema: 1\n")
    (folder / "nvidia-a100").mkdir()
    os.mkfifo(folder / "nvidia-a100" / "rowwise.yaml")
    assert find_table("rowwise", device="NVIDIA H200", tables=folder)[0].device.name == "NVIDIA H200"
    with pytest.raises(TableError) as error:
        find_table("rowwise", device="NVIDIA H100", tables=folder)
    assert (
        "no rowwise table for 'NVIDIA H100' (nvidia-h100/rowwise.yaml); devices there: nvidia-a100/rowwise.yaml (no "
        "valid table), nvidia-b200/rowwise.yaml (no valid table), NVIDIA H200. To measure"
    ) in str(error.value)


def test_of_many_devices_the_first_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MAX_NAMED", 2)
    folder = write_folder(tmp_path / "t", *(table_of(f"GPU {letter}") for letter in "DBCA"))
    assert measured_devices(folder, "rowwise") == ["GPU A", "GPU B", "and 2 more"]


def test_measured_devices_are_those_with_the_recipe(tmp_path):
    folder = write_folder(tmp_path / "t", table_of("NVIDIA H200"), table_of("NVIDIA B200", recipe="tensorwise"))
    assert measured_devices(folder, "rowwise") == ["NVIDIA H200"]
    assert measured_devices(folder, "tensorwise") == ["NVIDIA B200"]
    assert measured_devices(folder, "rowwise_with_gw_hp") == []


def test_without_a_device_a_folder_is_asked_for_the_local_one(monkeypatch):
    monkeypatch.setattr(module, "local_device_name", lambda: "NVIDIA H200")
    assert find_table("rowwise")[0].points[0].speedup == 3.0
    monkeypatch.setattr(module, "local_device_name", lambda: "NVIDIA H100")
    with pytest.raises(TableError, match="no rowwise table for 'NVIDIA H100'"):
        find_table("rowwise")


def test_a_device_found_here_is_not_taken_for_another_with_the_same_slug(tmp_path, monkeypatch):
    """A name that somebody typed may be spelled otherwise; one that the driver gave is another device's."""
    folder = write_folder(tmp_path / "t", table_of("CPU X 1"))
    assert find_table("rowwise", device="CPU X(1)", tables=folder)[0].device.name == "CPU X 1"
    monkeypatch.setattr(module, "local_device_name", lambda: "CPU X(1)")
    with pytest.raises(
        TableError, match=r"rowwise\.yaml: \$\.device\.name: expected CPU X\(1\), found CPU X 1, another"
    ):
        find_table("rowwise", tables=folder)


def test_without_a_device_a_file_stands_for_its_own(monkeypatch, packaged):
    monkeypatch.setattr(module, "local_device_name", lambda: pytest.fail("asked for the local device"))
    assert find_table("rowwise", tables=packaged / "nvidia-h200" / "rowwise.yaml")[0].device == DEVICE


def test_cpu_is_called_a_cpu():
    assert cpu_name().startswith("CPU ")
    assert len(cpu_name()) > len("CPU ")


# --- what the file itself says ---------------------------------------------------------------------------------


def test_file_of_another_recipe_is_refused(tmp_path):
    path = write_file(table_of(recipe="tensorwise"), tmp_path / "t.yaml")
    assert find_table("tensorwise", tables=path)[1] == path
    with pytest.raises(TableError, match=r"t\.yaml: \$\.recipe: expected rowwise, found tensorwise"):
        find_table("rowwise", tables=path)


def test_misplaced_file_is_refused(tmp_path):
    """The folder of one device has the table of another: renaming a folder does not measure a device."""
    path = write_file(table_of("NVIDIA H200"), tmp_path / "t" / "nvidia-h100" / "rowwise.yaml")
    with pytest.raises(TableError) as error:
        find_table("rowwise", device="NVIDIA H100", tables=tmp_path / "t")
    assert str(error.value) == f"{path}: $.device.name: expected NVIDIA H100, found NVIDIA H200"


def test_filter_uses_the_same_places(tmp_path, monkeypatch):
    assert auto_filter("rowwise", tokens=16, device="nvidia h200").table.points[0].speedup == 3.0
    monkeypatch.setenv(ENVIRONMENT, str(write_folder(tmp_path / "environment", table_of(speedup=2.0))))
    assert auto_filter("rowwise", tokens=16, device="nvidia h200").table.points[0].speedup == 2.0
    with pytest.raises(TableError, match="no rowwise table for 'H200'"):
        auto_filter("rowwise", tokens=16, device="H200")
