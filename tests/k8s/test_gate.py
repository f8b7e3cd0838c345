"""The gate against an API server on loopback that says what the real one says (the real one: tests/clusters)."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from hvd.clusters.kubernetes import gate
from hvd.errors import Failed, UserError


def job(name: str, condition: str = "", why: str = "", parallelism: int = 1, generation: int = 1) -> dict:
    conditions = [{"type": condition, "status": "True", "reason": why, "message": "x"}] if condition else []
    return {
        "metadata": {"name": name, "generation": generation, "resourceVersion": "1"},
        "spec": {"parallelism": parallelism},
        "status": {"conditions": conditions},
    }


class Api:
    """Jobs by name; what was asked; answers that are given instead, one a request."""

    def __init__(self):
        self.jobs: dict[str, dict] = {}
        self.asked: list[tuple[str, str]] = []
        self.instead: list[tuple[int, str]] = []
        self.patched = lambda job: None

    def answer(self, method: str, path: str, body: bytes, token: str | None) -> tuple[int, str]:
        name = path.rpartition("/")[2]
        assert path == f"/apis/batch/v1/namespaces/lab/jobs/{name}" and token == "Bearer secret"
        self.asked.append((method, name))
        if self.instead:
            return self.instead.pop(0)
        if name not in self.jobs:
            return 404, json.dumps({"message": f'jobs.batch "{name}" not found'})
        found = self.jobs[name]
        if method == "PATCH":
            new = json.loads(body)["spec"]["parallelism"]
            if new != found["spec"]["parallelism"]:
                found["spec"]["parallelism"] = new
                found["metadata"]["generation"] += 1
        text = json.dumps(found)
        if method == "PATCH":
            self.patched(found)  # what happens to it afterwards
        return 200, text


@pytest.fixture
def api(tmp_path):
    found = Api()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            code, text = found.answer(self.command, self.path, body, self.headers["Authorization"])
            self.send_response(code)
            self.end_headers()
            self.wfile.write(text.encode())

        do_PATCH = do_GET

        def log_message(self, format, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        (tmp_path / "token").write_text("secret\n")
        (tmp_path / "namespace").write_text("lab")
        found.again = lambda: gate.Api(f"http://127.0.0.1:{server.server_port}", tmp_path)
        found.client = found.again()
        yield found
        server.shutdown()
        thread.join()


QUICK = {"appear": 0.3, "every": 0.02}


def test_it_waits_until_the_value_job_is_there_and_complete(api):
    def later() -> None:
        time.sleep(0.1)
        api.jobs["v"] = job("v")
        time.sleep(0.5)
        api.jobs["v"] = job("v", "Complete")

    thread = threading.Thread(target=later)
    thread.start()
    gate.await_complete(api.client, "v", **QUICK)
    thread.join()
    assert len(api.asked) > 3 and set(api.asked) == {("GET", "v")}


def test_the_clusters_api_is_not_asked_by_a_proxy(api, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")  # --kubernetes.env may set one, for the world outside
    monkeypatch.delenv("no_proxy", raising=False)
    api.jobs["v"] = job("v", "Complete")
    gate.await_complete(api.again(), "v", **QUICK)


def test_a_failed_value_job_is_said_with_its_reason(api):
    api.jobs["v"] = job("v", "Failed", "BackoffLimitExceeded")
    with pytest.raises(Failed, match="Job v failed, so the policy does not start: BackoffLimitExceeded: x"):
        gate.await_complete(api.client, "v", **QUICK)


def test_a_value_job_that_never_comes_and_one_that_goes(api):
    with pytest.raises(Failed, match="there is no Job v after 0 s"):
        gate.await_complete(api.client, "v", **QUICK)
    api.jobs["v"] = job("v")
    threading.Timer(0.1, api.jobs.clear).start()
    with pytest.raises(Failed, match="Job v has been deleted before it was complete"):
        gate.await_complete(api.client, "v", appear=10, every=0.02)


def test_an_api_server_that_restarts_is_asked_again(api, monkeypatch, capsys):
    monkeypatch.setattr(gate.time, "sleep", lambda seconds: None)
    api.jobs["v"] = job("v", "Complete")
    api.instead = [(503, "{}"), (200, "half an ans"), (500, json.dumps({"message": "etcd"}))]
    gate.await_complete(api.client, "v", **QUICK)
    assert len(api.asked) == 4 and capsys.readouterr().out.count("does not answer") == 1


@pytest.mark.parametrize("code", [401, 403])
def test_what_it_may_not_do_is_the_users_to_mend(api, code):
    api.instead = [(code, json.dumps({"message": "jobs are forbidden"}))]
    with pytest.raises(UserError, match="may not GET Job v: jobs are forbidden"):
        gate.await_complete(api.client, "v", **QUICK)


def test_the_policy_job_is_released_and_held_open_until_it_ends(api, capsys):
    api.jobs["p"] = job("p", parallelism=0)
    seen = []

    def patched(found: dict) -> None:
        seen.append(found["spec"]["parallelism"])
        if len(seen) == 3:  # kubectl apply of the same file
            found["spec"]["parallelism"] = 0
            found["metadata"]["generation"] += 1
        if len(seen) == 6:
            found["status"] = job("p", "Complete")["status"]

    api.patched = patched
    gate.hold_open(api.client, "p", 2, **QUICK)
    assert set(seen) == {2} and len(seen) == 7 and set(api.asked) == {("PATCH", "p")}
    printed = capsys.readouterr().out
    assert printed.count("Job p is released: 2 pod(s)") == 1
    assert printed.count("released again") == 1 and "Job p: COMPLETED" in printed


def test_a_policy_job_that_is_missing_or_deleted(api, capsys):
    with pytest.raises(Failed, match="there is no Job p to release"):
        gate.hold_open(api.client, "p", 1, **QUICK)
    api.jobs["p"] = job("p", parallelism=0)
    threading.Timer(0.2, api.jobs.clear).start()
    gate.hold_open(api.client, "p", 1, **QUICK)
    assert "Job p has been deleted" in capsys.readouterr().out


@pytest.mark.parametrize("policy", ["Complete", "Failed", "gone"])
def test_the_evaluation_is_released_behind_a_complete_policy(api, monkeypatch, policy):
    """Its run is verified first; without it the gate ends with why."""
    monkeypatch.setattr(gate.Api, "of_this_pod", lambda: api.client)
    done: list[str] = []
    monkeypatch.setattr(gate, "verify", lambda folder, stage, cfg: done.append(f"{stage} verified"))

    def patched(found: dict) -> None:
        name = found["metadata"]["name"]
        done.append(f"{name} released")
        if name == "p" and policy == "gone":
            del api.jobs["p"]
        else:
            found["status"] = job(name, policy if name == "p" else "Complete", "OOM")["status"]

    api.patched = patched
    api.jobs = {"v": job("v", "Complete"), "p": job("p", parallelism=0), "e": job("e", parallelism=0)}
    names = ["--value-job", "v", "--policy-job", "p", "--evaluate-job", "e", "--every", "0.02"]
    ended = {"Failed": "failed: OOM", "gone": "has been deleted"}
    if policy in ended:
        with pytest.raises(Failed, match=f"Job p, which Job e waits for, {ended[policy]}"):
            gate.main([*names, "--config", "demo"])
    else:
        assert gate.main([*names, "--config", "demo"]) == 0
    first = ["value verified", "p released"]
    assert [*dict.fromkeys(done)] == (first if policy in ended else [*first, "policy verified", "e released"])
    assert api.jobs["e"]["spec"]["parallelism"] == (0 if policy in ended else 1)


def test_outside_of_a_pod_it_says_so(monkeypatch):
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    with pytest.raises(UserError, match="hvd gate runs in a pod"):
        gate.main(["--policy-job", "p", "--config", "demo"])


@pytest.mark.parametrize(
    "argv, said",
    [(["--config", "demo"], "--policy-job"), (["--policy-job", "p", "--pods", "0", "--config", "demo"], "--pods 0")],
)
def test_a_mistake_is_one_line(argv, said):
    with pytest.raises(UserError, match=said):
        gate.main(argv)
