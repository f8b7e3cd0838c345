"""Manifests with what the user asked for put in."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from hvd import overrides, stages
from hvd.clusters.base import Request
from hvd.clusters.kubernetes import evaluation, manifests, site, submission
from hvd.errors import UserError
from hvd.fields import leaves
from hvd.launch import submit
from tests.k8s import render as shipped
from tests.k8s.promises import environment, keeps
from tests.k8s.render import Document, containers, documents, jobs


def render(*argv: str, stage: str = "all", nodes: int = 1, after: str = "", overwrite: bool = False, **asked):
    options = ("--config", "demo", *argv)
    request = Request(overrides.experiment(options), stage, options, nodes, overwrite, after)
    return manifests.render(request, site.Settings(**asked))


def job(docs: list[Document], component: str) -> Document:
    (found,) = [one for one in jobs(docs) if shipped.component(one) == component]
    return found


def args(docs: list[Document], component: str, place: int = -1) -> list[str]:
    return containers(job(docs, component))[place]["args"]


def test_the_files_are_what_is_rendered_by_default(capsys):
    """What `kubectl apply -f k8s/value-job.yaml -f k8s/awr-job.yaml` applies, and the evaluation behind it."""
    files = [doc for doc in documents("base") if doc["kind"] not in ("PersistentVolumeClaim", "NetworkPolicy")]
    evaluation.behind_the_gate(files, "hvd-evaluate")
    *first, last = render()
    assert first == files and last["metadata"]["name"] == "hvd-evaluate"
    assert submit.main(["--stage", "all", "--cluster", "kubernetes", "--dry-run"]) == 0
    assert list(yaml.safe_load_all(capsys.readouterr().out)) == [*first, last]


def test_options_go_to_every_container_and_overwrite_to_the_training():
    docs = render("--exp_name", "x", "--value.batch_size", "8", overwrite=True)
    options = ["--config", "demo", "--exp_name", "x", "--value.batch_size", "8"]
    assert args(docs, "value", 0) == ["prepare", *options]
    assert args(docs, "value") == ["train-value", *options, "--overwrite"]
    assert args(docs, "policy") == ["train-policy", *options, "--overwrite"]
    gate = ["gate", "--value-job", "hvd-x-value", "--policy-job", "hvd-x-awr", "--pods", "1"]
    assert args(docs, "gate") == [*gate, "--evaluate-job", "hvd-x-evaluate", *options]
    wanted = [
        step
        for group in stages.parts(overrides.experiment(options), "evaluate", overwrite=True)["evaluate"]
        for step in group
    ]
    assert [one["args"] for one in containers(job(docs, "evaluate"))] == [list(step.words(options)) for step in wanted]
    assert len(wanted) == 12 and wanted[0].extra[-1] == "--overwrite", "baselines, evaluations, report"


def test_one_stage():
    assert [doc["metadata"]["name"] for doc in render(stage="value")] == ["hvd-value"]
    policy = render(stage="policy")
    assert {doc["kind"] for doc in policy} == {"Job", "ServiceAccount", "Role", "RoleBinding"}
    assert job(policy, "policy")["spec"]["parallelism"] == 0, "the gate verifies the value run"
    assert args(policy, "gate")[:3] == ["gate", "--value-job", ""] and "--evaluate-job" not in args(policy, "gate")
    (evaluation_,) = render(stage="evaluate")
    assert evaluation_["metadata"]["name"] == "hvd-evaluate" and evaluation_["spec"]["parallelism"] == 1


@pytest.mark.parametrize("nodes, gpus, baselines, each", [(1, 8, "true", 8), (1, 8, "false", 1), (1, 0, "false", 0)])
def test_the_evaluation_is_one_pod_and_takes_one_gpu_where_it_trains_nothing(nodes, gpus, baselines, each):
    docs = render("--evaluate.baselines", baselines, nodes=nodes, gpus_per_node=gpus)
    for container in containers(job(docs, "evaluate")):
        assert container["resources"]["limits"].get("nvidia.com/gpu", 0) == each
    assert containers(job(docs, "policy"))[-1]["resources"]["limits"].get("nvidia.com/gpu", 0) == gpus


@pytest.mark.parametrize("flags", [(), ("--policy.weighting", "none"), ("--policy.value_run", "/storage/runs/b/value")])
def test_the_gate_may_read_the_job_that_it_waits_for(flags):
    docs = render(*flags, stage="policy", after="other-value")
    assert args(docs, "gate")[2] == "other-value" and job(docs, "policy")["spec"]["parallelism"] == 0
    (role,) = [doc for doc in docs if doc["kind"] == "Role"]
    assert [rule["resourceNames"] for rule in role["rules"]] == [["other-value"], ["hvd-awr"]]


def test_imitation_waits_for_nothing():
    docs = render("--policy.weighting", "none", stage="policy")
    assert len(docs) == 1 and job(docs, "policy")["spec"]["parallelism"] == 1


@pytest.mark.parametrize("stage", ["policy", "all"])
def test_a_value_run_that_is_given_leaves_nothing_to_wait_for(stage):
    docs = render("--policy.value_run", "/storage/runs/other/value", stage=stage)
    whole = stage == "all"
    assert [shipped.component(one) for one in jobs(docs)] == ["policy", *(["gate", "evaluate"] if whole else [])]
    assert job(docs, "policy")["spec"]["parallelism"] == 1
    assert [one["name"] for one in containers(job(docs, "policy"))] == [*(["prepare"] if whole else []), "train"]
    assert all("/storage/runs/other/value" in one["args"] for doc in jobs(docs) for one in containers(doc))
    assert not whole or args(docs, "gate")[:3] == ["gate", "--value-job", ""]


def test_every_setting_has_its_place():
    docs = render(image="reg/hvd:1", claim="nfs", gpus_per_node=4, gpu="h100-80gb", cpus=32, memory="200Gi")
    for component in ("value", "policy"):
        trainer = containers(job(docs, component))[-1]
        assert trainer["resources"]["limits"] == {"memory": "200Gi", "nvidia.com/gpu": 4}
        assert trainer["resources"]["requests"] == {"cpu": "32", "memory": "200Gi"}
        env = environment(trainer)
        assert env["HVD_EXPECT_GPUS"]["value"] == "1" and "latency_hiding" in env["XLA_FLAGS"]["value"]
        assert "HVD_IMAGE" not in env, "a tag may mean another image tomorrow"
    for one in jobs(docs):  # the gate, too: it reads the claim that the stages write
        assert one["spec"]["template"]["spec"]["volumes"][0]["persistentVolumeClaim"]["claimName"] == "nfs"
        assert {container["image"] for container in containers(one)} == {"reg/hvd:1"}
    docs = render(image="reg/hvd@sha256:ab", gpus_per_node=0, queue="robots", priority="low")
    for component in ("value", "policy"):
        trainer, labels = containers(job(docs, component))[-1], job(docs, component)["metadata"]["labels"]
        assert "nvidia.com/gpu" not in trainer["resources"]["limits"]
        assert environment(trainer)["HVD_EXPECT_GPUS"]["value"] == "0"
        assert environment(trainer)["HVD_IMAGE"]["value"] == "reg/hvd@sha256:ab"
        assert labels["kueue.x-k8s.io/queue-name"] == "robots"
        assert job(docs, component)["spec"]["template"]["spec"]["priorityClassName"] == "low"


def test_every_setting_is_in_the_documents():
    page = (shipped.ROOT / "docs" / "kubernetes.md").read_text()
    for name in leaves(site.Settings):
        assert f"`--kubernetes.{name} " in page, name


def test_another_name_for_all_of_an_experiment():
    """And for nothing else: not for the user's own options."""
    docs = render("--exp_name", "hvd-value", name="exp2")
    assert [doc["metadata"]["name"] for doc in docs] == [
        "exp2-value",
        "exp2-awr",
        *["exp2-awr-gate"] * 4,
        "exp2-evaluate",
    ]
    keeps(docs, but=("references", "network"))  # rights, order, accounts: by the new names
    assert args(docs, "value")[-2:] == ["--exp_name", "hvd-value"]
    text = json.dumps(docs).replace('"--exp_name", "hvd-value"', "")
    assert "hvd-value" not in text and "hvd-awr" not in text and "hvd-credentials" in text and "hvd-storage" in text


