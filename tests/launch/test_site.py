"""Settings of a Slurm site: where they come from, and what is refused."""

import dataclasses
import tomllib
from pathlib import Path

import pytest

from hvd import overrides
from hvd.clusters.slurm import site
from hvd.clusters.slurm.site import Site
from hvd.errors import UserError
from hvd.site import files

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """(working directory, home), both empty."""
    work, home = tmp_path / "work", tmp_path / "home"
    for folder in (work / "slurm", home / ".config" / "hvd"):
        folder.mkdir(parents=True)
    monkeypatch.chdir(work)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.delenv("HVD_SITE", raising=False)
    return work, home


def test_the_shipped_file_has_every_setting_with_its_default():
    shipped = tomllib.loads((ROOT / site.SITE_FILE).read_text())
    defaults = {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(Site()).items()}
    assert shipped == defaults
    site.check(Site())


def test_later_sources_win(folders, monkeypatch):
    work, home = folders
    assert site.load() == Site()
    (work / "slurm" / "site.toml").write_text(
        'partition = "a"\nmem = "1G"\ntime = "1:00:00"\nsetup = ["module load x"]'
    )
    (home / ".config" / "hvd" / "site.toml").write_text('partition = "b"\nmem = "2G"')
    found = site.load(overrides.split_flags(["--slurm.partition", "c", "--slurm.no-requeue"]))
    assert (found.partition, found.mem, found.time) == ("c", "2G", "1:00:00")
    assert found.setup == ("module load x",) and not found.requeue
    monkeypatch.setattr(files, "TEAM_FILE", work / "team.toml")
    files.TEAM_FILE.write_text('partition = "team"\naccount = "team"')
    assert (site.load().partition, site.load().account, site.load().time) == ("b", "team", "1:00:00")
    other = home / "other.toml"
    other.write_text('qos = "q"\nmem = "3G"\n[kubernetes]\nimage = "r/hvd:1"')
    monkeypatch.setenv("HVD_SITE", str(other))  # the team's file at another place; the user's own goes first
    found = site.load()
    assert (found.qos, found.partition, found.mem, found.account) == ("q", "b", "2G", "")
    monkeypatch.setenv("HVD_SITE", str(home / "none.toml"))
    with pytest.raises(UserError, match="is not a file"):
        site.load()


@pytest.mark.parametrize(
    "text, message",
    [
        ("partion = 'x'", "unknown field 'partion'; nearest: partition"),
        ("cpus = '2'", "cpus: '2' is not a whole number"),
        ("cpus = true", "cpus: True is not a whole number"),
        ("requeue = 1", "requeue: 1 is not true or false"),
        ("setup = 'x'", "setup: 'x' is not a list of texts"),
        ("container = 'docker'", "container: 'docker' is not one of pyxis, apptainer, none"),
        ("partition = ", "Invalid value"),
    ],
)
def test_mistakes_in_a_file_name_the_file(folders, text, message):
    path = folders[0] / "slurm" / "site.toml"
    path.write_text(text)
    with pytest.raises(UserError, match=message) as error:
        site.load()
    assert str(error.value).startswith("slurm/site.toml: ")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"tasks_per_node": 0}, "slurm.tasks_per_node 0 must be at least 1"),
        ({"tasks_per_node": 3}, "does not divide slurm.gpus_per_node 8"),
        ({"gpus_per_node": -1}, "must not be negative"),
        ({"mem": "64GB"}, "slurm.mem '64GB' is not a size"),
        ({"time": "an hour"}, "is not a time"),
        ({"time": "5"}, "slurm.grace 300 s is not less than slurm.time 5"),
        ({"container": "pyxis"}, "needs slurm.image"),
        ({"gpu": "h10"}, "unknown device 'h10'"),
        ({"partition": "a\n#SBATCH --uid=0"}, "holds a character"),
        ({"extra": ("--wrap=$(id)",)}, "holds a character"),
        ({"extra": ("--comment=my project",)}, "holds a character"),
        ({"extra": ("mail-type=FAIL",)}, "slurm.extra: 'mail-type=FAIL' is no option"),
        ({"constraint": "a b"}, "slurm.constraint: 'a b' holds a character"),
        ({"image": "a|b"}, "slurm.image: 'a|b' holds a character"),
        ({"mem_per_cpu": "many"}, "slurm.mem_per_cpu 'many' is not a size"),
        ({"setup": ("a\nb",)}, "more than one line"),
    ],
)
def test_settings_that_no_cluster_could_mean(changes, message):
    with pytest.raises(UserError) as error:
        site.check(dataclasses.replace(Site(), **changes))
    assert message in str(error.value)


@pytest.mark.parametrize(
    "time, want",
    [("30", 1800), ("1:30", 90), ("2:00:00", 7200), ("1-0", 86400), ("1-2:03:04", 93784), ("UNLIMITED", None)],
)
def test_times(time, want):
    assert site.seconds(time) == want


@pytest.mark.parametrize(
    "changes",
    [
        {"constraint": "(a100|h100)&ib*2"},
        {"constraint": "[rack1|rack2]"},
        {"mem": "", "mem_per_gpu": ""},
        {"extra": ("--comment='my project'", '--constraint="a&b"', "--array=1-5%1", "--switches=1@1:00:00")},
    ],
)
def test_settings_that_sites_need(changes):
    site.check(dataclasses.replace(Site(), **changes))
