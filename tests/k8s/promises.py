"""What every shipped manifest promises, one function each, as assertions over its objects.

tests/k8s/test_promises.py holds the shipped manifests to them and shows that each can be broken;
tests/k8s/test_manifests.py holds what the launcher renders to them.
"""

import re
from collections.abc import Iterator

from hvd import errors
from hvd.runtime.processes import ENVIRONMENT
from tests.k8s.render import Document, component, containers, jobs

DAY = 24 * 3600
KINDS = {"Job", "JobSet", "NetworkPolicy", "PersistentVolumeClaim", "Service", "ServiceAccount", "Role", "RoleBinding"}
# Nothing else: no hostNetwork, hostPID, hostIPC
POD = {"automountServiceAccountToken", "containers", "enableServiceLinks", "initContainers", "restartPolicy"}
POD |= {"securityContext", "serviceAccountName", "terminationGracePeriodSeconds", "volumes", "subdomain", "affinity"}
POD |= {"priorityClassName"}
USER = {"runAsNonRoot": True, "runAsUser": 10001, "runAsGroup": 10001, "fsGroup": 10001}
USER |= {"fsGroupChangePolicy": "OnRootMismatch", "seccompProfile": {"type": "RuntimeDefault"}}
RIGHTS = {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}}
SECRET = re.compile(r"key|token|secret|password|credential", re.IGNORECASE)
OWNER = {"HVD_POD_UID": "metadata.uid", "HVD_JOB_NAME": "metadata.labels['job-name']"}
OWNER |= {"HVD_JOB_UID": "metadata.labels['controller-uid']"}
INDEX = "metadata.annotations['batch.kubernetes.io/job-completion-index']"
UNITS = {"m": 1e-3, "": 1, "k": 1e3, "M": 1e6, "G": 1e9, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}


def quantity(text: str | int) -> float:
    """A quantity of Kubernetes in its unit: 512Mi, 100m, 8."""
    match = re.fullmatch(r"([0-9.]+)([a-zA-Z]*)", str(text))
    assert match, text
    return float(match[1]) * UNITS[match[2]]


def environment(container: Document) -> dict[str, Document]:
    return {variable["name"]: variable for variable in container.get("env", ())}


def _field(container: Document, name: str) -> str:
    """The field of the pod that the variable takes."""
    return environment(container)[name]["valueFrom"]["fieldRef"]["fieldPath"]


def _pods(docs: list[Document]) -> Iterator[tuple[Document, Document]]:
    return ((job, job["spec"]["template"]["spec"]) for job in jobs(docs))


def _containers(docs: list[Document]) -> Iterator[Document]:
    return (container for job in jobs(docs) for container in containers(job))


def _trains(container: Document) -> bool:
    """A step of the evaluation may train, too."""
    return container["name"] not in ("prepare", "gate")


def _trainers(docs: list[Document]) -> Iterator[tuple[Document, Document]]:
    return ((job, containers(job)[-1]) for job in jobs(docs) if component(job) != "gate")


def security(docs: list[Document]) -> None:
    """What Restricted Pod Security asks for, and a root file system that cannot be written."""
    assert {doc["kind"] for doc in docs} <= KINDS
    for _, pod in _pods(docs):
        assert set(pod) <= POD and pod["securityContext"] == USER
    for container in _containers(docs):
        assert container["securityContext"] == RIGHTS
        assert all(set(port) == {"name", "containerPort"} for port in container.get("ports", ()))


def network(docs: list[Document]) -> None:
    """Only pods of hvd connect to pods of hvd; every pod is one of them."""
    (policy,) = (doc["spec"] for doc in docs if doc["kind"] == "NetworkPolicy")
    ours = {"matchLabels": {"app.kubernetes.io/name": "hvd"}}
    assert policy == {"podSelector": ours, "policyTypes": ["Ingress"], "ingress": [{"from": [{"podSelector": ours}]}]}
    for job in jobs(docs):
        assert job["spec"]["template"]["metadata"]["labels"].items() >= ours["matchLabels"].items()


def volumes(docs: list[Document]) -> None:
    """/tmp everywhere and /dev/shm for the trainers are writable, and bounded; nothing of the host's is mounted."""
    for job, pod in _pods(docs):
        kinds = {volume["name"]: next(iter(set(volume) - {"name"})) for volume in pod["volumes"]}
        assert set(kinds.values()) <= {"emptyDir", "persistentVolumeClaim", "csi"}
        empty = {volume["name"]: volume["emptyDir"] for volume in pod["volumes"] if "emptyDir" in volume}
        for name, volume in empty.items():
            assert "sizeLimit" in volume, name
            if volume.get("medium") == "Memory":  # it counts as the container's memory
                limit = containers(job)[-1]["resources"]["limits"]["memory"]
                assert quantity(volume["sizeLimit"]) < quantity(limit)
        for container in containers(job):
            mounts = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
            for path in ("/tmp", "/dev/shm") if _trains(container) else ("/tmp",):
                assert mounts[path]["name"] in empty and not mounts[path].get("readOnly"), path
            if _trains(container):
                assert empty[mounts["/dev/shm"]["name"]]["medium"] == "Memory"


