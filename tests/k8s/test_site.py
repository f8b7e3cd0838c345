"""What a site wants of Kubernetes: where settings come from, and what they put into the pods."""

from pathlib import Path

import pytest
import yaml

from hvd import cli, overrides
from hvd.clusters import base
from hvd.clusters.kubernetes import site
from hvd.clusters.kubernetes.cluster import Kubernetes
from hvd.clusters.kubernetes.site import Settings
from hvd.errors import UserError
from hvd.launch.submit import main
from hvd.site import files as site_files
from tests.k8s import render as shipped
from tests.k8s.conftest import a_job, a_pod, live
from tests.k8s.promises import environment
from tests.k8s.render import Document, containers, documents, find, jobs
from tests.k8s.test_manifests import job, render


@pytest.fixture
def files(tmp_path, monkeypatch) -> dict[str, Path]:
    """Where the team's file, the one of $HVD_SITE and the user's own would be; there is none."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("HVD_SITE", raising=False)
    monkeypatch.setattr(site_files, "TEAM_FILE", tmp_path / "etc.toml")
    (tmp_path / ".config" / "hvd").mkdir(parents=True)
    return {
        "etc": site_files.TEAM_FILE,
        "shared": tmp_path / "s.toml",
        "own": tmp_path / ".config" / "hvd" / "site.toml",
    }


def test_the_teams_file_the_users_own_and_the_flags(files, monkeypatch):
    assert site.load() == Settings()
    files["etc"].write_text('partition = "for-slurm"\n[kubernetes]\nnamespace = "etc"\nimage = "etc"\nqueue = "etc"')
    files["own"].write_text('[kubernetes]\nimage = "own"\nenv = ["A=1", "B=x y"]')
    found = site.load(overrides.split_flags(["--kubernetes.queue", "flag", "--kubernetes.env", "C=3", "D="]))
    assert (found.namespace, found.image, found.queue, found.env) == ("etc", "own", "flag", ("C=3", "D="))
    several = [
        "--kubernetes.env",
        "C=3",
        "--kubernetes.image=i",
        "--kubernetes.env",
        "D=4",
        "E=",
        "--kubernetes.image=j",
    ]
    found = site.load(overrides.split_flags(several))
    assert (found.env, found.image) == (("C=3", "D=4", "E="), "j")
    files["shared"].write_text('[kubernetes]\nclaim = "shared"')
    monkeypatch.setenv("HVD_SITE", str(files["shared"]))
    assert (site.load().claim, site.load().image, site.load().namespace) == ("shared", "own", "")


@pytest.mark.parametrize(
    "text, said",
    [
        ("[kubernetes]\nimge = 'x'", "etc.toml: kubernetes: unknown field 'imge'; nearest: image"),
        ("[kubernetes]\nuser = 'x'", "etc.toml: kubernetes: user: 'x' is not a whole number"),
        ("kubernetes = 3", "etc.toml: kubernetes: 3 is not a group of fields"),
        ("[kubernetes", "etc.toml: "),
    ],
)
def test_mistakes_in_a_file(files, text, said):
    files["etc"].write_text(text)
    with pytest.raises(UserError) as error:
        site.load()
    assert said in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "flags, said",
    [
        (("--kubernetes.env", "A"), "must be NAME=VALUE"),
        (("--kubernetes.tolerations", "gpu:Always"), "must be KEY"),
        (("--kubernetes.node_selector", "gpu"), "must be LABEL=VALUE"),
        (("--kubernetes.affinity", '{"near": {}}'), "is no JSON object of nodeAffinity"),
        (("--kubernetes.affinity", "{"), "is no JSON object of nodeAffinity"),
        (("--kubernetes.gpu_resource", "mig"), "is not a name such as amd.com/gpu"),
        (("--kubernetes.namespace", "Robots"), "must be small letters"),
        (("--kubernetes.cpu_limit", "0"), "must be at least 1"),
    ],
)
def test_mistakes_in_flags(files, flags, said):
    with pytest.raises(UserError, match=f"kubernetes.*{said}"):
        site.load(overrides.split_flags(flags))


def test_what_every_pod_gets():
    near = '{"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": []}}}'
    asked: dict = {"namespace": "robots", "image_pull_secret": "regcred", "priority": "low", "affinity": near}
    asked |= {"node_selector": ("gpu=a100",), "tolerations": ("nvidia.com/gpu:NoSchedule", "team=x", "all")}
    docs = render(**asked, user=2000, group=3000, service_account="trainer")
    assert {doc["metadata"]["namespace"] for doc in docs} == {"robots"}
    for one in jobs(docs):
        pod = one["spec"]["template"]["spec"]
        assert pod["imagePullSecrets"] == [{"name": "regcred"}] and pod["priorityClassName"] == "low"
        assert pod["nodeSelector"] == {"gpu": "a100"} and [*pod["affinity"]] == ["nodeAffinity"]
        assert pod["tolerations"] == [
            {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"},
            {"key": "team", "operator": "Equal", "value": "x"},
            {"key": "all", "operator": "Exists"},
        ]
        rights = pod["securityContext"]
        assert (rights["runAsUser"], rights["runAsGroup"], rights["fsGroup"]) == (2000, 3000, 3000)
        gate = shipped.component(one) == "gate"
        assert pod["serviceAccountName"] == ("hvd-awr-gate" if gate else "trainer")
    for one in jobs(render(user=0)):
        rights = one["spec"]["template"]["spec"]["securityContext"]
        assert rights["runAsNonRoot"] and not {"runAsUser", "runAsGroup", "fsGroup"} & {*rights}


def test_variables_with_a_value_and_from_a_secret():
    secret = {"secretKeyRef": {"name": "hf", "key": "token"}}
    given = ("HTTPS_PROXY=http://p:3128", 'HF_TOKEN={"secretKeyRef": {"name": "hf", "key": "token"}}', 'J={"a": 1}')
    for one in jobs(render(env=(*given, "HVD_CACHE=/fast"))):
        for container in containers(one):
            found = environment(container)
            assert found["HTTPS_PROXY"]["value"] == "http://p:3128" and found["J"]["value"] == '{"a": 1}'
            assert found["HF_TOKEN"] == {"name": "HF_TOKEN", "valueFrom": secret}
            assert found["HVD_CACHE"]["value"] == "/fast" and len(found) == len(container["env"])


def test_limits_of_cpus_and_names_of_gpus():
    for one in jobs(render(cpu_limit=1)):
        for container in containers(one):
            assert container["resources"]["limits"]["cpu"] == "1"
            assert container["resources"]["requests"]["cpu"] in ("1", "100m")
    mig = job(render(gpu_resource="nvidia.com/mig-3g.40gb", gpus_per_node=2), "value")
    limits = containers(mig)[-1]["resources"]["limits"]
    assert limits == {"memory": "64Gi", "nvidia.com/mig-3g.40gb": 2}
    amd = job(render(gpu_resource="amd.com/gpu"), "value")
    assert containers(amd)[-1]["resources"]["limits"] == {"memory": "64Gi", "amd.com/gpu": 1}


def test_an_account_for_the_gate_that_somebody_else_has_made():
    docs = render(gate_account="hvd-gate")
    assert {doc["kind"] for doc in docs} == {"Job"}
    assert job(docs, "gate")["spec"]["template"]["spec"]["serviceAccountName"] == "hvd-gate"


@pytest.fixture
def overlay(kubectl, tmp_path):
    """A function: what kustomize makes of an overlay becomes `change` of the base."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "kustomization.yaml").touch()

    def of(change) -> list[str]:
        docs = [doc for doc in documents("base") if doc["kind"] not in ("PersistentVolumeClaim", "NetworkPolicy")]
        for doc in docs:
            change(doc)
        kubectl.answer("kustomize", yaml.safe_dump_all(docs))
        return ["--stage", "all", "--cluster", "kubernetes", "--kubernetes.overlay", str(tmp_path / "mine")]

    return of


