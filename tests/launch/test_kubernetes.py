"""Rendering the manifests, and handing them to a kubectl that is faked (a real cluster: tests/clusters)."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import yaml

from hvd import overrides
from hvd.clusters.kubernetes import manifests as kubernetes
from hvd.errors import Failed, UserError
from hvd.launch import submit
from tests.k8s import render as manifests
from tests.k8s.promises import keeps

ROOT = Path(__file__).resolve().parents[2]


def files() -> list[dict]:
    """What `kubectl apply -f k8s/value-job.yaml -f k8s/awr-job.yaml` reads."""
    return [
        doc
        for name in ("value-job", "awr-job")
        for doc in yaml.safe_load_all((ROOT / "k8s" / f"{name}.yaml").read_text())
    ]


def render(
    *argv: str, stage: str = "all", nodes: int = 1, after: str = "", overwrite: bool = False, **asked
) -> list[dict]:
    options = ["--config", "demo", *argv]
    cfg = overrides.experiment(options)
    settings = kubernetes.Settings(**asked)
    return kubernetes.render(cfg, stage, options, nodes, settings, after=after, overwrite=overwrite)


def job(docs: list[dict], component: str) -> dict:
    (found,) = [
        d for d in docs if d["kind"] == "Job" and d["metadata"]["labels"]["app.kubernetes.io/component"] == component
    ]
    return found


def container(docs: list[dict], component: str, kind: str = "containers") -> dict:
    return job(docs, component)["spec"]["template"]["spec"][kind][0]


def env(one: dict) -> dict[str, str]:
    return {variable["name"]: variable.get("value", "") for variable in one["env"]}


def test_the_files_are_what_is_rendered_by_default(capsys):
    assert render() == files()
    assert submit.main(["--stage", "all", "--cluster", "kubernetes", "--dry-run"]) == 0
    assert list(yaml.safe_load_all(capsys.readouterr().out)) == files()


def test_options_go_to_every_container_and_overwrite_to_the_training(capsys):
    found = render("--exp_name", "x", "--value.batch_size", "8", overwrite=True)
    options = ["--config", "demo", "--exp_name", "x", "--value.batch_size", "8"]
    assert container(found, "value", "initContainers")["args"] == ["prepare", *options]
    assert container(found, "value")["args"] == ["train-value", *options, "--overwrite"]
    assert container(found, "policy")["args"] == ["train-policy", *options, "--overwrite"]
    gate = ["gate", "--value-job", "hvd-value", "--policy-job", "hvd-awr", "--pods", "1"]
    assert container(found, "gate")["args"] == [*gate, *options]


def test_one_stage():
    value = render(stage="value")
    assert [doc["metadata"]["name"] for doc in value] == ["hvd-value"]
    policy = render(stage="policy")
    assert {doc["kind"] for doc in policy} == {"Job", "ServiceAccount", "Role", "RoleBinding"}
    assert job(policy, "policy")["spec"]["parallelism"] == 0, "the gate verifies the value run"
    assert container(policy, "gate")["args"][:3] == ["gate", "--value-job", ""]
    assert container(render(stage="policy", after="other-value"), "gate")["args"][2] == "other-value"


def test_imitation_waits_for_nothing():
    found = render("--policy.weighting", "none", stage="policy")
    assert job(found, "policy")["spec"]["parallelism"] == 1
    assert len(found) == 1


def test_every_setting_has_its_place():
    found = render(
        image="reg/hvd:1",
        claim="nfs",
        gpus_per_node=4,
        gpu="h100-80gb",
        cpus=32,
        memory="200Gi",
        queue="robots",
        priority="low",
    )
    for component in ("value", "policy"):
        one, pod = container(found, component), job(found, component)["spec"]["template"]["spec"]
        assert one["resources"]["limits"] == {"memory": "200Gi", "nvidia.com/gpu": 4}
        assert one["resources"]["requests"] == {"cpu": "32", "memory": "200Gi"}
        assert env(one)["HVD_EXPECT_GPUS"] == "1" and "latency_hiding" in env(one)["XLA_FLAGS"]
        assert pod["volumes"][0]["persistentVolumeClaim"]["claimName"] == "nfs" and pod["priorityClassName"] == "low"
        assert job(found, component)["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "robots"
    images = [c["image"] for d in found if d["kind"] == "Job" for c in d["spec"]["template"]["spec"]["containers"]]
    assert set(images) == {"reg/hvd:1"} and container(found, "value", "initContainers")["image"] == "reg/hvd:1"
    on_cpus = container(render(gpus_per_node=0), "value")
    assert "nvidia.com/gpu" not in on_cpus["resources"]["limits"] and env(on_cpus)["HVD_EXPECT_GPUS"] == "0"


def test_the_gate_reads_the_claim_that_the_stages_write():
    found = render(claim="nfs")
    volumes = job(found, "gate")["spec"]["template"]["spec"]["volumes"]
    assert volumes[0]["persistentVolumeClaim"]["claimName"] == "nfs"


def test_another_name_for_all_of_an_experiment():
    found = render(name="exp2")
    names = [doc["metadata"]["name"] for doc in found]
    assert names == ["exp2-value", "exp2-awr", *["exp2-awr-gate"] * 4]
    role = next(doc for doc in found if doc["kind"] == "Role")
    assert [rule["resourceNames"] for rule in role["rules"]] == [["exp2-value"], ["exp2-awr"]]
    binding = next(doc for doc in found if doc["kind"] == "RoleBinding")
    assert binding["roleRef"]["name"] == binding["subjects"][0]["name"] == "exp2-awr-gate"
    assert job(found, "gate")["spec"]["template"]["spec"]["serviceAccountName"] == "exp2-awr-gate"
    assert container(found, "gate")["args"][:5] == ["gate", "--value-job", "exp2-value", "--policy-job", "exp2-awr"]
    text = json.dumps(found)
    assert "hvd-value" not in text and "hvd-awr" not in text and "hvd-credentials" in text and "hvd-storage" in text


@pytest.mark.parametrize(
    "flags, said",
    [
        (("--kubernetes.name", "My_Exp"), "kubernetes.name 'My_Exp'"),
        (("--kubernetes.memory", "lots"), "kubernetes.memory 'lots' is no size"),
        (("--kubernetes.gpus_per_node", "-2"), "must not be negative"),
        (("--kubernetes.cpus", "0"), "cpus not 0"),
        (("--kubernetes.image", "a b"), "no spaces"),
        (("--kubernetes.nam", "x"), "nearest: --kubernetes.name"),
        (("--kubernetes.overlay", "k8s"), "no kustomization.yaml in it"),
        (("--after", "hvd-value"), "--after 'hvd-value'"),
        (("--slurm.time", "1:00"), "--slurm.time is for --cluster slurm, this is kubernetes"),
        (("--value.batch_size", "0"), "batch_size"),
        (("--kubernetes.gpus_per_node", "3"), "3"),  # the batch of 64 cannot be divided among them
    ],
)
def test_mistakes_are_one_line_before_anything_is_applied(monkeypatch, capsys, flags, said):
    monkeypatch.setattr(kubernetes, "submit", lambda manifests: pytest.fail("it was applied"))
    assert submit.main(["--stage", "all", "--cluster", "kubernetes", *flags]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and said in lines[0]


KUBECTL = """#!{python}
import json, os, pathlib, sys
here = pathlib.Path({folder!r})
args = sys.argv[1:]
text = sys.stdin.read() if "-f" in args and "-" in args else ""
with (here / "calls").open("a") as file:
    file.write(json.dumps([args, text]) + "\\n")
