"""What is handed to kubectl, and what is left as it is."""

import copy
import json

import pytest
import yaml

from hvd.clusters.kubernetes.submission import submit
from hvd.errors import Failed, UserError
from hvd.launch.submit import main
from tests.k8s.conftest import live
from tests.k8s.render import Document, containers, documents, find
from tests.k8s.test_manifests import render

THREE = ["hvd-value", "hvd-awr", "hvd-awr-gate"]


def both() -> list[Document]:
    return [doc for doc in documents("base") if doc["kind"] != "PersistentVolumeClaim"]


def named(docs: list[Document], kind: str = "Job") -> list[str]:
    return [doc["metadata"]["name"] for doc in docs if doc["kind"] == kind]


def handed(kubectl, kind: str = "Job") -> list[list[str]]:
    """Names of the objects of each apply and create, the dry run first."""
    return [named(list(yaml.safe_load_all(text)), kind) for _, text in kubectl.calls("apply", "create")]


def found(kubectl, *there: tuple[str, dict]) -> list[Document]:
    """The cluster has these Jobs of `both`: (name, what `live` takes)."""
    docs = both()
    kubectl.has([live(find(docs, "Job", name), **state) for name, state in there])
    return docs


def test_a_dry_run_by_the_server_comes_first(kubectl):
    assert submit(both()).stages == [("value", "hvd-value"), ("policy", "hvd-awr")]
    assert [args[0] for args, _ in kubectl.calls()] == ["get", "auth", "get", "apply", "apply", "create"]
    assert ["--dry-run=server" in args for args, _ in kubectl.calls("apply")] == [True, False]
    assert handed(kubectl) == [THREE, [], THREE]


def test_what_the_server_refuses_changes_nothing(kubectl):
    said = "Error from server (Forbidden): error when creating:\nroles is forbidden: User ben cannot"
    kubectl.answer("apply --dry-run", said, 1)
    with pytest.raises(
        UserError, match=r"the cluster refuses the manifests: Error .* creating: roles is forbidden.*not"
    ):
        submit(both())
    assert [args[0] for args, _ in kubectl.calls()] == ["get", "auth", "get", "apply"]


@pytest.mark.parametrize("call", ["get", "apply --dry-run"])
def test_a_silent_server_is_no_mistake_of_the_users(kubectl, call):
    kubectl.answer(call, "Unable to connect to the server: dial tcp: timeout", 1)
    with pytest.raises(Failed, match="Unable to connect"):
        submit(both())


def test_jobs_that_do_the_same_are_left_alone(kubectl, capsys):
    """To apply a policy Job that the gate has released would pause it."""
    value, policy, gate = THREE
    docs = found(kubectl, (policy, {"parallelism": 1}), (value, {"condition": "Complete"}), (gate, {}))
    submit(docs)
    assert handed(kubectl) == [] and not kubectl.calls("delete")
    assert "Job hvd-awr is there already and does the same; it is left as it is" in capsys.readouterr().out


def test_the_rest_of_the_stage_is_added_to_a_value_job_that_lives(kubectl):
    submit(found(kubectl, ("hvd-value", {})))
    assert handed(kubectl)[-1] == ["hvd-awr", "hvd-awr-gate"] and not kubectl.calls("delete")


@pytest.mark.parametrize(
    "policy, gate",
    [
        ({"parallelism": 0}, {"condition": "Failed"}),
        # the gate is about to end: it has seen the policy Job's end, and would not release the successor
        ({"condition": "Complete"}, {}),
    ],
)
def test_jobs_that_have_ended_make_room_for_their_successors(kubectl, policy, gate):
    submit(found(kubectl, ("hvd-value", {"condition": "Complete"}), ("hvd-awr", policy), ("hvd-awr-gate", gate)))
    ((deleted, _),) = kubectl.calls("delete")
    assert deleted[:2] == ["delete", "jobs"] and set(deleted[2:5]) == set(THREE)
    assert handed(kubectl) == [[f"{name}-dry-run" for name in THREE], [], THREE]


def test_a_failed_value_job_whose_gate_does_not_know_yet(kubectl):
    docs = found(kubectl, ("hvd-value", {"condition": "Failed"}), ("hvd-awr", {}), ("hvd-awr-gate", {}))
    with pytest.raises(UserError, match="hvd-value has failed, and hvd-awr has not ended yet"):
        submit(docs)
    assert not kubectl.calls("delete", "apply", "create")


def whole() -> list[Document]:
    """What `--stage all` hands over, storage aside."""
    return render("--evaluate.baselines", "false")


