"""Folders of reference data outside the repository: openpi's golden arrays and a real humanoid's recordings."""

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = {"HVD_GOLDEN": "../shared/golden", "HVD_G1_DATA": "../shared/data/g1_bottle"}


def folder(variable: str) -> Path | None:
    """The folder that the environment variable names, else its default beside the checkout; None when it is not there.

    A variable that is set but names no folder is an error: a silent skip would hide the typing mistake.
    """
    named = os.environ.get(variable)
    if named:
        path = Path(named)
        if not path.is_dir():
            raise FileNotFoundError(f"{variable}={named} is no folder")
        return path
    path = (ROOT / FOLDERS[variable]).resolve()
    return path if path.is_dir() else None


def golden_files(*patterns: str) -> list[Path]:
    """Golden files that match any of the patterns, for parametrize; [] when the folder is missing.

    Parametrising over an empty list skips the test, so a machine without the folder shows it as skipped.
    """
    path = folder("HVD_GOLDEN")
    if path is None:
        return []
    return sorted({file for pattern in patterns for file in path.glob(pattern)})