def rights(docs: list[Document]) -> None:
    """Only the gate talks to the cluster: it may read the Job before it and patch those that it releases."""
    for job, pod in _pods(docs):
        assert pod["automountServiceAccountToken"] is (component(job) == "gate")
        assert pod["enableServiceLinks"] is False
    assert not any(doc["automountServiceAccountToken"] for doc in docs if doc["kind"] == "ServiceAccount")
    stages = {component(job): job for job in jobs(docs)}
    roles = [doc for doc in docs if doc["kind"] == "Role"]
    bindings = [doc for doc in docs if doc["kind"] == "RoleBinding"]
    if "gate" not in stages:
        assert not roles and not bindings
        return
    account = stages["gate"]["spec"]["template"]["spec"]["serviceAccountName"]
    (role,), (binding,) = roles, bindings
    args = containers(stages["gate"])[0]["args"]
    for rule, options, verb in zip(
        role["rules"], (("--value-job",), ("--policy-job", "--evaluate-job")), ("get", "patch"), strict=True
    ):
        names = [args[args.index(option) + 1] for option in options if option in args]
        assert names in ([""], rule["resourceNames"])  # "": only the run on the storage is looked at
        assert (rule["apiGroups"], rule["resources"], rule["verbs"]) == (["batch"], ["jobs"], [verb])
        assert len(rule) == 4 and len(rule["resourceNames"]) == len(names)
    assert binding["subjects"] == [{"kind": "ServiceAccount", "name": account}]
    assert binding["roleRef"]["name"] == role["metadata"]["name"]
    assert [component(job) for job, pod in _pods(docs) if pod.get("serviceAccountName") == account] == ["gate"]


def resources(docs: list[Document]) -> None:
    """Every container asks for CPUs and memory, and for no more memory than it may have."""
    for container in _containers(docs):
        requests, limits = container["resources"]["requests"], container["resources"]["limits"]
        assert "cpu" in requests and quantity(requests["memory"]) <= quantity(limits["memory"])


def gpus(docs: list[Document]) -> None:
    """The trainers have GPUs, and refuse to start without; nobody else has any."""
    for container in _containers(docs):
        trains = _trains(container)
        assert (container["resources"]["limits"].get("nvidia.com/gpu", 0) > 0) is trains
        assert not trains or environment(container)["HVD_EXPECT_GPUS"]["value"] == "1"


