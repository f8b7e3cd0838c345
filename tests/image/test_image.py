"""The built image runs as a restricted pod would run it, and holds what it should and nothing else."""

import json
import re
import shutil
import subprocess
import textwrap
import time

import pytest

from tests.folders import folder
from tests.image import builder
from tests.image.conftest import USER

pytestmark = [pytest.mark.image, pytest.mark.timeout(1800)]

GB = 1e9
CPU_BUDGET = 1.3 * GB  # unpacked
PROJECT_LAYER = 5e6
# What a build or a careless COPY leaves behind: caches, histories, lists, keys, certificates of the machine that built.
UNWANTED = re.compile(
    r"""(^|/)(\.cache|\.git|\.bash_history|\.python_history|\.netrc|\.pypirc|\.docker|\.aws|\.ssh|\.kube|\.env)(/|$)
    |^var/lib/apt/lists/.|^var/cache/apt/.*\.(deb|bin)$|^var/log/.*\.log$|^tmp/.|^run/ca\.crt$
    |^usr/local/share/ca-certificates/.
    |^root/\.(?!bashrc$|profile$)|(^|/)id_(rsa|ed25519)|\.key$|(^|/)runs/|^src/|^dist/|requirements/.*\.txt$""",
    re.VERBOSE,
)


def test_the_entrypoint_is_hvd(image):
    done = image.run("--help")
    assert done.stdout.startswith("usage: hvd <step>")
    assert image.run("train-valeu", check=False).returncode == 2


def test_user_labels_and_environment(image):
    config = image.inspect()["config"]
    assert config["User"] == f"{USER}:{USER}"
    assert config["Entrypoint"] == ["/usr/bin/tini", "-s", "--", "hvd"]
    labels = config["Labels"]
    assert labels["org.opencontainers.image.version"] == version()
    assert re.fullmatch(r"[0-9a-f]{12}(\+dirty)?|unknown", labels["org.opencontainers.image.revision"])
    environment = dict(line.split("=", 1) for line in config["Env"])
    assert environment["NVIDIA_VISIBLE_DEVICES"] == "all"
    assert environment["HVD_REVISION"] == labels["org.opencontainers.image.revision"]
    secret = re.compile("token|secret|password|_key$|proxy|cert", re.IGNORECASE)
    assert not [name for name in environment if secret.search(name)]
    who = image.python("-c", "import os; print(os.getuid(), os.getgid(), os.getgroups(), os.environ['HOME'])").stdout
    assert who.split() == [str(USER), str(USER), "[10001]", "/home/hvd"]


