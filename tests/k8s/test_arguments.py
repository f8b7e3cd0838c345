"""The containers' arguments are those of hvd's own command line, and all containers work on the same run."""

import pytest

from hvd import cli, overrides
from hvd.checks import check_config
from hvd.clusters.kubernetes import gate
from hvd.configs import Experiment
from hvd.errors import UserError
from tests.k8s.render import MANIFESTS, Document, component, containers, documents, jobs

STEPS = {"value": ["prepare", "train-value"], "policy": ["train-policy"], "gate": ["gate"]}


class Started(Exception):
    """The gate's arguments are good: it would ask the cluster now."""


@pytest.fixture
def parsed(monkeypatch):
    """Arguments of a container -> the experiment that hvd makes of them."""
    given: list[Experiment] = []
    parse = overrides.experiment

    def experiment(argv):
        given.append(parse(argv))
        return given[-1]

    def of_this_pod():
        raise Started

    monkeypatch.setattr(gate.overrides, "experiment", experiment)
    monkeypatch.setattr(gate.Api, "of_this_pod", of_this_pod)

    def parse_container(args: list[str]) -> Experiment:
        step, *rest = args
        assert step in cli.STEPS
        if step == "gate":
            with pytest.raises(Started):
                gate.main(rest)
            return given[-1]
        assert not cli.STEPS[step].own_flags
        return experiment(rest)

    return parse_container


@pytest.mark.parametrize("name", MANIFESTS)
def test_arguments_of_all_containers(name, parsed):
    found = jobs(documents(name))
    assert [component(job) for job in found] == (["value", "policy"] if name == "jobset" else [*STEPS])
    experiments = []
    for job in found:
        assert [container["args"][0] for container in containers(job)] == STEPS[component(job)]
        assert not any("command" in container for container in containers(job))  # the image's entrypoint
        experiments += [parsed(container["args"]) for container in containers(job)]
    assert experiments.count(experiments[0]) == len(experiments)
    check_config(experiments[0])
    for stage, job in zip((experiments[0].value, experiments[0].policy), found, strict=False):
        assert stage.batch_size % _devices(job) == 0


def test_a_misspelt_option_is_noticed(parsed):
    for job in jobs(documents("base")):
        for container in containers(job):
            with pytest.raises(UserError, match="num_train_stepz"):
                parsed([*container["args"], "--value.num_train_stepz", "5"])
    args = containers(jobs(documents("base"))[2])[0]["args"]
    with pytest.raises(UserError, match="--pods"):
        parsed([*args, "--pods", "many"])


def test_gcs_keeps_its_runs_in_the_bucket(parsed):
    for job in jobs(documents("gcs")):
        cfg = parsed(containers(job)[-1]["args"])
        assert cfg.value_dir.startswith("gs://BUCKET/runs/")
        assert cfg.assets_dir == "gs://BUCKET/assets"
        assert not cfg.sim.task  # recordings are simulated into a local folder
        assert all(str(data.path()).startswith("/data/datasets/") for _, data in cfg.datasets())


def _devices(job: Document) -> int:
    limits = containers(job)[-1]["resources"]["limits"]
    return job["spec"]["completions"] * limits.get("nvidia.com/gpu", 1)