def printed(capsys, argv: list[str]) -> list[Document]:
    assert main([*argv, "--dry-run"]) == 0
    return list(yaml.safe_load_all(capsys.readouterr().out))


def test_containers_of_the_users_own_stay_as_they_are(overlay, capsys):
    """An init container without args and env, and a sidecar that stands first."""
    chown = {"name": "chown", "image": "busybox:1", "command": ["chown", "10001", "/storage"]}
    proxy = {"name": "proxy", "image": "proxy:1", "args": ["--config", "proxy.toml"]}

    def change(doc: Document) -> None:
        if doc["kind"] == "Job":
            pod = doc["spec"]["template"]["spec"]
            pod["initContainers"] = [chown, *pod.get("initContainers", ())]
            pod["containers"].insert(0, proxy)

    asked = ["--kubernetes.image", "r/hvd:2", "--kubernetes.gpus_per_node", "2", "--kubernetes.env", "A=1"]
    docs = printed(capsys, [*overlay(change), "--exp-name", "mine", *asked])
    for one in jobs(docs):
        first, *ours = [c for c in containers(one) if c["name"] != "proxy"]
        assert first == chown and proxy in containers(one)
        assert {c["image"] for c in ours} == {"r/hvd:2"} and all("--exp-name mine" in " ".join(c["args"]) for c in ours)
    assert containers(job(docs, "value"))[-1]["resources"]["limits"]["nvidia.com/gpu"] == 2