@pytest.mark.parametrize(
    "there, left, deleted",
    [
        # (value, policy, gate, evaluation): what `live` takes; which stay as they are, and which make room
        (({}, {}, {}, {}), 4, 0),
        (("Complete", "Complete", {}, {}), 4, 0),
        (("Complete", "Complete", "Complete", "Complete"), 0, 4),
        (("Complete", "Complete", "Complete", "Failed"), 0, 4),
        (("Complete", "Failed", "Failed", {}), 0, 4),
        (("Complete", {}, {}, None), 2, 1),  # the evaluation has been cancelled: a gate that knows it, too, is needed
    ],
)
def test_the_whole_way_again(kubectl, capsys, there, left, deleted):
    docs, names = whole(), [*THREE, "hvd-evaluate"]
    states = {name: {"condition": one} if isinstance(one, str) else one for name, one in zip(names, there, strict=True)}
    kubectl.has([live(find(docs, "Job", name), **state) for name, state in states.items() if state is not None])
    done = submit(docs)
    assert [name for _, name in done.stages] == ["hvd-value", "hvd-awr", "hvd-evaluate"]
    assert capsys.readouterr().out.count("it is left as it is") == left
    gone = [args[2:-1] for args, _ in kubectl.calls("delete")]
    assert [len(one) for one in gone] == ([deleted] if deleted else [])
    assert len(handed(kubectl)[-1] if handed(kubectl) else []) == 4 - left


def test_a_failed_policy_whose_gate_does_not_know_yet(kubectl):
    docs = whole()
    states = zip([*THREE, "hvd-evaluate"], ("Complete", "Failed", "", ""), strict=True)
    kubectl.has([live(find(docs, "Job", name), condition=one) for name, one in states])
    with pytest.raises(UserError, match="hvd-awr has failed, and hvd-evaluate has not ended yet"):
        submit(docs)
    assert not kubectl.calls("delete", "apply", "create")


def test_the_evaluation_again_by_itself(kubectl):
    """Beside Jobs that have ended, and not beside one that the gate has yet to release."""
    docs = whole()
    again = render("--evaluate.baselines", "false", stage="evaluate")
    kubectl.has([live(find(docs, "Job", "hvd-evaluate"))])
    with pytest.raises(UserError, match=r"hvd-evaluate is there already and has another spec\.parallelism"):
        submit(again)
    kubectl.has([live(find(docs, "Job", name), condition="Complete") for name in (*THREE, "hvd-evaluate")])
    assert submit(again).stages == [("evaluate", "hvd-evaluate")]
    assert kubectl.calls("delete")[0][0][2:-1] == ["hvd-evaluate"] and handed(kubectl)[-1] == ["hvd-evaluate"]


def trainer(doc: Document) -> Document:
    return containers(doc)[-1]


OTHERS = {
    "belongs to experiment a": lambda job: trainer(job)["args"].extend(["--exp-name", "a"]),
    r"other arguments \(value.batch_size 8\)": lambda job: trainer(job)["args"].extend(["--value.batch_size", "8"]),
    r"another volume claim \(mine\)": lambda job: job["spec"]["template"]["spec"]["volumes"][0].update(
        persistentVolumeClaim={"claimName": "mine"}
    ),
    "is none of hvd's": lambda job: job["metadata"].update(labels={}),
}
OF_THE_LIVING = {
    r"runs another image \(.*other:1\)": lambda job: trainer(job).update(image="other:1"),
    r"other arguments \(train-value --overwrite\)": lambda job: trainer(job)["args"].append("--overwrite"),
    "another spec.template.spec.containers.0..resources.limits.memory": lambda job: trainer(job)["resources"][
        "limits"
    ].update(memory="9Gi"),
}


@pytest.mark.parametrize("condition", ["", "Complete", "Failed"])
@pytest.mark.parametrize("said", [*OTHERS, *OF_THE_LIVING])
@pytest.mark.parametrize("stage", [("hvd-value",), tuple(THREE)])
def test_a_job_that_does_something_else_is_refused_by_name(kubectl, said, condition, stage):
    """All of it: nothing is followed, replaced or deleted, and nothing else of the stage is submitted."""
    docs = both()
    theirs = copy.deepcopy(find(docs, "Job", "hvd-value"))
    (OTHERS | OF_THE_LIVING)[said](theirs)
    kubectl.has([live(theirs, condition=condition)])
    mine = [doc for doc in docs if doc["metadata"]["name"] in stage]
    if condition and said in OF_THE_LIVING:  # the successor of one that has ended may be larger
        submit(mine)
        assert kubectl.calls("delete")[0][0][2] == "hvd-value"
        return
    with pytest.raises(UserError, match=f"Job hvd-value is there already and .*{said}.*--kubernetes.name"):
        submit(mine)
    assert not kubectl.calls("apply", "create", "delete")


