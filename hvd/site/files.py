"""The files that describe a site, for every cluster's settings."""

import os
import tomllib
from pathlib import Path
from typing import Any

from hvd.errors import UserError

SITE = "HVD_SITE"
TEAM_FILE = Path("/etc/hvd/site.toml")


def all_files() -> list[tuple[Path, dict[str, Any]]]:
    """What describes the site, the later goes first: the team's file ($HVD_SITE, else /etc/hvd/site.toml), then the
    user's own. Slurm's settings are the files' own, those of another cluster a table that has its name.

    Raises:
        UserError: a file that cannot be read.
    """
    team = Path(os.environ.get(SITE) or TEAM_FILE)
    if os.environ.get(SITE) and not team.is_file():
        raise UserError(f"{SITE} {team} is not a file")
    own = Path("~/.config/hvd/site.toml").expanduser()
    return [(path, read(path)) for path in (team, own) if path.is_file()]


def read(path: Path) -> dict[str, Any]:
    """UserError for what is no TOML."""
    try:
        return tomllib.loads(path.read_text())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UserError(f"{path}: {error}") from error
