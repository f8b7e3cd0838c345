"""The cache of each test is its own, parts are small, and no credentials come from outside."""

from pathlib import Path

import pytest

from hvd.storage import remote as storage_remote


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch, request) -> Path:
    for name in ("HVD_OFFLINE", "GOOGLE_APPLICATION_CREDENTIALS", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    monkeypatch.setenv("HVD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(storage_remote, "PART", request.module.PART)
    monkeypatch.setattr(storage_remote, "BACKOFF_S", 0.01)
    return tmp_path / "cache"