def test_names_are_made_of_the_experiment_and_of_the_user(monkeypatch):
    def names(*argv: str, user: str = "root") -> list[str]:
        monkeypatch.setattr("getpass.getuser", lambda: user)
        return [one["metadata"]["name"] for one in jobs(render(*argv))]

    files = ["hvd-value", "hvd-awr", "hvd-awr-gate", "hvd-evaluate"]
    assert names() == names(user="anna") == files, "the files' own experiment"
    assert names("--exp-name=a") == [name.replace("hvd-", "hvd-a-") for name in files]
    assert names("--exp_name", "a", user="anna")[0] == "hvd-anna-a-value"
    alike = ["tau0.7", "tau0_7", "tau0-7", "Tau0-7", "x" * 90, "x" * 91, "日本", "日", f"{'x' * 37}-y", f"{'x' * 37}-z"]
    made = [names("--exp_name", name)[0] for name in alike]
    assert len({*made}) == len(alike) and made[2] == "hvd-tau0-7-value"
    for name in made:
        keeps(
            render(name=name.removesuffix("-value")), but=("references", "network")
        )  # it keeps --kubernetes.name's rule
        site.load(overrides.split_flags(["--kubernetes.name", name.removesuffix("-value")]))
    services = [doc for doc in render("--exp_name=a", nodes=2) if doc["kind"] == "Service"] if shipped.kubectl() else []
    assert {doc["metadata"]["name"] for doc in services} <= {"hvd-a-value", "hvd-a-awr"}