def test_gpus_keep_the_name_that_an_overlay_gives_them(overlay, capsys):
    def change(doc: Document) -> None:
        if doc["kind"] == "Job" and shipped.component(doc) != "gate":
            limits = containers(doc)[-1]["resources"]["limits"]
            limits["nvidia.com/mig-1g.10gb"] = limits.pop("nvidia.com/gpu")

    docs = printed(capsys, [*overlay(change), "--kubernetes.gpus_per_node", "4"])
    limits = containers(job(docs, "value"))[-1]["resources"]["limits"]
    assert limits == {"memory": "64Gi", "nvidia.com/mig-1g.10gb": 4}


def test_what_an_overlay_has_taken_out_is_not_missed(overlay, capsys):
    def change(doc: Document) -> None:
        if doc["kind"] == "Job":
            pod = doc["spec"]["template"]["spec"]
            for name in ("securityContext", "volumes"):
                del pod[name]
            for container in containers(doc):
                container.pop("env", None)
                del container["resources"]

    asked = ["--kubernetes.gpu", "h100-80gb", "--kubernetes.gpus_per_node", "2", "--kubernetes.cpu_limit", "3"]
    docs = printed(capsys, [*overlay(change), *asked, "--kubernetes.user", "5", "--kubernetes.memory", "9Gi"])
    trainer = containers(job(docs, "value"))[-1]
    assert trainer["resources"]["limits"] == {"memory": "9Gi", "cpu": "3", "nvidia.com/gpu": 2}
    assert "XLA_FLAGS" in environment(trainer)
    argv = overlay(lambda doc: [c.pop("args") for c in containers(doc)] if doc["kind"] == "Job" else None)
    assert main([*argv, "--dry-run"]) == 2
    assert "its container prepare has no args" in capsys.readouterr().err


def everywhere(kubectl) -> set[tuple[str, ...]]:
    """The last words of all calls that a cluster answers."""
    asked = [args for args, _ in kubectl.calls() if args[0] not in ("kustomize", "version", "config")]
    return {tuple(args[-4:]) for args in asked}


def test_all_calls_go_to_the_context_and_namespace_that_are_named(kubectl, overlay, capsys):
    place = ["--kubernetes.context", "lab", "--kubernetes.namespace", "robots"]
    docs = render(stage="value", namespace="robots")
    kubectl.has([live(docs[0], condition="Complete")], [a_pod("hvd-value", "Succeeded")])
    view = '{"contexts": [{"name": "lab", "context": {}}], "clusters": [{"cluster": {"server": "https://x"}}]}'
    kubectl.answer("config view", view)
    assert main(["--stage", "value", "--cluster", "kubernetes", *place]) == 0
    said = capsys.readouterr().out
    assert "kubernetes: context lab (https://x), namespace robots" in said
    assert "hvd jobs logs hvd-value -f --kubernetes.context lab --kubernetes.namespace robots" in said
    for words in (["list"], ["logs", "hvd-value"], ["wait", "hvd-value"], ["cancel", "hvd-value", "--yes"]):
        assert cli.main(["jobs", *words, *place]) == 0
    assert everywhere(kubectl) == {("--context", "lab", "--namespace", "robots")}


def test_an_overlays_namespace_is_where_its_jobs_are_looked_for(kubectl, overlay):
    argv = overlay(lambda doc: doc["metadata"].update(namespace="robots"))
    kubectl.has([a_job("hvd-value", "value")])
    assert main([*argv, "--detach"]) == 2  # a Job that says nothing of what it runs
    assert {words[-2:] for words in everywhere(kubectl)} == {("--namespace", "robots")}


def test_a_context_that_kubectl_does_not_know(kubectl, capsys):
    kubectl.answer("config view", "error: cannot locate context nope", 1)
    assert main(["--stage", "value", "--cluster", "kubernetes", "--kubernetes.context", "nope"]) == 2
    assert "kubernetes.context nope: error: cannot locate context nope" in capsys.readouterr().err