def version() -> str:
    found = re.search(r'^version = "(.*)"', (builder.ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert found
    return found[1]


def test_nothing_can_be_written_but_tmp(image):
    code = """
        import os
        for place in ("/", "/home/hvd", "/opt/venv", "/var/tmp", "/dev/shm", "/tmp"):
            try:
                open(os.path.join(place, "x"), "w").close(); print("writable", place)
            except OSError as error:
                print(type(error).__name__, place)
    """
    lines = image.python("-c", textwrap.dedent(code)).stdout.splitlines()
    assert {line.split()[1] for line in lines if line.startswith("writable")} <= {"/tmp", "/dev/shm"}
    capabilities = image.python("-c", "print(open('/proc/self/status').read())").stdout
    assert re.search(r"CapEff:\s+0{16}$", capabilities, re.MULTILINE)
    assert re.search(r"NoNewPrivs:\s+1$", capabilities, re.MULTILINE)


def test_packages_are_the_trainers_and_every_step_imports(image):
    code = """
        import importlib, importlib.metadata, json
        from hvd import cli
        for step in cli.STEPS.values():
            importlib.import_module(step.module)
        import hvd, hvd.launch.submit
        print(json.dumps([hvd.__file__, [d.name.lower() for d in importlib.metadata.distributions()]]))
    """
    where, names = json.loads(image.python("-c", textwrap.dedent(code)).stdout.splitlines()[-1])
    assert where.startswith("/opt/venv/")
    assert {"jax", "flax", "boto3", "wandb", "hvd"} <= set(names)
    assert not {"torch", "lerobot", "pytest", "ruff", "pip", "uv", "setuptools"} & set(names)


def test_the_tests_of_rl_pass_inside(image, test_packages):
    options = [
        *("--env=PYTHONPATH=/tests:/checkout", "--workdir=/checkout", "--env=HYPOTHESIS_STORAGE_DIRECTORY=/tmp/h"),
        f"--volume={test_packages}:/tests:ro",
        *(f"--volume={builder.ROOT / name}:/checkout/{name}:ro" for name in ("tests", "pyproject.toml")),
    ]
    if golden := folder("HVD_GOLDEN"):
        options += [f"--volume={golden}:/golden:ro", "--env=HVD_GOLDEN=/golden"]
    alone = ("-o", "addopts=--import-mode=importlib")  # the project's own addopts need xdist, which the image lacks
    run = ("-m", "pytest", "-q", *alone, "-p", "no:cacheprovider", "tests/method")
    done = image.python(*run, options=tuple(options))
    assert re.search(r"^[1-9]\d+ passed", done.stdout, re.MULTILINE), done.stdout


def test_two_steps_of_training_as_its_user(image, storage):
    arguments = storage.arguments(value__num_train_steps=2)
    image.run("prepare", *arguments, options=storage.options)
    image.run("train-value", *arguments, options=storage.options)
    complete = storage.value / "complete.json"
    assert json.loads(complete.read_text())
    assert complete.stat().st_uid == USER
    assert [json.loads(line)["step"] for line in (storage.value / "metrics.jsonl").read_text().splitlines()][-1] == 2


def test_sigterm_through_tini_saves_and_ends_with_143(image, storage):
    arguments = storage.arguments(value__num_train_steps=100000)
    image.run("prepare", *arguments, options=storage.options)
    name = f"hvd-test-{storage.folder.parent.name}"
    options = (*storage.options, f"--name={name}")
    command = builder.podman_run(image.id, "train-value", *arguments, options=options)
    log = storage.folder / "log"
    with log.open("w") as file:
        trainer = subprocess.Popen(command, env=builder.environment(), stdout=file, stderr=file)
        try:
            metrics = storage.value / "metrics.jsonl"
            end = time.monotonic() + 200
            while not (metrics.exists() and metrics.read_text().count("\n") > 2):
                assert trainer.poll() is None and time.monotonic() < end, log.read_text()
                time.sleep(0.2)
            builder.call("podman", "kill", "--signal=TERM", name)
            assert trainer.wait(60) == 143, log.read_text()
        finally:
            builder.call("podman", "rm", "--force", "--ignore", name, check=False)
            trainer.wait(30)
    saved = [int(path.name) for path in (storage.value / "checkpoints").iterdir() if path.name.isdigit()]
    assert max(saved) >= 2
    assert not (storage.value / "complete.json").exists()


def test_a_job_that_was_promised_gpus_refuses_to_start(image, storage):
    arguments = storage.arguments(value__num_train_steps=2)
    options = (*storage.options, "--env=HVD_EXPECT_GPUS=1")
    image.run("prepare", *arguments, options=options)
    done = image.run("train-value", *arguments, options=options, check=False)
    assert done.returncode == 2
    assert "the job has GPUs, but jax finds none" in done.stdout + done.stderr
    assert not storage.value.exists() or not (storage.value / "metrics.jsonl").exists()


def test_nothing_is_left_over_in_any_layer(layers):
    ours = [member for layer in layers[1:] for member in layer.members]  # the base is somebody else's
    names = [member.name.removeprefix("./") for member in ours if not member.isdir() and "/.wh." not in member.name]
    assert [name for name in names if UNWANTED.search(name)] == []
    assert [name for name in names if "/site-packages/tests/" in name or "/__editable__" in name] == []


def test_no_file_but_the_bases_has_the_rights_of_another(layers):
    base = {member.name.removeprefix("./") for member in layers[0].members}
    ours = [member for layer in layers[1:] for member in layer.members]
    raised = [m.name for m in ours if m.isreg() and m.mode & 0o6000 and m.name.removeprefix("./") not in base]
    assert raised == []
    assert [m.name for m in ours if m.uid == USER and m.name.startswith("opt/")] == []  # the user cannot change code


def test_sizes_stay_below_the_budget(layers):
    assert sum(layer.size for layer in layers) < CPU_BUDGET
    assert layers[-1].size < PROJECT_LAYER


def test_a_change_of_the_source_makes_the_last_layer_only(image, tmp_path):
    before = image.inspect()["rootfs"]["diff_ids"]
    source = tmp_path / "source"
    shutil.copytree(builder.ROOT, source, ignore=shutil.ignore_patterns(".venv*", "runs", ".git", "assets"))
    with (source / "hvd" / "cli.py").open("a") as file:
        file.write("# changed\n")
    changed = type(image)(builder.build("cpu", "localhost/hvd-test:changed", source=source))
    after = changed.inspect()["rootfs"]["diff_ids"]
    builder.call("buildah", "rmi", "--force", changed.id)
    assert after[:-1] == before[:-1]
    assert after[-1] != before[-1]