def ends(docs: list[Document]) -> None:
    """A pod has the time to save, is replaced by a new one, and its Job stays for the gate and for people."""
    for job, pod in _pods(docs):
        assert pod["restartPolicy"] == "Never"
        kept = next((doc for doc in docs if doc["kind"] == "JobSet"), job)["spec"]
        assert 7 * DAY <= kept["ttlSecondsAfterFinished"] <= 56 * DAY
        # a JobSet would do a Job that has gone anew
        assert kept is job["spec"] or "ttlSecondsAfterFinished" not in job["spec"]
    for job, trainer in _trainers(docs):
        seconds = job["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]
        assert 0 < float(environment(trainer)["HVD_GRACE_SECONDS"]["value"]) < seconds


def exit_codes(docs: list[Document]) -> None:
    """Disruptions, stops and lost companions are free; mistakes and errors are final; the rest has a few attempts."""
    disruption = {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}
    for job in jobs(docs):
        free = [errors.EXIT_STOPPED] if component(job) == "gate" else [errors.EXIT_LOST, errors.EXIT_STOPPED]
        rules = [("Ignore", free), ("FailJob", [errors.EXIT_FAILED, errors.EXIT_USER])]
        assert job["spec"]["podFailurePolicy"]["rules"] == [
            disruption,
            *(
                {"action": action, "onPodConditions": [], "onExitCodes": {"operator": "In", "values": codes}}
                for action, codes in rules
            ),
        ]
        assert job["spec"]["backoffLimit"] >= 1


def secrets(docs: list[Document]) -> None:
    """Credentials come from a Secret, one by one; nothing else comes from the cluster but the pod's own fields."""
    for container in _containers(docs):
        assert "envFrom" not in container
        for variable in container.get("env", ()):
            source = set(variable.get("valueFrom", {}))
            assert source <= {"secretKeyRef", "fieldRef"}
            assert not SECRET.search(variable["name"]) or source == {"secretKeyRef"}, variable["name"]
        assert not [word for word in container["args"] if SECRET.search(word)]


def images(docs: list[Document]) -> None:
    """One image of ours for all, with a tag that says what it is."""
    named = {container["image"] for container in _containers(docs)}
    name, _, tag = min(named).rpartition("/")[2].partition(":")
    assert len(named) == 1 and name == "hvd" and tag not in ("", "latest")


def labels(docs: list[Document]) -> None:
    """The recommended ones everywhere, and the same on a Job's pods: `hvd jobs` and the overlays select by them."""
    for doc in [*docs, *jobs(docs)]:
        assert doc["metadata"]["labels"]["app.kubernetes.io/name"] == "hvd" and component(doc)
    for job in jobs(docs):
        wanted = {key: text for key, text in job["metadata"]["labels"].items() if key.startswith("app.")}
        assert wanted.items() <= job["spec"]["template"]["metadata"]["labels"].items() and len(wanted) == 3


def references(docs: list[Document]) -> None:
    """Volumes, claims and accounts that are named are there; each container works on a volume."""
    named = {(doc["kind"], doc["metadata"]["name"]) for doc in docs}
    for job, pod in _pods(docs):
        mounts = [mount for container in containers(job) for mount in container["volumeMounts"]]
        assert {mount["name"] for mount in mounts} == {volume["name"] for volume in pod["volumes"]}
        for container in containers(job):
            paths = [mount["mountPath"] for mount in container["volumeMounts"]]
            assert len(paths) == len(set(paths))
            assert any(f"{container['workingDir']}/".startswith(f"{path}/") for path in paths)
        claims = [v["persistentVolumeClaim"]["claimName"] for v in pod["volumes"] if "persistentVolumeClaim" in v]
        assert {("PersistentVolumeClaim", claim) for claim in claims} <= named
        account = pod.get("serviceAccountName")
        assert account is None or ("ServiceAccount", account) in named


def variables(docs: list[Document]) -> None:
    """$(NAME) is replaced only where NAME stands before it; no variable is set twice; the trainer knows its Job."""
    for container in _containers(docs):
        names = [variable["name"] for variable in container.get("env", ())]
        assert len(names) == len(set(names))
        for place, variable in enumerate(container.get("env", ())):
            assert set(re.findall(r"\$\((\w+)\)", variable.get("value", ""))) <= set(names[:place])
    for _, trainer in _trainers(docs):
        assert {name: _field(trainer, name) for name in OWNER} == OWNER
        assert re.fullmatch(r"/storage/.*/\$\(HVD_JOB_UID\)", environment(trainer)["HVD_JOB_DIR"]["value"])


def order(docs: list[Document]) -> None:
    """The policy does not start by itself: the gate releases it, or the JobSet creates it after the value stage."""
    stages = {component(job): job for job in jobs(docs)}
    pods = {stage: job["spec"]["parallelism"] for stage, job in stages.items()}
    assert pods["value"] == stages["value"]["spec"]["completions"]
    if "gate" in stages:
        args = containers(stages["gate"])[0]["args"]
        names = [stages[stage]["metadata"]["name"] for stage in ("value", "policy")]
        assert pods["policy"] == 0
        wanted = ["--value-job", names[0], "--policy-job", names[1]]
        wanted += ["--pods", str(stages["policy"]["spec"]["completions"])]
        if "evaluate" in stages:
            assert pods["evaluate"] == 0
            wanted += ["--evaluate-job", stages["evaluate"]["metadata"]["name"]]
        assert args[1 : args.index("--config")] == wanted
        return
    (jobset,) = [doc for doc in docs if doc["kind"] == "JobSet"]
    first, second = jobset["spec"]["replicatedJobs"]
    assert "dependsOn" not in first and second["dependsOn"] == [{"name": first["name"], "status": "Complete"}]
    assert pods["policy"] == stages["policy"]["spec"]["completions"]


def processes(docs: list[Document]) -> None:
    """Several pods of a Job find each other: index, headless Service, coordinator; and lie on different nodes."""
    services = {doc["metadata"]["name"]: doc["spec"] for doc in docs if doc["kind"] == "Service"}
    for job, trainer in _trainers(docs):
        spec, pod, name = job["spec"], job["spec"]["template"]["spec"], job["metadata"]["name"]
        if not services or component(job) == "evaluate":
            assert not {*ENVIRONMENT} & {*environment(trainer)} and "subdomain" not in pod
            assert spec["completions"] == 1 and "completionMode" not in spec
            continue
        ours = {"batch.kubernetes.io/job-name": name}
        assert spec["completionMode"] == "Indexed" and spec["backoffLimit"] >= 3 * spec["completions"]
        assert {_field(container, "HVD_PROCESS_ID") for container in containers(job)} == {INDEX}
        assert environment(trainer)["HVD_NUM_PROCESSES"]["value"] == str(spec["completions"])
        host, _, port = environment(trainer)["HVD_COORDINATOR"]["value"].partition(":")
        assert host == f"{name}-0.{pod['subdomain']}"
        assert port in [str(one["containerPort"]) for one in trainer["ports"]]
        service = services[pod["subdomain"]]
        assert service["clusterIP"] == "None" and service["publishNotReadyAddresses"] is True
        assert service["selector"] == ours
        (apart,) = pod["affinity"]["podAntiAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
        assert apart == {"topologyKey": "kubernetes.io/hostname", "labelSelector": {"matchLabels": ours}}


PROMISES = {
    promise.__name__: promise
    for promise in (
        security, network, volumes, rights, resources, gpus, ends, exit_codes, secrets, images, labels, references,
        variables, order, processes,
    )
}  # fmt: skip


def keeps(docs: list[Document], but: tuple[str, ...] = ()) -> None:
    """Every promise, but for those named."""
    for name, promise in PROMISES.items():
        if name not in but:
            promise(docs)
