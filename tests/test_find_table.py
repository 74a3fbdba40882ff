"""The places where tables are searched, their order, and the device that a table is for."""

from __future__ import annotations

import os

import msgspec
import pytest
from builders import DEVICE, make_point, make_table, write_file, write_folder

from fp8gate import auto_filter
from fp8gate.filter.contract.devices import cpu_name, device_slug
from fp8gate.filter.contract.errors import InputError
from fp8gate.filter.contract.recipes import Variant
from fp8gate.filter.contract.table import TableError
from fp8gate.filter.locate import find_table as module
from fp8gate.filter.locate import places as places_module
from fp8gate.filter.locate.device_names import match_device
from fp8gate.filter.locate.find_table import MisfiledError, find_table, measured_devices, table_files
from fp8gate.filter.locate.places import ENVIRONMENT, default_out, packaged_thresholds, places, user_thresholds


def table_of(device: str = "NVIDIA H200", recipe: str = "rowwise", speedup: float = 1.5):
    return make_table(
        make_point(16, 16, 16, speedup),
        recipe=recipe,
        device=msgspec.structs.replace(DEVICE, name=device),
    )


@pytest.fixture(autouse=True)
def packaged(tmp_path, monkeypatch):
    """No other place is there, and the packaged table says 3.0x."""
    folder = write_folder(tmp_path / "packaged", table_of(speedup=3.0))
    monkeypatch.delenv(ENVIRONMENT, raising=False)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.setattr(places_module, "packaged_thresholds", lambda: folder)
    monkeypatch.chdir(tmp_path)
    return folder


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A checkout with a table that says 5.0x. The working directory is a folder in it."""
    for name in ("calibrate", "filter/deep"):
        (tmp_path / "checkout" / name).mkdir(parents=True)
    (tmp_path / "checkout" / "pyproject.toml").touch()
    monkeypatch.chdir(tmp_path / "checkout" / "filter" / "deep")
    return write_folder(tmp_path / "checkout" / "thresholds", table_of(speedup=5.0))


@pytest.fixture
def own(tmp_path):
    """The user's folder, with a table that says 4.0x."""
    return write_folder(tmp_path / "data" / "fp8gate" / "thresholds", table_of(speedup=4.0))


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


def test_a_checkouts_tables_beat_the_users_and_these_the_packaged(own, checkout, tmp_path, monkeypatch):
    assert speedup_found() == 5.0
    monkeypatch.chdir(tmp_path)
    assert speedup_found() == 4.0
    assert [place.what for place in places()] == ["your own", "packaged"]


def test_the_next_place_is_searched_for_what_the_first_lacks(own, checkout, packaged):
    write_folder(packaged, table_of("NVIDIA B200", speedup=7.0))
    assert find_table("rowwise", device="NVIDIA B200")[0].points[0].speedup == 7.0
    write_folder(own, table_of("NVIDIA B200", speedup=6.0))
    assert find_table("rowwise", device="b200")[0].points[0].speedup == 6.0


def test_a_checkouts_own_package_is_one_place(checkout, monkeypatch):
    monkeypatch.setattr(places_module, "packaged_thresholds", lambda: checkout)
    assert [place.what for place in places()] == ["this checkout"]


def test_what_is_written_by_default_is_searched(checkout, tmp_path, monkeypatch):
    assert default_out() == places()[0].path == checkout
    monkeypatch.chdir(tmp_path)
    assert default_out() == user_thresholds() == tmp_path / "data" / "fp8gate" / "thresholds"
    write_folder(default_out(), table_of(speedup=6.0))
    assert speedup_found() == 6.0
    monkeypatch.setenv(ENVIRONMENT, str(tmp_path / "environment"))
    assert default_out() == places()[0].path == tmp_path / "environment"


def test_a_single_devices_folder_cannot_be_written_to_by_default(packaged, monkeypatch):
    for single in (packaged / "nvidia-h200", packaged / "nvidia-h200" / "rowwise.yaml"):
        monkeypatch.setenv(ENVIRONMENT, str(single))
        assert speedup_found() == 3.0
        with pytest.raises(InputError, match=rf"^{ENVIRONMENT}: expected a folder of device folders to write to"):
            default_out()