answer = here / ("-".join(args[:1]) + ("-dry" if "--dry-run=server" in args else ""))
if answer.exists():
    code, _, said = answer.read_text().partition("\\n")
    print(said, file=sys.stdout if code == "0" else sys.stderr)
    sys.exit(int(code))
print('{{"items": []}}')
"""


@pytest.fixture
def kubectl(tmp_path, monkeypatch):
    """A program that writes down its calls; `answers` are code and text by its first word."""
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "kubectl"
    program.write_text(KUBECTL.format(python=sys.executable, folder=str(tmp_path)))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")

    class Fake:
        def answer(self, what: str, text: str, code: int = 0) -> None:
            (tmp_path / what).write_text(f"{code}\n{text}")

        @property
        def calls(self) -> list[tuple[list[str], str]]:
            path = tmp_path / "calls"
            return [tuple(json.loads(line)) for line in path.read_text().splitlines()] if path.exists() else []

    return Fake()


def present(name: str, component: str = "value", **spec) -> dict:
    args = spec.pop("args", ["train", "--config", "demo"])
    condition = spec.pop("condition", None)
    return {
        "metadata": {
            "name": name,
            "creationTimestamp": "2026-01-01T00:00:00Z",
            "labels": {"app.kubernetes.io/component": component},
        },
        "spec": {"parallelism": 1, "template": {"spec": {"containers": [{"args": args}]}}, **spec},
        "status": {"conditions": [{"type": condition, "status": "True"}]} if condition else {},
    }


def applied(kubectl) -> list[list[str]]:
    """Names of the Jobs of each apply, dry runs first."""
    texts = [text for args, text in kubectl.calls if args[0] == "apply"]
    return [[d["metadata"]["name"] for d in yaml.safe_load_all(text) if d["kind"] == "Job"] for text in texts]


def test_a_dry_run_by_the_server_comes_first(kubectl):
    assert kubernetes.submit(render()) == ["hvd-value", "hvd-awr"]
    assert [args[0] for args, _ in kubectl.calls] == ["get", "apply", "apply"]
    assert [("--dry-run=server" in args) for args, _ in kubectl.calls if args[0] == "apply"] == [True, False]
    assert applied(kubectl) == [["hvd-value", "hvd-awr", "hvd-awr-gate"]] * 2


def test_what_the_server_refuses_changes_nothing(kubectl):
    kubectl.answer("apply-dry", "Error from server (Forbidden): jobs.batch is forbidden", 1)
    with pytest.raises(UserError, match="the cluster refuses the manifests: Error from server"):
        kubernetes.submit(render())
    assert [args[0] for args, _ in kubectl.calls] == ["get", "apply"]


def test_a_silent_server_is_no_mistake(kubectl):
    kubectl.answer("get", "The connection to the server 10.0.0.1 was refused - did you specify the right host", 1)
    with pytest.raises(Failed, match="kubectl get: The connection to the server"):
        kubernetes.submit(render())


def test_a_job_that_lives_is_left_alone(kubectl, capsys):
    """To apply a policy Job that the gate has released would pause it."""
    gate = present("hvd-awr-gate", "gate", args=["gate", "--policy-job", "hvd-awr"])
    kubectl.answer("get", json.dumps({"items": [present("hvd-awr", "policy"), present("hvd-value"), gate]}))
    kubernetes.submit(render())
    assert applied(kubectl) == [[]] * 2
    assert "Job hvd-awr is at work already; it is left as it is" in capsys.readouterr().out


def test_jobs_that_have_ended_make_room_for_their_successors(kubectl):
    gate = present("hvd-awr-gate", "gate", condition="Failed", args=["gate", "--policy-job", "hvd-awr"])
    waits = present("hvd-awr", "policy", parallelism=0)
    kubectl.answer("get", json.dumps({"items": [present("hvd-value", condition="Complete"), gate, waits]}))
    kubernetes.submit(render())
    deletes = [args for args, _ in kubectl.calls if args[0] == "delete"]
    assert [args[:5] for args in deletes] == [["delete", "jobs", "hvd-value", "hvd-awr", "hvd-awr-gate"]]
    assert applied(kubectl)[1] == ["hvd-value", "hvd-awr", "hvd-awr-gate"]


def test_a_gate_that_is_about_to_end_makes_room_too(kubectl):
    """It has seen the policy Job's end, and would not release the successor."""
    gate = present("hvd-awr-gate", "gate", args=["gate", "--policy-job", "hvd-awr"])
    ended = [present("hvd-value", condition="Complete"), present("hvd-awr", "policy", condition="Complete")]
    kubectl.answer("get", json.dumps({"items": [*ended, gate]}))
    kubernetes.submit(render())
    (deleted,) = [args[2:5] for args, _ in kubectl.calls if args[0] == "delete"]
    assert set(deleted) == {"hvd-value", "hvd-awr", "hvd-awr-gate"}
    assert applied(kubectl)[1] == ["hvd-value", "hvd-awr", "hvd-awr-gate"]


