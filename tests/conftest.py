"""What all tests share: a temporary folder and a data folder of their own.

So no lock is another test run's, or a sweep's, and no table or plan is the user's. And no test leaves fp8gate's casts
on for those after it.
"""

from __future__ import annotations

import shutil
import tempfile
from multiprocessing.util import Finalize

import pytest

from fp8gate import casts

AFTER_MULTIPROCESSING = -200  # whose own folder in there is removed at -100


@pytest.fixture(autouse=True, scope="session")
def _own_temporary_folder():
    """Also of the processes that tests start. Its path is short: sockets lie in it."""
    folder = tempfile.mkdtemp(prefix="fp8gate-")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", folder)
        patch.setenv("XDG_DATA_HOME", f"{folder}/data")
        patch.delenv("FP8GATE_THRESHOLDS", raising=False)
        patch.delenv(casts.VARIABLE, raising=False)
        patch.setattr(tempfile, "tempdir", folder)
        yield
    Finalize(None, shutil.rmtree, (folder,), {"ignore_errors": True}, exitpriority=AFTER_MULTIPROCESSING)


@pytest.fixture(autouse=True)
def _casts_are_off_afterwards():
    yield
    assert not casts.is_enabled()


@pytest.fixture
def processes(tmp_path):
    """Starts scripts in forked processes; those that are left are killed."""
    from forked import Processes  # it loads torch

    started = Processes(tmp_path)
    yield started
    started.kill()