@pytest.mark.parametrize("by", ["argument", "environment"])
def test_a_devices_folder_stands_for_its_own_device(packaged, monkeypatch, by):
    monkeypatch.setattr(module, "local_device_name", lambda: pytest.fail("asked for the local device"))
    folder = packaged / "nvidia-h200"
    monkeypatch.setenv(ENVIRONMENT, str(folder if by == "environment" else "nowhere"))
    tables = folder if by == "argument" else None
    assert find_table("rowwise", tables=tables)[1] == folder / "rowwise.yaml"
    assert find_table("rowwise", tables=tables, device="h200")[1] == folder / "rowwise.yaml"
    with pytest.raises(TableError, match=r"\$\.device\.name: expected H100, found NVIDIA H200"):
        find_table("rowwise", tables=tables, device="H100")
    with pytest.raises(TableError, match=r"nvidia-h200: no tensorwise table among this device's\. To measure"):
        find_table("tensorwise", tables=tables)


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


@pytest.mark.parametrize("name", ["H200", "h200", "NVIDIAH200", "h200 nvidia"])
def test_device_name_matches_as_people_write_it(name, packaged):
    file = packaged / "nvidia-h200" / "rowwise.yaml"
    assert find_table("rowwise", device=name)[1] == file
    assert find_table("rowwise", device=name, tables=packaged)[1] == file
    assert find_table("rowwise", device=name, tables=file)[1] == file


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("NVIDIA H20", None),
        ("80gb", None),
        ("NVIDIA H200 NVL", "nvidia-h200"),
        ("NVIDIA", None),
        ("NVIDIA L40S", None),
        ("H20", None),
    ],
)
def test_device_name_is_never_guessed(name, meant, packaged):
    with pytest.raises(TableError, match=f"no rowwise table for '{name}'") as caught:
        find_table("rowwise", device=name)
    assert (f"Did you mean {meant}?" in str(caught.value)) == (meant is not None)
    with pytest.raises(TableError, match=rf"\$\.device\.name: expected {name}, found NVIDIA H200"):
        find_table("rowwise", device=name, tables=packaged / "nvidia-h200" / "rowwise.yaml")


def test_a_name_that_fits_two_devices_is_no_guess_between_them(packaged):
    write_folder(packaged, table_of("NVIDIA H100 80GB HBM3"), table_of("NVIDIA H100 PCIe", speedup=9.0))
    with pytest.raises(InputError) as caught:
        find_table("rowwise", device="H100")
    both = "nvidia-h100-80gb-hbm3, nvidia-h100-pcie"
    assert str(caught.value) == f"device: 'H100' fits several measured devices, {both}; name one of them"
    assert find_table("rowwise", device="h100 pcie")[0].points[0].speedup == 9.0


def test_all_words_of_a_name_count_before_some(packaged):
    write_folder(packaged, table_of("NVIDIA H200 NVL", speedup=9.0))
    assert find_table("rowwise", device="H200")[0].points[0].speedup == 3.0
    assert find_table("rowwise", device="H200 NVL")[0].points[0].speedup == 9.0


def test_a_working_directory_that_was_removed_is_no_checkout(tmp_path, monkeypatch):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert speedup_found() == 3.0


def test_a_home_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_folder(tmp_path / "mine", table_of(speedup=2.0))
    monkeypatch.setenv(ENVIRONMENT, "~/mine")
    assert speedup_found() == 2.0
    assert default_out() == tmp_path / "mine"


def test_an_equal_name_counts_before_a_part_of_one():
    assert match_device("NVIDIA H100", ["nvidia-h100", "nvidia-h100-pcie"]) == "nvidia-h100"
    assert match_device("nvidiah100", ["nvidia-h100", "nvidia-h100-pcie"]) == "nvidia-h100"
    assert match_device("h100 pcie", ["nvidia-h100", "nvidia-h100-pcie"]) == "nvidia-h100-pcie"
    assert match_device("100", ["nvidia-h100"]) is None


def test_a_name_that_the_driver_gave_is_not_a_part_of_one(monkeypatch):
    monkeypatch.setattr(module, "local_device_name", lambda: "H200")
    with pytest.raises(TableError, match="no rowwise table for 'H200'"):
        find_table("rowwise")


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
        f"device: no rowwise table for 'NVIDIA H100' in {folder}; measured devices: NVIDIA B200, NVIDIA H200. "
        "To ask about one of these, name it: --device, or device= in Python. "
        "To measure this device, run on it: fp8gate calibrate --recipes rowwise"
    )


