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


@pytest.mark.parametrize("ci, source, code", [("1", ONE_TEST, 1), ("0", ONE_TEST, 0), ("1", A_MODULE, 2)])
def test_an_unexpected_skip_fails_in_ci_only(tmp_path, ci, source, code):
    test = tmp_path / "test_it.py"
    test.write_text(source)
    (tmp_path / "conftest.py").write_text(CONFTEST)
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            f"--rootdir={tmp_path}",
            "-c",
            os.devnull,
            test,
        ],
        cwd=tmp_path,
        env={**os.environ, "HVD_CI": ci, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == code, done.stdout + done.stderr
    assert ("CI must not skip this: Skipped: not in the mood" in done.stdout) == bool(code)