def test_the_gate_has_the_pull_secrets_of_the_trainers_account(kubectl):
    kubectl.answer("get serviceaccount", '{"imagePullSecrets": [{"name": "regcred"}]}')
    assert main(["--stage", "all", "--cluster", "kubernetes", "--detach"]) == 0
    made = list(yaml.safe_load_all(kubectl.calls("create")[-1][1]))
    gate = find(made, "Job", "hvd-awr-gate")["spec"]["template"]["spec"]
    assert gate["imagePullSecrets"] == [{"name": "regcred"}]


def test_who_may_not_create_roles_has_the_launcher_release_the_policy(kubectl, monkeypatch, capsys):
    again: list[tuple[str, ...]] = []
    monkeypatch.setattr(base, "start_again", lambda words, folder: again.append(tuple(words)))
    kubectl.answer("auth can-i", "no")
    assert main(["--stage", "all", "--cluster", "kubernetes", "--exp-name", "a", "--detach"]) == 0
    assert "you may not create Roles in this namespace, so there is no gate" in capsys.readouterr().out
    assert again == [("--stage", "all", "--cluster", "kubernetes", "--exp-name", "a")]
    assert not kubectl.calls("delete")
    made = [doc for _, text in kubectl.calls("apply", "create") for doc in yaml.safe_load_all(text)]
    names = ["hvd-a-value", "hvd-a-awr", "hvd-a-evaluate"]
    assert {(doc["kind"], doc["metadata"]["name"]) for doc in made} == {("Job", name) for name in names}
    last = find(made, "Job", "hvd-a-evaluate")
    assert last["metadata"]["annotations"] == {"hvd/after": "hvd-a-awr", "hvd/pods": "1"}
    evaluation = live(last)
    evaluation["metadata"]["annotations"] |= last["metadata"]["annotations"]
    policy = live(find(made, "Job", "hvd-a-awr"))
    policy["metadata"]["annotations"] |= find(made, "Job", "hvd-a-awr")["metadata"]["annotations"]
    value = find(made, "Job", "hvd-a-value")
    gate = a_job("hvd-a-awr-gate", "gate", condition="Failed", args=("gate", "--policy-job", "hvd-a-awr"))
    kubectl.has([live(value), policy, evaluation, gate])  # an older gate, of somebody who may create Roles
    assert main(["--stage", "all", "--cluster", "kubernetes", "--exp-name", "a", "--detach"]) == 0
    assert not kubectl.calls("delete") and "hvd-a-awr is there already and does the same" in capsys.readouterr().out
    assert cli.main(["jobs", "wait", "hvd-a-awr", "--timeout", "0"]) == 124 and not kubectl.calls("patch")
    kubectl.has([live(value, condition="Failed"), policy, evaluation])
    assert cli.main(["jobs", "wait", "hvd-a-awr"]) == 1 and not kubectl.calls("patch")
    assert "never start (job hvd-a-value, which it waits for, failed)" in capsys.readouterr().out
    assert cli.main(["jobs", "wait", "hvd-a-evaluate"]) == 1 and not kubectl.calls("patch")
    assert "never start (job hvd-a-awr, which it waits for, will never start)" in capsys.readouterr().out
    kubectl.has([live(value, condition="Complete"), policy, evaluation])
    assert cli.main(["jobs", "wait", "hvd-a-evaluate", "--timeout", "0"]) == 124
    ((patch, _),) = kubectl.calls("patch")
    assert patch == ["patch", "job", "hvd-a-awr", "-p", '{"spec": {"parallelism": 1}}']
    assert [state.id for state in Kubernetes().dependents("hvd-a-value")] == names
    policy["status"] = live(policy, condition="Complete")["status"]
    kubectl.has([live(value, condition="Complete"), policy, evaluation])
    assert cli.main(["jobs", "wait", "hvd-a-evaluate", "--timeout", "0"]) == 124
    assert kubectl.calls("patch")[-1][0][2] == "hvd-a-evaluate"


def test_pods_of_the_smoke_overlay_stay_where_their_volume_is():
    """It is ReadWriteOnce; the gate's pod has it until the policy has ended."""
    for claim in ("", "mine"):
        folder = str(shipped.K8S / "overlays" / "smoke")
        docs = render(overlay=folder, claim=claim) if shipped.kubectl() and claim else documents("smoke")
        for one in jobs(docs):
            labels = one["spec"]["template"]["metadata"]["labels"]
            near = one["spec"]["template"]["spec"]["affinity"]["podAffinity"]
            (term,) = near["requiredDuringSchedulingIgnoredDuringExecution"]
            assert term["topologyKey"] == "kubernetes.io/hostname"
            assert term["labelSelector"]["matchLabels"] == {"hvd/volume": claim or "hvd-storage"}
            assert labels["hvd/volume"] == (claim or "hvd-storage")
