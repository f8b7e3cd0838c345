"""With HVD_CI=1 only known reasons may skip a test."""

import os
import subprocess
import sys

import pytest

from tests import skips
from tests.folders import ROOT


@pytest.mark.parametrize(
    "reason, markers, expected",
    [
        ("Skipped: HVD_GOLDEN: no folder ../shared/golden", [], False),
        ("got empty parameter set for (path)", [], False),
        ("Skipped: no GPU", ["gpu"], False),
        ("Skipped: lerobot is not installed", [], True),
        ("Skipped: lerobot is not installed", ["slow"], True),
    ],
)
def test_which_skips_are_unexpected(reason, markers, expected):
    assert skips.unexpected(reason, markers) == expected


CONFTEST = "from tests.conftest import pytest_make_collect_report, pytest_runtest_makereport\n"
ONE_TEST = "import pytest\n\ndef test_it():\n    pytest.skip('not in the mood')\n"
A_MODULE = "import pytest\n\npytest.skip('not in the mood', allow_module_level=True)\n"


@pytest.mark.parametrize("ci", [True, False])
def test_an_unexpected_skip_fails_in_ci_only(tmp_path, ci):
    """Of a test, and of a module that skips itself as a whole."""
    for name, text in (("conftest", CONFTEST), ("test_it", ONE_TEST), ("test_module", A_MODULE)):
        (tmp_path / f"{name}.py").write_text(text)
    options = ["-q", "-p", "no:cacheprovider", "--continue-on-collection-errors", f"--rootdir={tmp_path}"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, "-c", os.devnull, tmp_path],
        cwd=tmp_path,
        env={**os.environ, "HVD_CI": str(int(ci)), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == int(ci), done.stdout + done.stderr
    for name in ("test_it.py::test_it", "test_module.py"):
        assert (f"{name}: CI must not skip this: Skipped: not in the mood" in done.stdout) == ci, done.stdout