def test_a_second_experiment_by_hand(tmp_path):
    """The lines of docs/kubernetes.md, run word for word: what they write is what the launcher would apply."""
    page = (shipped.ROOT / "docs" / "kubernetes.md").read_text()
    lines = [line.strip() for line in page.splitlines() if line.startswith("    sed ")]
    assert len(lines) == 2
    shutil.copytree(shipped.K8S, tmp_path / "k8s")
    for line in lines:
        subprocess.run(["sh", "-c", line], cwd=tmp_path, check=True)
    written = [
        doc for name in ("b-value", "b-awr") for doc in yaml.safe_load_all((tmp_path / f"{name}.yaml").read_text())
    ]
    evaluation.behind_the_gate(written, "b-evaluate")
    assert written == render("--exp_name", "b", name="b")[:-1]


@pytest.mark.parametrize(
    "flags, said",
    [
        (("--kubernetes.name", "My_Exp"), "kubernetes.name 'My_Exp'"),
        (("--kubernetes.memory", "lots"), "kubernetes.memory 'lots' is not a size"),
        (("--kubernetes.gpus_per_node", "-2"), "must not be negative"),
        (("--kubernetes.cpus", "0"), "kubernetes.cpus 0 must be at least 1"),
        (("--kubernetes.image", "a b"), "must not hold spaces"),
        (("--kubernetes.nam", "x"), "nearest: --kubernetes.name"),
        (("--kubernetes.overlay", "k8s"), "no kustomization.yaml in it"),
        (("--after", "hvd-value"), "wait first: hvd jobs wait hvd-value"),
        (("--after", "hvd-awr", "--stage", "evaluate"), "wait first: hvd jobs wait hvd-awr"),
        (("--after", "17", "--stage", "policy"), "--after '17' is not the name of a Job"),
        (("--slurm.time", "1:00"), "--slurm.time is for --cluster slurm, this is kubernetes"),
        (("--value.batch_size", "0"), "batch_size"),
        (("--kubernetes.gpus_per_node", "3"), "3"),  # the batch of 64 cannot be divided among them
    ],
)
def test_mistakes_are_one_line_before_anything_is_applied(monkeypatch, capsys, flags, said):
    monkeypatch.setattr(submission, "submit", lambda *_: pytest.fail("it was applied"))
    stage = [] if "--stage" in flags else ["--stage", "all"]
    assert submit.main([*stage, "--cluster", "kubernetes", *flags]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and said in lines[0]


def test_without_a_checkout_it_says_so(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(manifests, "K8S", tmp_path / "k8s")
    assert submit.main(["--stage", "value", "--cluster", "kubernetes", "--dry-run"]) == 2
    assert "reads the manifests of a checkout" in capsys.readouterr().err


def test_a_file_that_is_not_its_copy_in_the_base_is_refused(monkeypatch, tmp_path):
    shutil.copytree(shipped.K8S, tmp_path / "k8s")
    with (tmp_path / "k8s" / "value-job.yaml").open("a") as file:
        file.write("# mine\n")
    monkeypatch.setattr(manifests, "K8S", tmp_path / "k8s")
    with pytest.raises(UserError, match=r"k8s/value-job.yaml and its copy .*k8s/base/value-job.yaml, .* differ"):
        render()


# The claim is applied by itself; and the order is a promise of both stages together
SEPARATE = {"all": ("references", "network")} | dict.fromkeys(
    ("value", "policy", "evaluate"), ("references", "network", "order")
)


@pytest.mark.parametrize("stage", SEPARATE)
@pytest.mark.parametrize("asked", [{}, {"name": "exp2", "gpus_per_node": 8}, {"gpus_per_node": 0}])
def test_what_is_rendered_keeps_the_promises_of_the_files(stage, asked):
    keeps(render(stage=stage, **asked), but=(*SEPARATE[stage], *(["gpus"] if asked.get("gpus_per_node") == 0 else [])))


@pytest.mark.parametrize("stage", SEPARATE)
@pytest.mark.parametrize("overlay", ["smoke", "multi-node", "gcs", "single-node"])
def test_overlays_keep_them_too(monkeypatch, tmp_path, stage, overlay):
    program = shipped.kubectl()
    if not program:
        pytest.skip(shipped.NO_KUBECTL)
    monkeypatch.setenv("PATH", f"{Path(program).parent}:/usr/bin:/bin")
    monkeypatch.setenv("KUBECACHEDIR", str(tmp_path))
    nodes, name = (3, "exp2") if overlay == "multi-node" else (1, "")
    docs = render(stage=stage, nodes=nodes, name=name, overlay=str(shipped.K8S / "overlays" / overlay))
    keeps(docs, but=(*SEPARATE[stage], *(["gpus", "exit_codes"] if overlay == "smoke" else [])))
    if overlay == "multi-node":
        spec = jobs(docs)[0]["spec"]
        pods = 1 if stage == "evaluate" else 3
        assert spec["completions"] == pods and spec["backoffLimit"] == 3 * pods
    accounts = {doc["metadata"]["name"] for doc in docs if doc["kind"] == "ServiceAccount"}
    for one in jobs(docs):
        assert one["spec"]["template"]["spec"].get("serviceAccountName", "default") in {*accounts, "default"}
