"""k8s/trainjob: the fields that Kubeflow Trainer's CRDs have (v1alpha1, August 2026), and the pods of the value Job."""

import copy

import jsonschema
import kubernetes_validate
import pytest
import yaml

from hvd import overrides
from hvd.checks import check_config
from tests.k8s.render import K8S, Document, documents, find


def fields(required: tuple[str, ...] = (), **properties: object) -> Document:
    return {"type": "object", "properties": properties, "required": [*required], "additionalProperties": False}


TEXT, ANY = {"type": "string"}, {"type": "object"}
COUNT = {"type": "integer", "minimum": 1}
WORDS = {"type": "array", "items": TEXT}
METADATA = fields(("name",), name=TEXT, labels={"type": "object", "additionalProperties": TEXT})
KINDS = {
    "TrainJob": fields(
        ("runtimeRef",),
        runtimeRef=fields(("name",), apiGroup=TEXT, kind=TEXT, name=TEXT),
        trainer=fields(
            image=TEXT,
            command=WORDS,
            args=WORDS,
            env={"type": "array"},
            numNodes=COUNT,
            numProcPerNode=COUNT,
            resourcesPerNode=fields(requests=ANY, limits=ANY),
        ),
        runtimePatches={"type": "array"},
        suspend={"type": "boolean"},
        activeDeadlineSeconds=COUNT,
    ),
    "TrainingRuntime": fields(
        ("mlPolicy", "template"),
        mlPolicy=fields(numNodes=COUNT, jax=fields()),
        template=fields(
            spec=fields(
                replicatedJobs={
                    "type": "array",
                    "maxItems": 1,
                    "items": fields(("name", "template"), name={"const": "node"}, replicas={"const": 1}, template=ANY),
                }
            )
        ),
    ),
}


def check(doc: Document) -> None:
    head = {"apiVersion": {"const": "trainer.kubeflow.org/v1alpha1"}, "kind": TEXT, "metadata": METADATA}
    jsonschema.validate(doc, fields((*head, "spec"), **head, spec=KINDS[doc["kind"]]))


def read(name: str) -> Document:
    return yaml.safe_load((K8S / "trainjob" / name).read_text())


def test_the_files_have_trainers_fields_and_a_wrong_one_is_found():
    for name, place in (("runtime.yaml", ("spec", "mlPolicy")), ("value.yaml", ("spec", "trainer"))):
        doc = read(name)
        check(doc)
        doc[place[0]][place[1]]["numNode"] = 2
        with pytest.raises(jsonschema.ValidationError, match="numNode"):
            check(doc)


def test_a_trainjob_runs_what_the_value_job_runs():
    runtime, job = read("runtime.yaml"), read("value.yaml")
    (node,) = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    assert node["template"]["metadata"]["labels"] == {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}
    made = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "hvd-value-node-0"}}
    kubernetes_validate.validate(made | {"spec": node["template"]["spec"]}, "1.33.0", strict=True)
    value = find(documents("base"), "Job", "hvd-value")["spec"]
    ours, theirs = (copy.deepcopy(spec) for spec in (node["template"]["spec"], value))
    assert ours["podFailurePolicy"] == theirs["podFailurePolicy"]
    ours, theirs = (spec["template"]["spec"] for spec in (ours, theirs))
    (container,), (trainer,) = ours.pop("containers"), theirs.pop("containers")
    del theirs["initContainers"]
    for pod in (ours, theirs):
        pod["volumes"][2]["emptyDir"].pop("sizeLimit")
    assert ours == theirs
    same = ("image", "workingDir", "securityContext", "volumeMounts", "terminationMessagePolicy")
    assert {name: container[name] for name in same} == {name: trainer[name] for name in same}
    assert [one for one in trainer["env"] if "secretKeyRef" not in one.get("valueFrom", {})] == container["env"]

    ref, asked = job["spec"]["runtimeRef"], job["spec"]["trainer"]
    assert (ref["kind"], ref["name"]) == (runtime["kind"], runtime["metadata"]["name"])
    cfg = overrides.experiment(asked["args"][1:], here=False)
    check_config(cfg)
    assert asked["args"][0] == "train-value" and asked["image"] == container["image"]
    assert cfg.value.batch_size % (asked["numNodes"] * asked["resourcesPerNode"]["limits"]["nvidia.com/gpu"]) == 0