def test_a_claim_that_is_there_is_left_alone(kubectl):
    claim = {"kind": "PersistentVolumeClaim", "metadata": {"name": "hvd-storage"}}
    kubernetes.submit([claim, *render()])
    assert applied_claims(kubectl) == 2
    kubectl.answer("get", json.dumps({"items": [present("hvd-storage")]}))
    kubernetes.submit([claim, *render()])
    assert applied_claims(kubectl) == 2


def applied_claims(kubectl) -> int:
    texts = [text for args, text in kubectl.calls if args[0] == "apply"]
    return sum(doc["kind"] == "PersistentVolumeClaim" for text in texts for doc in yaml.safe_load_all(text))


def test_no_kubectl_is_said(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert submit.main(["--stage", "value", "--cluster", "kubernetes"]) == 2
    assert "there is no kubectl on this machine" in capsys.readouterr().err


def test_without_a_checkout_it_says_so(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(kubernetes, "K8S", tmp_path / "k8s")
    assert submit.main(["--stage", "value", "--cluster", "kubernetes", "--dry-run"]) == 2
    assert "reads the manifests of a checkout" in capsys.readouterr().err


def test_a_file_that_is_not_its_copy_in_the_base_is_refused(monkeypatch, tmp_path):
    shutil.copytree(ROOT / "k8s", tmp_path / "k8s")
    with (tmp_path / "k8s" / "value-job.yaml").open("a") as file:
        file.write("# mine\n")
    monkeypatch.setattr(kubernetes, "K8S", tmp_path / "k8s")
    with pytest.raises(UserError, match=r"k8s/value-job.yaml and its copy .*k8s/base/value-job.yaml, .* differ"):
        render()


# The claim is applied by itself; and the order is a promise of both stages together
SEPARATE = {"all": ("references",), "value": ("references", "order"), "policy": ("references", "order")}


@pytest.mark.parametrize("stage", ["value", "policy", "all"])
@pytest.mark.parametrize("asked", [{}, {"name": "exp2", "gpus_per_node": 8}, {"gpus_per_node": 0}])
def test_what_is_rendered_keeps_the_promises_of_the_files(stage, asked):
    """Security, exit codes, variables, names: tests/k8s."""
    left_out = (*SEPARATE[stage], *(["gpus"] if asked.get("gpus_per_node") == 0 else []))
    keeps(render(stage=stage, **asked), but=left_out)


@pytest.mark.parametrize("stage", ["value", "policy", "all"])
@pytest.mark.parametrize("overlay", ["smoke", "multi-node", "gcs", "single-node"])
def test_overlays_keep_them_too(monkeypatch, stage, overlay):
    program = manifests.kubectl()
    if not program:
        pytest.skip(manifests.NO_KUBECTL)
    monkeypatch.setenv("PATH", f"{Path(program).parent}:/usr/bin:/bin")
    nodes = 3 if overlay == "multi-node" else 1
    found = render(stage=stage, nodes=nodes, overlay=str(ROOT / "k8s" / "overlays" / overlay))
    left_out = (*SEPARATE[stage], *(["gpus", "exit_codes"] if overlay == "smoke" else []))
    keeps(found, but=left_out)
    if overlay == "multi-node":
        job = next(doc for doc in found if doc["kind"] == "Job")
        assert job["spec"]["completions"] == 3 and job["spec"]["backoffLimit"] == 9
    accounts = {doc["metadata"]["name"] for doc in found if doc["kind"] == "ServiceAccount"}
    for doc in (doc for doc in found if doc["kind"] == "Job"):
        assert doc["spec"]["template"]["spec"].get("serviceAccountName", "default") in {*accounts, "default"}
