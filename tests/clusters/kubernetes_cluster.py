"""A real Kubernetes cluster of one node on this machine, for tests: ../shared/tools/kubernetes/cluster.sh brings it up.

Version 1.20.2, in network, mount and process namespaces of its own; needs root. kubectl is a newer one (1.32, Debian
trixie's), as users have it: the one of Debian 12 does not know `patches` in a kustomization.
"""

import json
import os
import shlex
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[2]
TOOLS = Path(os.environ.get("HVD_KUBERNETES_TOOLS", ROOT.parent / "shared" / "tools" / "kubernetes"))
CACHE = Path.home() / ".cache" / "hvd-test-kubernetes"
SUITE = "trixie"
UP_SECONDS = 240
# Added to the tool's script: pod logs of its own, no image is deleted because the machine's disk is rather full, and
# nobody waits until the files of a cluster that is down are deleted (many: the image's)
CHANGES = {
    "mount --make-rshared": "mkdir -p /var/log/pods; mount -t tmpfs tmpfs /var/log/pods; mount --make-rshared",
    "syncFrequency: 5s": "syncFrequency: 5s\nimageGCHighThresholdPercent: 100",
    '  rm -rf "$KUBE_DIR"\n': '  setsid rm -rf "$KUBE_DIR" >/dev/null 2>&1 </dev/null &\n',
}


def missing() -> str | None:
    """Why there can be no cluster here, or None."""
    if os.geteuid() != 0:
        return "no Kubernetes here: namespaces and daemons need root"
    if not (TOOLS / "cluster.sh").exists():
        return f"HVD_KUBERNETES_TOOLS: no cluster.sh in {TOOLS} and the variable is not set"
    if not shutil.which("containerd") or not (CACHE / "kubectl").exists():
        return "no containerd or kubectl: python -m tests.clusters.kubernetes_cluster"
    return None


def install() -> None:
    """A current kubectl in CACHE and, where the tools are, Debian's packages that the cluster runs on."""
    if (TOOLS / "cluster.sh").exists():
        subprocess.run([TOOLS / "cluster.sh", "install"], check=True)
    if (CACHE / "kubectl").exists():
        return
    CACHE.mkdir(parents=True, exist_ok=True)
    apt = CACHE / "apt"
    (apt / "lists" / "partial").mkdir(parents=True, exist_ok=True)
    sources = Path("/etc/apt/sources.list.d/debian.sources").read_text()
    mirror = next(line.split()[1] for line in sources.splitlines() if line.startswith("URIs:"))
    keys = "/usr/share/keyrings/debian-archive-keyring.gpg"
    (apt / "sources.list").write_text(f"deb [signed-by={keys}] {mirror} {SUITE} main\n")
    options = ["-o", f"Dir::Etc::sourcelist={apt / 'sources.list'}", "-o", "Dir::Etc::sourceparts=-"]
    options += ["-o", f"Dir::State::lists={apt / 'lists'}", "-o", f"Dir::Cache={apt}", "-o", "APT::Sandbox::User=root"]
    options += ["-o", "Dir::State::status=/dev/null"]  # what the machine knows of other sources does not count
    subprocess.run(["apt-get", *options, "-qq", "update"], check=True, cwd=apt)
    subprocess.run(["apt-get", *options, "-qq", "download", "kubectl"], check=True, cwd=apt)
    (package,) = apt.glob("kubectl_*.deb")
    subprocess.run(["dpkg", "-x", package, apt / "files"], check=True)
    shutil.move(apt / "files" / "usr" / "bin" / "kubectl", CACHE / "kubectl")
    shutil.rmtree(apt)


def script() -> Path:
    """cluster.sh with CHANGES, beside links to the files that it looks for beside itself."""
    folder = CACHE / "tools"
    folder.mkdir(parents=True, exist_ok=True)
    text = (TOOLS / "cluster.sh").read_text()
    for old, new in CHANGES.items():
        assert text.count(old) == 1, f"{TOOLS / 'cluster.sh'} has changed: {old!r}"
        text = text.replace(old, new)
    (folder / "cluster.sh").write_text(text)
    (folder / "cluster.sh").chmod(0o755)
    for path in TOOLS.iterdir():
        if path.name != "cluster.sh" and not (folder / path.name).exists():
            (folder / path.name).symlink_to(path)
    return folder / "cluster.sh"