def test_folder_without_tables_says_none(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(TableError, match=r"measured devices: none\. To measure"):
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
        f"no rowwise table for 'NVIDIA H100' in {folder}; measured devices: nvidia-a100/rowwise.yaml (no valid table), "
        "nvidia-b200/rowwise.yaml (no valid table), NVIDIA H200. "
    ) in str(error.value)


def test_of_many_devices_the_first_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MAX_NAMED", 2)
    folder = write_folder(tmp_path / "t", *(table_of(f"GPU {letter}") for letter in "DBCA"))
    assert measured_devices([folder], Variant("rowwise")) == ["GPU A", "GPU B", "and 2 more"]


def test_measured_devices_are_those_with_the_recipe(tmp_path):
    folder = write_folder(tmp_path / "t", table_of("NVIDIA H200"), table_of("NVIDIA B200", recipe="tensorwise"))
    assert measured_devices([folder], Variant("rowwise")) == ["NVIDIA H200"]
    assert measured_devices([folder], Variant("tensorwise")) == ["NVIDIA B200"]
    assert measured_devices([folder], Variant("rowwise_with_gw_hp")) == []


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
    belongs = tmp_path / "t" / "nvidia-h200" / "rowwise.yaml"
    differs = "$.device.name: expected NVIDIA H100, found NVIDIA H200"
    assert str(error.value) == f"{path}: {differs}. It belongs in {belongs}: move it there"


@pytest.mark.parametrize("place", [".", "nvidia-h200"])
def test_a_file_under_the_name_of_another_variant_says_its_own(tmp_path, place):
    """In a device's folder too, whose name is not looked at."""
    path = write_file(table_of(recipe="tensorwise"), tmp_path / "nvidia-h200" / "rowwise.yaml")
    belongs = f"found tensorwise. It belongs in {path.with_name('tensorwise.yaml')}"
    with pytest.raises(MisfiledError) as error:
        find_table("rowwise", device="h200", tables=tmp_path / place)
    assert str(error.value) == f"{path}: $.recipe: expected rowwise, {belongs}: move it there"
    write_file(table_of(recipe="tensorwise"), path.with_name("tensorwise.yaml"))
    with pytest.raises(MisfiledError) as error:
        find_table("rowwise", device="h200", tables=tmp_path / place)
    assert str(error.value).endswith(f"{belongs}, where there is one already: keep one of them")
    write_file(table_of(recipe="rowwise"), path.with_name("tensorwise.yaml"))
    with pytest.raises(MisfiledError) as error:
        find_table("rowwise", device="h200", tables=tmp_path / place)
    assert str(error.value).endswith(f"{belongs}, where another file is: exchange the two")


def test_filter_uses_the_same_places(tmp_path, monkeypatch):
    assert auto_filter("rowwise", tokens=16, device="nvidia h200").table.points[0].speedup == 3.0
    monkeypatch.setenv(ENVIRONMENT, str(write_folder(tmp_path / "environment", table_of(speedup=2.0))))
    assert auto_filter("rowwise", tokens=16, device="nvidia h200").table.points[0].speedup == 2.0
    with pytest.raises(TableError, match="no rowwise table for 'H100'"):
        auto_filter("rowwise", tokens=16, device="H100")


# --- all tables of a place -------------------------------------------------------------------------------------


def test_table_files_are_those_of_a_file_a_devices_folder_or_a_folder_of_those(tmp_path):
    folder = write_folder(tmp_path / "t", table_of(), table_of(recipe="tensorwise"), table_of("NVIDIA B200"))
    b200, h200 = folder / "nvidia-b200", folder / "nvidia-h200"
    write_file(table_of(), folder / "journal" / "other.yaml")
    assert table_files(h200 / "rowwise.yaml") == [h200 / "rowwise.yaml"]
    assert table_files(h200) == [h200 / "tensorwise.yaml", h200 / "rowwise.yaml"]
    assert table_files(folder) == [b200 / "rowwise.yaml", h200 / "tensorwise.yaml", h200 / "rowwise.yaml"]
    assert table_files(folder, device="b200") == [b200 / "rowwise.yaml"]
    assert table_files(folder, recipe="tensorwise") == [h200 / "tensorwise.yaml"]


def test_without_a_place_the_tables_of_all_places_are_found(own, packaged):
    assert table_files() == [own / "nvidia-h200" / "rowwise.yaml", packaged / "nvidia-h200" / "rowwise.yaml"]


def test_a_place_without_tables_is_an_error(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(TableError, match="empty: expected a table, a device's folder such as"):
        table_files(tmp_path / "empty")
