"""Uploads a finished dataset to the Hugging Face Hub; huggingface_hub comes with the `lerobot` extra."""

import io
from pathlib import Path
from typing import Any

from hvd.data.lerobot_writer import VERSION
from hvd.errors import UserError

_CARD = """---
task_categories:
- robotics
tags:
- LeRobot
configs:
- config_name: default
  data_files: data/*/*.parquet
---

Robot dataset in LeRobot {version} format, converted from recordings by `hvd convert`.
"""

# A dataset's files, and what is none of it: hidden files (hvd's cache), the record of the request (folders' names)
_PARTS = ("meta/*", "data/*", "videos/*", "labels/*")
_NEVER = (".*", "*/.*", "hvd_convert.json")


def check(repo_id: str) -> None:
    """Raise UserError now if push() cannot work: no package, no login, no user in the name."""
    hub = _package()
    if repo_id.count("/") != 1 or not all(repo_id.split("/")):
        raise UserError(f"--push-to-hub: --repo-id {repo_id!r} must be user/name")
    if hub.get_token() is None:
        raise UserError("--push-to-hub: not logged in; run `hf auth login` or set HF_TOKEN")


def push(root: Path, repo_id: str, *, public: bool = False) -> None:
    """Upload the dataset in the folder and tag it with the format's version as lerobot expects.

    Args:
        public: of a repository that is made now; one that is there already stays what it is.
    """
    hub = _package()
    api = hub.HfApi()
    try:
        api.create_repo(repo_id, repo_type="dataset", private=not public, exist_ok=True)
        api.upload_folder(
            repo_id=repo_id,
            repo_type="dataset",
            folder_path=str(root),
            allow_patterns=list(_PARTS),
            ignore_patterns=list(_NEVER),
        )
        card = io.BytesIO(_CARD.format(version=VERSION).encode())
        api.upload_file(repo_id=repo_id, repo_type="dataset", path_in_repo="README.md", path_or_fileobj=card)
        api.create_tag(repo_id, tag=VERSION, repo_type="dataset", exist_ok=True)
    except (hub.errors.HfHubHTTPError, OSError) as error:  # refused, or no network
        why = str(error).splitlines()[0]
        raise UserError(f"--push-to-hub: {why}; the dataset in {root} is complete, run again to push") from error


def _package() -> Any:
    try:
        import huggingface_hub  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise UserError(
            "--push-to-hub needs the package huggingface_hub: install the `lerobot` extra (uv sync --extra lerobot)"
        ) from None
    return huggingface_hub