class KubernetesCluster:
    """A cluster of its own; use as a context manager.

    Args:
        folder: for its records, its storage and the wrapper `bin/kubectl`, which works inside the cluster's network.
        images: archives to import.
    """

    def __init__(self, folder: Path, images: tuple[Path, ...]):
        self.folder, self._images = folder, images
        self.storage = folder / "storage"
        self._process: subprocess.Popen | None = None

    def __enter__(self) -> "KubernetesCluster":
        self.folder.mkdir(parents=True, exist_ok=True)
        ready = self.folder / "kubeconfig"
        inside = f'cp "$KUBECONFIG" {shlex.quote(str(ready))}.tmp && mv {shlex.quote(str(ready))}.tmp '
        inside += f"{shlex.quote(str(ready))} && exec cat"  # until our end of its input closes, however we end
        with (self.folder / "cluster.log").open("w") as log:
            self._process = subprocess.Popen(
                [script(), "run", "bash", "-c", inside],
                env=os.environ | {"IMAGES": " ".join(map(str, self._images)), "KEEP_LOGS": str(self.folder / "logs")},
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        try:
            until(lambda: ready.exists() or self._process.poll() is not None, "the cluster is up", UP_SECONDS)
            assert ready.exists(), (self.folder / "cluster.log").read_text()
            # its certificate lies in the cluster's own folder, which is visible here
            (self.folder / "bin").mkdir()
            wrapper = self.folder / "bin" / "kubectl"
            enter = shlex.join(self.enter())
            # its cache goes there too: without HOME kubectl would keep one in the working directory
            settings = f"KUBECONFIG={ready} KUBECACHEDIR={self.folder / 'cache'}"
            wrapper.write_text(f'#!/bin/sh\n{settings} exec {enter} {CACHE / "kubectl"} "$@"\n')
            wrapper.chmod(0o755)
            self.make_volume("shared", self.storage)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process is not None and self._process.stdin is not None
        self._process.stdin.close()  # the tool then takes everything down
        try:
            self._process.wait(120)
        except subprocess.TimeoutExpired:
            for child in psutil.Process(self._process.pid).children(recursive=True):
                child.kill()
            self._process.wait(30)

    def enter(self) -> list[str]:
        """The command that runs another one in the cluster's network."""
        assert self._process is not None
        for child in psutil.Process(self._process.pid).children(recursive=True):
            if child.cmdline() == ["cat"]:
                return ["nsenter", "-t", str(child.pid), "-n"]
        raise AssertionError((self.folder / "cluster.log").read_text())

    def make_volume(self, name: str, folder: Path, namespace: str = "") -> None:
        """An empty volume on a new folder of this machine. With a namespace, which is made, it is that one's, and the
        claim of k8s/storage.yaml is there; else it is for the first such claim."""
        folder.mkdir()
        os.chown(folder, 10001, 10001)
        for_whom = {"claimRef": {"namespace": namespace, "name": "hvd-storage"}} if namespace else {}
        volume = {
            "apiVersion": "v1",
            "kind": "PersistentVolume",
            "metadata": {"name": name},
            "spec": {
                "capacity": {"storage": "500Gi"},
                "accessModes": ["ReadWriteMany", "ReadWriteOnce"],
                "hostPath": {"path": str(folder)},
                **for_whom,
            },
        }
        self.kubectl("apply", "-f", "-", stdin=json.dumps(volume))
        if namespace:
            self.kubectl("create", "namespace", namespace)
            self.kubectl("apply", "-n", namespace, "-f", str(ROOT / "k8s" / "storage.yaml"))

    # ------------------------------------------------------------------------------------------------------- asking

    @property
    def path(self) -> str:
        """PATH with the wrapper first."""
        return f"{self.folder / 'bin'}:{os.environ['PATH']}"

    def call(self, *argv: str, stdin: str | None = None, cwd: Path | None = None, check: bool = True, **env: str):
        """A command that finds this cluster's kubectl; its output as text."""
        done = subprocess.run(
            argv,
            input=stdin,
            cwd=cwd,
            env=os.environ | {"PATH": self.path} | env,
            capture_output=True,
            text=True,
            check=False,
            timeout=900,
        )
        assert not check or done.returncode == 0, f"{shlex.join(argv)}\n{done.stdout}{done.stderr}"
        return done

    def inside(self, *argv: str) -> str:
        """A command in the cluster's network."""
        return self.call(*self.enter(), *argv).stdout

    def kubectl(self, *argv: str, stdin: str | None = None, check: bool = True) -> str:
        done = self.call("kubectl", *argv, stdin=stdin, check=check)
        return done.stdout if check else done.stdout + done.stderr

    def get(self, kind: str, *argv: str) -> Any:
        return json.loads(self.kubectl("get", kind, *argv, "-o", "json"))

    def job(self, name: str) -> dict[str, Any]:
        return self.get("job", name)

    def condition(self, name: str) -> str:
        """Complete, Failed or "" while it has not ended."""
        found = self.job(name)["status"].get("conditions") or ()
        return next((one["type"] for one in found if one["status"] == "True"), "")

    def pods(self, job: str) -> list[dict[str, Any]]:
        """Oldest first."""
        found = self.get("pods", "-l", f"job-name={job}")["items"]
        return sorted(found, key=lambda pod: pod["metadata"]["creationTimestamp"])

    def logs(self, job: str) -> str:
        """Of all pods of the Job that are left."""
        texts = []
        for pod in self.pods(job):
            name = pod["metadata"]["name"]
            texts.append(f"--- {name}: {pod['status'].get('phase')}\n")
            texts.append(self.kubectl("logs", name, "--all-containers", check=False))
        return "".join(texts)

    def wait(self, job: str, condition: str, seconds: float) -> None:
        """Until the Job has ended, which must be so."""
        until(lambda: self.condition(job), lambda: f"{job} has ended\n{self.logs(job)}", seconds, every=0.5)
        assert self.condition(job) == condition, self.logs(job)


def until(condition: Callable[[], object], what: str | Callable[[], str], seconds: float, every: float = 0.2) -> None:
    """Wait for it; an AssertionError that names it after so long."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not after {seconds:.0f} s: {what if isinstance(what, str) else what()}"
        time.sleep(every)


if __name__ == "__main__":
    install()