def test_a_job_that_is_being_deleted_is_not_followed(kubectl):
    docs = both()
    going = live(find(docs, "Job", "hvd-value"))
    going["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"
    kubectl.has([going])
    with pytest.raises(UserError, match="Job hvd-value is being deleted"):
        submit(docs)
    assert not kubectl.calls("apply", "create", "delete")


def test_the_same_arguments_written_otherwise_are_the_same(kubectl):
    docs = both()
    theirs = copy.deepcopy(find(docs, "Job", "hvd-value"))
    for container in containers(theirs):
        container["args"] += ["--value.batch-size=64", "--model.method=td"]
    mine = find(docs, "Job", "hvd-value")
    for container in containers(mine):
        container["args"] += ["--model.method", "td", "--value.batch_size", "64"]
    kubectl.has([live(theirs)])
    submit([mine])
    assert handed(kubectl) == []


def test_data_lie_on_the_volume_and_are_not_looked_for_here(kubectl, capsys):
    argv = ["--stage", "all", "--cluster", "kubernetes", "--config", "g1", "--detach", "--data"]
    assert main([*argv, "data/mine"]) == 0
    made = list(yaml.safe_load_all(kubectl.calls("create")[-1][1]))
    for one in made:
        assert all("--data data/mine" in " ".join(args["args"]) for args in containers(one))
    kubectl.has([live(one) for one in made])
    assert main([*argv, "data/mine"]) == 0 and "is there already and does the same" in capsys.readouterr().out
    assert main([*argv, "data/other"]) == 2 and "has other arguments (optimal_data.root" in capsys.readouterr().err
    assert main(["--stage", "value", "--cluster", "local", "--config", "g1", "--data", "data/mine"]) == 2
    assert "no LeRobot dataset there" in capsys.readouterr().err


def test_another_job_on_the_same_run_is_named(kubectl):
    theirs = copy.deepcopy(find(both(), "Job", "hvd-value"))
    theirs["metadata"]["name"] = "anna-value"
    kubectl.has([live(theirs)])
    with pytest.raises(UserError, match="Job anna-value works on the same run as hvd-value would"):
        submit(both())
    assert not kubectl.calls("apply", "create")
    theirs["spec"]["template"]["spec"]["volumes"][0]["persistentVolumeClaim"]["claimName"] = "annas"
    kubectl.has([live(theirs)])  # the same folder of another volume
    submit(both())
    theirs["spec"]["template"]["spec"]["volumes"][0]["persistentVolumeClaim"]["claimName"] = "hvd-storage"
    kubectl.has([live(theirs, condition="Failed")])
    submit(both())
    assert handed(kubectl)[-1] == THREE


def test_nothing_is_left_of_what_the_server_takes_half(kubectl):
    """Such as a Job of that name which somebody else has made in the same second."""
    kubectl.answer("apply", "role.rbac.authorization.k8s.io/hvd-awr-gate created\nserviceaccount/x unchanged")
    kubectl.answer("create", "job.batch/hvd-awr created", 1, 'jobs.batch "hvd-value" already exists')
    with pytest.raises(UserError, match=r'jobs.batch "hvd-value" already exists; no Job of it is left behind'):
        submit(both())
    assert [args[1] for args, _ in kubectl.calls("delete")] == ["job.batch/hvd-awr"]


def test_a_claim_that_is_there_is_left_alone(kubectl):
    claim = {"kind": "PersistentVolumeClaim", "metadata": {"name": "hvd-storage"}}
    submit([claim, *both()])
    kubectl.answer("get persistentvolumeclaims", json.dumps({"items": [claim]}))
    submit([claim, *both()])
    assert handed(kubectl, "PersistentVolumeClaim") == [["hvd-storage"]] * 2 + [[]] * 4


def test_the_launcher_applies_and_follows(kubectl, capsys):
    found(kubectl, ("hvd-value", {"condition": "Complete"}))
    assert main(["--stage", "value", "--cluster", "kubernetes"]) == 0
    said = capsys.readouterr().out
    assert "job hvd-value" in said and "hvd-value: COMPLETED" in said


def test_no_kubectl_is_said(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["--stage", "value", "--cluster", "kubernetes"]) == 2
    assert "there is no kubectl on this machine" in capsys.readouterr().err
