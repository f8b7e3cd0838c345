"""What README.md and docs/ tell a user to type is understood, and the names in them exist."""

import ast
import os
import re
import shlex
import shutil
from pathlib import Path

import pytest

import hvd.experiments as experiments
from hvd import cli, export, overrides
from hvd.benchmark import command as benchmark
from hvd.checks import check_config, check_devices
from hvd.clusters import base
from hvd.clusters.kubernetes import data
from hvd.clusters.kubernetes import manifests as kubernetes
from hvd.clusters.slurm import site
from hvd.configs import Experiment
from hvd.data import convert
from hvd.evaluate import elsewhere
from hvd.fields import leaves
from hvd.launch import submit
from hvd.plan import command as plan
from hvd.plan import devices as plan_devices
from hvd.replay import command as replay
from hvd.serve import command as serve
from hvd.site import options as site_check
from tests.clusters import kubernetes_cluster
from tests.folders import ROOT

README = (ROOT / "README.md").read_text()
PAGES = {path.relative_to(ROOT): path.read_text() for path in (ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")))}
COMMANDS = [
    line.partition("#")[0].strip().removeprefix("./")
    for page in PAGES.values()
    for line in (raw.strip() for raw in re.findall(r"^    .*$", page, re.MULTILINE))
    if re.match(r"(\./)?uv run ", line)
]


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """A working folder with a dataset in data/g1, and the README's own config among the configs."""
    monkeypatch.chdir(tmp_path)
    info = tmp_path / "data" / "g1" / "meta" / "info.json"
    info.parent.mkdir(parents=True)
    info.write_text("{}")
    source = re.search(r"^    def my_task\(\).*?^        \)\n", README, re.MULTILINE | re.DOTALL)
    assert source, "the README shows a config"
    code = "\n".join(line.removeprefix("    ") for line in source.group().splitlines())
    namespace = dict(vars(experiments))
    exec(code, namespace)
    monkeypatch.setitem(experiments.CONFIGS, "my_task", namespace["my_task"])


def test_the_readme_begins_with_the_two_lines():
    assert COMMANDS[:2] == ["uv run python launch/submit.py --stage all", "uv run pytest"]
    assert len(COMMANDS) > 25


def with_kubectl(monkeypatch) -> bool:
    """Is there one, of the machine or of the tests' own?"""
    monkeypatch.setenv("PATH", f"{kubernetes_cluster.CACHE}:{os.environ['PATH']}")
    return bool(shutil.which("kubectl"))


@pytest.mark.parametrize("command", list(dict.fromkeys(COMMANDS)))
def test_a_command_is_understood(command, capsys, monkeypatch):
    words = shlex.split(command)
    match words[2:]:
        case ["hvd", "convert", *args]:
            convert.parse(args)
        case ["hvd", "serve", *args]:
            serve.chosen(*overrides.take(serve.ServeOptions(), args))
        case ["hvd", "export" | "plan" as step, *args]:
            options, rest = overrides.take(export.Export(), args) if step == "export" else plan.parse(args)
            check_config(overrides.experiment(rest))
            if step == "plan":
                plan_devices.parse(options.devices, options.nodes)
        case ["hvd", "--help" | "configs" | "train-value", *rest] if not rest or "--help" in rest:
            assert cli.main(words[3:]) == 0
        case ["hvd", "jobs", *args]:
            assert cli.main(["jobs", *args, "--help"]) == 0
        case ["hvd", "site", "check", *args]:
            _, rest, settings = submit.parse(args, site_check.Check())
            check_config(overrides.experiment(rest))
            assert all(flag.field.partition(".")[0] in site_check.CLUSTERS for flag in settings)
        case ["hvd", "data", *args]:
            (verb, _, _), _, flags = data.parse(args)
            assert verb in ("push", "pull") and kubernetes.site.load(flags)
        case ["hvd", "rollouts", *args]:
            check_config(overrides.experiment(elsewhere.parse(args)[1]))
        case ["hvd", step, *args]:
            assert step in cli.STEPS
            args, _ = overrides.take_overwrite(args)
            check_config(overrides.experiment(args))
        case ["python", "launch/submit.py", *args]:
            options, rest, settings = submit.parse(args, submit.Submit())
            given, _ = overrides.take_overwrite(rest)
            cfg = overrides.experiment(given)
            check_config(cfg)
            # what is shown must be possible: the batches are divisible by the devices that a cluster would give
            name = options.cluster if options.cluster != "auto" else "slurm"
            overlay = options.nodes > 1 or any(flag.field == "kubernetes.overlay" for flag in settings)
            if name == "kubernetes" and overlay and not with_kubectl(monkeypatch):
                pytest.skip("no kubectl here, which renders overlays")
            request = base.Request(cfg, options.stage, tuple(given), options.nodes)
            planned = base.get(name, settings).plan(request)
            check_devices(cfg, planned.devices, planned.processes)
        case ["pytest", *paths]:
            assert all((ROOT / path).exists() for path in paths)
        case _:
            pytest.fail(f"not a command that this test knows: {command}")


def test_every_option_that_is_named_exists():
    known = {*leaves(Experiment), *leaves(submit.Submit), *leaves(convert.ConvertConfig)}
    commands = (serve.ServeOptions, export.Export, plan.Options, benchmark.Options, replay.Options, elsewhere.Options)
    commands = (*commands, site_check.Check, data.Copy)
    for own in (*commands, overrides.Choice, overrides.RunDirectory):
        known |= {*leaves(own)}
    known |= {"help", "extra", "no_push_to_hub"}
    # of a table "there | here" the first column is another code base's
    text = "\n".join(
        re.sub(r"^\| [^|]*\|", "", page, flags=re.MULTILINE) if path.name.startswith("coming-from") else page
        for path, page in PAGES.items()
    )
    # their options are their own
    text = re.sub(r"sbatch .*|kubectl [^|`]*|docker run .*|hf download .*|`--(read-only|build-arg)[^`]*`", "", text)
    text = re.sub(r"(program|experts|mixed) = \[.*", "", text)
    known |= {f"slurm.{name}" for name in leaves(site.Site)}
    known |= {f"kubernetes.{name}" for name in leaves(kubernetes.Settings)}
    named = set(re.findall(r"(?<![\w-])--([a-z][a-z0-9_.-]*[a-z0-9])", text))
    assert len(named) > 20
    unknown = {
        name for name in named if not {name.replace("-", "_"), name.replace("-", "_").removeprefix("no_")} & known
    }
    unknown -= {"slurm", "kubernetes"}  # --slurm.NAME
    mappings = ("more_data.", "model.method_params.", "policy.weighting_params.", "policy.extractor_params.")
    unknown -= {name for name in unknown if name.startswith(mappings)}
    assert unknown <= {"value.batchsize"}, "the typing mistake that the README shows is the only unknown option"


def test_files_and_folders_that_are_named_exist():
    for path, page in PAGES.items():
        for name in re.findall(r"`((?:hvd|launch|tests|docs|docker|slurm|k8s)/[\w/.-]+)`", page):
            assert (ROOT / name).exists() or "jobs/ID" in name, f"{path}: {name}"


@pytest.mark.parametrize("path", [*PAGES, Path("CONTRIBUTING.md"), Path("BENCHMARKS.md")], ids=str)
def test_links_lead_somewhere_inside_the_repository(path):
    page = (ROOT / path).read_text()
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", page):
        file, _, heading = target.partition("#")
        linked = (ROOT / path).parent / file if file else ROOT / path
        assert linked.is_file() and ROOT in linked.resolve().parents, target
        headings = (
            {
                re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-")
                for h in re.findall(r"^#+ (.*)$", linked.read_text(), re.M)
            }
            if heading
            else {""}
        )
        assert heading in headings, target
    assert "../shared" not in page or path.name == "CONTRIBUTING.md"


VARIABLE = re.compile(
    r"(HVD|JAX|XLA|CUDA|SLURM|OMPI|PMIX?|MPI|KUBERNETES|HF|XDG|MUJOCO|GOOGLE|STORAGE|OMP|MKL|OPENBLAS|LP|SVT|TF|NCCL)_\w+"
)


def test_every_environment_variable_is_in_the_operations_page():
    used: set[str] = set()
    for folder in ("hvd", "slurm", "docker", "k8s"):
        for path in (ROOT / folder).rglob("*"):
            if (
                path.is_file()
                and "__pycache__" not in path.parts
                and path.suffix in (".py", ".sh", ".sbatch", ".yaml", "")
            ):
                used |= set(re.findall(r"\bHVD_[A-Z][A-Z_]*[A-Z]\b", path.read_text(errors="ignore")))
    for path in (ROOT / "hvd").rglob("*.py"):
        texts = [node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)]
        used |= {text for text in texts if isinstance(text, str) and VARIABLE.fullmatch(text)}
    table = PAGES[Path("docs/operations.md")].partition("## Environment variables")[2]
    rows = re.findall(r"^\| (`.*?) \|", table, re.MULTILINE)
    named = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    assert len(used) > 60 and used <= named, sorted(used - named)
    assert named <= used, f"nothing reads {sorted(named - used)}"
