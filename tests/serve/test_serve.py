"""`hvd serve` in a process of its own, driven over a socket by openpi's own client."""

import copy
import dataclasses
import os
import re
import shutil
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus

from hvd import cli, overrides
from hvd.client import Client, connect
from hvd.errors import EXIT_USER, UserError
from hvd.serve import command as serve
from hvd.serve import sampler
from hvd.serve.observation import default_prompt
from tests import served
from tests.data.factory import CAMERAS, KEYS
from tests.serve.running import OPENPI_CLIENT
from tests.train import factory

pytestmark = OPENPI_CLIENT

KEY = "sixteen-letters!"
TOLERANCE = {"rtol": 2e-5, "atol": 2e-5}  # a batch of another size is summed in another order


@pytest.fixture(scope="module")
def run_folder(served_experiment) -> Path:
    return Path(served_experiment.policy_dir)


@pytest.fixture(scope="module")
def policy(run_folder):
    from hvd.train.inference import load_policy

    return load_policy(run_folder)


@pytest.fixture(scope="module")
def server(run_folder):
    with served.Served("--run", str(run_folder), "--port", "0", "--max-message-mb", "1") as running:
        yield running


@pytest.fixture
def client(server):
    made = server.client()
    yield made
    made._ws.close()


def direct(policy, observation: dict[str, Any], seed: int) -> np.ndarray:
    """[K,A]: what the policy does without a server."""
    images = {camera: image[None] for camera, image in observation["images"].items()}
    return policy.act(observation["state"][None], images, [observation["prompt"]], jax.random.key(seed))[0]


def test_a_reply_is_what_the_policy_does(client, policy):
    rng = np.random.default_rng(0)
    for size in ((32, 48), (28, 28), (61, 17)):
        observation, seed = served.observation(rng, size), int(rng.integers(2**31))
        reply = client.infer({**observation, "seed": seed})
        expected = direct(policy, observation, seed)
        assert reply["actions"].shape == (4, 21) and reply["seed"] == seed
        np.testing.assert_allclose(reply["actions"], expected, **TOLERANCE)
        assert not np.allclose(expected, direct(policy, observation, seed + 1), **TOLERANCE)
        lerobot = {KEYS[camera]: image for camera, image in observation["images"].items()}
        lerobot |= {"observation.state": observation["state"], "task": observation["prompt"], "seed": seed}
        np.testing.assert_array_equal(client.infer(lerobot)["actions"], reply["actions"])


def test_a_reply_names_the_seed_that_gives_it_again(client, policy):
    observation = served.observation(np.random.default_rng(1))
    first, second = client.infer(observation), client.infer(observation)
    assert not np.array_equal(first["actions"], second["actions"])
    np.testing.assert_allclose(first["actions"], direct(policy, observation, first["seed"]), **TOLERANCE)
    np.testing.assert_array_equal(client.infer({**observation, "seed": second["seed"]})["actions"], second["actions"])


def test_given_noise_is_used(client, policy):
    observation, seed = served.observation(np.random.default_rng(2)), 3
    noise = np.asarray(jax.random.normal(jax.random.key(seed), (1, 4, 32)))[0]
    reply = client.infer({**observation, "noise": noise})
    np.testing.assert_allclose(reply["actions"], direct(policy, observation, seed), **TOLERANCE)
    assert "seed" not in reply
    noise = np.concatenate([noise[:, :21], np.full((4, 11), 9.0)], axis=1)  # dims that the robot does not have
    np.testing.assert_array_equal(client.infer({**observation, "noise": noise})["actions"], reply["actions"])


def test_flow_steps_of_a_request(client, policy):
    observation = {**served.observation(np.random.default_rng(3)), "seed": 4}
    ten, two = client.infer(observation), client.infer({**observation, "num_flow_steps": 2})
    np.testing.assert_array_equal(client.infer({**observation, "num_flow_steps": 10})["actions"], ten["actions"])
    assert not np.allclose(two["actions"], ten["actions"], **TOLERANCE)


def test_a_batch_is_its_rows_one_by_one(client, policy):
    rng = np.random.default_rng(4)
    rows = [served.observation(rng) for _ in range(3)]
    images = {camera: np.stack([row["images"][camera] for row in rows]) for camera in CAMERAS}
    states = np.stack([row["state"] for row in rows])
    reply = client.infer({"state": states, "images": images, "prompt": "open the drawer", "seed": 7})
    assert reply["actions"].shape == (3, 4, 21) and reply["server_timing"]["batch_rows"] == 3
    for i, row in enumerate(rows):
        np.testing.assert_allclose(reply["actions"][i], direct(policy, row, 7 + i), **TOLERANCE)


def test_committed_actions_are_followed(policy):
    from hvd.serve.observation import RequestReader
    from hvd.serve.sampler import Sampler

    reader = RequestReader(policy.cfg, policy.transform, chunking=True)
    trained_so = copy.copy(policy)
    trained_so.cfg = dataclasses.replace(policy.cfg, policy=dataclasses.replace(policy.cfg.policy, prefix_max=2))
    sampler = Sampler(trained_so, (2,), chunking=True)
    plain: dict[str, Any] = {**served.observation(np.random.default_rng(5)), "seed": 5}
    old = direct(policy, plain, 6)
    sampler.warm(reader.read(plain, 0))
    free = sampler([reader.read(plain, 0)])[0][0]
    np.testing.assert_allclose(free, direct(policy, plain, 5), **TOLERANCE)
    requests = [reader.read(plain | {"prev_chunk_left_over": old[:3], "inference_delay": n}, 0) for n in (0, 2)]
    soft, hard = (rows[0] for rows in sampler(requests))
    np.testing.assert_allclose(sampler(requests[1:])[0][0], hard, **TOLERANCE)
    state = plain["state"][None]
    away = [np.abs(policy.transform.actions_in((x - old)[None, :2], state)).mean() for x in (free, soft, hard)]
    assert away[0] > away[1] > away[2]
    reader = RequestReader(trained_so.cfg, policy.transform, chunking=True)
    requests = [reader.read(plain | {"prev_chunk_left_over": old[:3], "inference_delay": n}, 0) for n in (0, 2)]
    none, two = (rows[0] for rows in sampler(requests))
    np.testing.assert_allclose(none, free, **TOLERANCE)
    np.testing.assert_allclose(two[:2], old[:2], **TOLERANCE)
    assert np.abs(two[2:] - free[2:]).max() > 1e-4


def test_hvds_own_client(server, policy):
    observation = served.observation(np.random.default_rng(6)) | {"seed": 8}
    with connect(f"ws://127.0.0.1:{server.port}") as found:
        client = Client(found.ask, found.about, rate=100.0)
        np.testing.assert_allclose(client.next(lambda: observation), direct(policy, observation, 8)[0], **TOLERANCE)
        with pytest.raises(UserError, match="unknown key 'stat'"):
            found.ask({"stat": 1})


def test_metadata_says_what_is_served(client, run_folder):
    about = client.get_server_metadata()
    assert about["run"] == str(run_folder) and about["robot"] == "r1" and about["server"].startswith("hvd ")
    assert about["action_horizon"] == 4 and len(about["action_names"]) == 21 and about["state_dim"] == 21
    assert about["cameras"] == {camera: KEYS[camera] for camera in CAMERAS}
    assert about["default_prompt"] == ""  # the dataset has two tasks
    assert about["weights"] == "float32" and about["acts_by"] == ""


def test_a_server_of_weights_in_8_bits(run_folder, policy):
    """It says so in its log, its metadata and its counters, and takes requests with committed actions too."""
    from hvd.train.inference import load_policy

    narrow = load_policy(run_folder, int8=True)
    assert narrow.weight_bytes < 0.5 * policy.weight_bytes
    asked = served.observation(np.random.default_rng(3)) | {"seed": 8}
    want, full = direct(narrow, asked, 8), direct(policy, asked, 8)
    args = ("--run", str(run_folder), "--port", "0", "--weights", "int8", "--real-time-chunking", "--max-batch", "1")
    with served.Served(*args) as server:
        client = server.client()
        assert client.get_server_metadata()["weights"] == "int8"
        got = client.infer(asked)["actions"]
        drawn = client.infer(asked | {"prev_chunk_left_over": got + 0.5, "inference_delay": 2})["actions"]
        client._ws.close()
        counted = served.counts(server.get("/metrics")[1])
        assert server.end() == 0
    np.testing.assert_allclose(got, want, **TOLERANCE)
    assert 1e-6 < np.abs(got - full).max() < 0.1 * np.abs(full).max()
    assert (np.abs(drawn - got).max(axis=1)[:2] > 1e-4).all()
    assert counted['hvd_serve_weights_bytes{kept="int8"}'] == narrow.weight_bytes
    assert f"weights of {narrow.weight_bytes / 1e6:,.1f} MB (int8)" in server.text()


# ----------------------------------------------------------------------------------------------------------------- B7


def spoil(kind: str, good: dict[str, Any]) -> Any:
    """A message of which something is wrong: an observation, or what is sent as it is."""
    camera = CAMERAS[0]
    match kind:
        case "shape":
            return {**good, "state": good["state"][:-1]}
        case "camera":
            return {**good, "images": {camera: good["images"][camera]}}
        case "nan":
            return {**good, "state": np.where(np.arange(21) == 5, np.nan, good["state"])}
        case "key":
            return {**good, "stat": good["state"]}
        case "float":
            return {**good, "images": {c: image / 255 for c, image in good["images"].items()}}
        case "prompt":
            return {name: value for name, value in good.items() if name != "prompt"}
        case "oversized":
            return {**good, "images": {c: np.zeros((500, 500, 3), np.uint8) for c in CAMERAS}}
        case "garbage":
            return b"\xc1\x00\xff"
        case "text":
            return "hello"
    raise ValueError(kind)


WHY = {
    "shape": r"state has shape \[20\]; expected \[21\]",
    "camera": "camera left_wrist_0_rgb is missing: send images",
    "nan": r"state is NaN or infinite \(in float32\) at \[5\]",
    "key": "unknown key 'stat'; nearest: state",
    "float": "is float64; expected uint8",
    "prompt": "prompt is missing, and this server has no default",
    "oversized": "the message has 1.4 MiB, at most 1 are taken",
    "garbage": "not a msgpack message of openpi's form",
    "text": "a text message",
}


def drive(server: served.Served, number: int, count: int) -> list[tuple[str, dict[str, Any], Any]]:
    """One client: (what was wrong or "", the good observation, the reply or the error's text) of each request."""
    rng, found = np.random.default_rng([5, number]), []
    client = server.client()
    for i in range(count):
        size = (int(rng.integers(20, 60)), int(rng.integers(20, 60)))
        good = {**served.observation(rng, size), "seed": int(rng.integers(2**31))}
        kind = list(WHY)[(i // 10) % len(WHY)] if i % 10 == number else ""
        message = spoil(kind, good) if kind else good
        if isinstance(message, dict):
            try:
                found.append((kind, good, client.infer(message)))
            except RuntimeError as error:
                found.append((kind, good, str(error)))
        else:
            client._ws.send(message)
            found.append((kind, good, client._ws.recv()))
    client._ws.close()
    return found


@pytest.mark.slow
def test_a_thousand_requests_of_four_clients(server, policy):
    """B7: bad ones among them; none lost, none wrong."""
    before = served.counts(server.get("/metrics")[1])
    with ThreadPoolExecutor(4) as pool:
        parts = list(pool.map(lambda number: drive(server, number, 250), range(4)))
    found = [item for part in parts for item in part]
    bad = [item for item in found if item[0]]
    assert len(found) == 1_000 and len(bad) == 100 and {kind for kind, _, _ in bad} == set(WHY)
    for kind, _, reply in bad:
        assert isinstance(reply, str) and re.search("error: .*" + WHY[kind], reply), (kind, reply)
    worst = 0.0
    for kind, observation, reply in found:
        if kind:
            continue
        assert isinstance(reply, dict), reply
        assert reply["seed"] == observation["seed"]
        expected = direct(policy, observation, observation["seed"])
        np.testing.assert_allclose(reply["actions"], expected, **TOLERANCE)
        worst = max(worst, float(np.abs(reply["actions"] - expected).max()))
    after = served.counts(server.get("/metrics")[1])
    gained = {name: after[name] - before[name] for name in after if "requests_total" in name}
    assert {name.split('"')[1]: n for name, n in gained.items()} == {
        "answered": 900,
        "late": 0,
        "refused": 100,
        "failed": 0,
        "abandoned": 0,
    }
    assert any(after.get(f'hvd_serve_batches_total{{size="{n}"}}', 0) > 0 for n in (2, 4)), "never two at once"
    print(f"largest difference from Policy.act: {worst:.1e}")


# ------------------------------------------------------------------------------------------------- start, stop, options


def test_key_default_prompt_and_a_signal_while_requests_are_in_flight(run_folder, policy):
    """Requests wait 1.5 s for others to join them, so that the signal surely comes while they do."""
    args = ("--run", str(run_folder), "--port", "0", "--max-wait-ms", "1500", "--log-every-s", "0.2")
    with served.Served(*args, "--default-prompt", "open the drawer", env={"HVD_API_KEY": KEY}) as running:
        with pytest.raises(InvalidStatus):
            running.client()
        clients = [running.client(api_key=KEY) for _ in range(3)]
        assert clients[0].get_server_metadata()["default_prompt"] == "open the drawer"
        observations = [served.observation(np.random.default_rng(i)) for i in range(3)]
        for observation in observations:
            observation.pop("prompt")
        with ThreadPoolExecutor(3) as pool:
            futures = [
                pool.submit(client.infer, {**observation, "seed": 1})
                for client, observation in zip(clients, observations, strict=True)
            ]
            while served.counts(running.get("/metrics")[1])["hvd_serve_waiting"] < 3:
                time.sleep(0.02)
            begin = time.monotonic()
            assert running.end() == 0
            assert time.monotonic() - begin < 10
            for future, observation in zip(futures, observations, strict=True):
                expected = direct(policy, {**observation, "prompt": "open the drawer"}, 1)
                np.testing.assert_allclose(future.result(10)["actions"], expected, **TOLERANCE)
        for client in clients:
            with pytest.raises(ConnectionClosed):
                client.infer(observations[0])
        assert running.lines[-1].startswith("stopped; requests: 3 answered")
        assert "4x1" in running.lines[-1]
        assert KEY not in running.text()


def test_a_signal_before_the_server_is_ready(run_folder):
    with served.Served("--run", str(run_folder), "--port", "0", wait=False) as running:
        while not any("compiling" in line for line in running.lines):
            assert running.process.poll() is None, running.text()
            time.sleep(0.01)
        assert running.end(signal.SIGTERM) == 0
        assert "stopped before the server was ready" in running.text() or "stopped; requests: none" in running.text()


def test_a_signal_that_a_library_swallows(run_folder, monkeypatch, capsys):
    def warm(self, request):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            pytest.fail("not reached")
        except BaseException:
            pass  # as a callback of a compiler does

    monkeypatch.setattr(sampler.Sampler, "warm", warm)
    usual = sys.getswitchinterval()
    try:
        assert cli.main(["serve", "--run", str(run_folder), "--port", "0"]) == 0
        assert sys.getswitchinterval() < 0.001, "threads that read images would hold up the event loop"
    finally:
        sys.setswitchinterval(usual)
    assert "stopped; requests: none" in capsys.readouterr().out


def test_a_port_in_use(server, run_folder, capsys):
    assert cli.main(["serve", "--run", str(run_folder), "--port", str(server.port)]) == EXIT_USER
    said = capsys.readouterr().err
    assert said.startswith(f"error: cannot listen on 127.0.0.1 port {server.port} (Address already in use)")
    assert said.count("\n") == 1


def test_only_complete_runs_are_served(run_folder, tmp_path, capsys):
    shutil.copytree(run_folder, tmp_path / "run")
    (tmp_path / "run" / "complete.json").unlink()
    assert cli.main(["serve", "--run", str(tmp_path / "run"), "--port", "0"]) == EXIT_USER
    said = capsys.readouterr().err
    assert "is not complete" in said and said.count("\n") == 1


@pytest.mark.parametrize(
    "args, why",
    [
        ([], "needs one of --config NAME"),
        (["--config", "demo", "--run", "x"], "needs one of --config NAME"),
        (["--config", "nope"], "unknown config 'nope'"),
        (["--config", "demo", "--polcy.beta", "1"], "unknown field --polcy.beta"),
        (["--run", "x", "--policy.beta", "1"], "--run takes no fields"),
        (["--run", "x", "--port", "70000"], "--port 70000 is not between 0 and 65535"),
        (["--run", "x", "--port", "many"], "--port"),
        (["--run", "x", "--max-batch", "0"], "--max-batch 0 is not between 1 and 256"),
        (["--run", "x", "--tls-key", "k"], "--tls-key needs --tls-cert"),
        (["--run", "x", "--tls-cert", "/nowhere/c.pem"], "--tls-cert /nowhere/c.pem --tls-key : no certificate"),
        (["--run", "x", "--tls-cert", __file__], "no certificate with its key there"),
        (["--run", "x", "--weights", "int4"], "--weights: 'int4' is not one of full, int8"),
        (["--run", "x", "--extractor-params", "n", "4"], "--extractor-params needs --extractor"),
        (
            ["--run", "x", "--extractor", "best_of_m"],
            "--extractor: 'best_of_m' is not one of trained, none, best_of_n, q_guided",
        ),
        (["--run", "x", "--extractor", "none", "--value-run", "v"], "a policy that acts by no critic asks none"),
        (["--run", "x", "--num-flow-steps", "101"], "--num-flow-steps 101"),
        (["--run", "x", "--host", "no.such.host.invalid"], "--host no.such.host.invalid: no such address"),
        (["--run", "x", "--host", "192.0.2.1"], "cannot listen on 192.0.2.1 port 8000"),
        (["--run", "/nowhere", "--port", "0"], "no run at /nowhere"),
    ],
)
def test_mistakes_are_one_line(args, why, capsys):
    assert cli.main(["serve", *args]) == EXIT_USER
    said = capsys.readouterr().err
    assert said.startswith("error: ") and why in said and said.count("\n") == 1


@pytest.mark.parametrize("key", ["k", "x" * 15])
def test_a_key_that_can_be_guessed(key, monkeypatch, capsys):
    monkeypatch.setenv("HVD_API_KEY", key)
    assert cli.main(["serve", "--run", "x", "--port", "0"]) == EXIT_USER
    said = capsys.readouterr().err
    assert f"HVD_API_KEY has {len(key)} characters, at least 16" in said and said.count("\n") == 1


@pytest.mark.parametrize("key", ["", " ", "a\nb", "clé", " x"])
def test_a_key_that_no_header_can_carry(key, monkeypatch, capsys):
    monkeypatch.setenv("HVD_API_KEY", key)
    assert cli.main(["serve", "--run", "x", "--port", "0"]) == EXIT_USER
    said = capsys.readouterr().err
    assert "HVD_API_KEY is empty or has other than plain printable characters" in said


def test_the_config_s_fields_say_which_run(tmp_path):
    options, rest = overrides.take(
        serve.ServeOptions(), ["--config", "demo", "--exp-name", "mine", "--port", "9000", "--seed", "3"]
    )
    assert options.port == 9_000 and options.host == "127.0.0.1"
    cfg = serve.chosen(options, rest)
    assert not isinstance(cfg, str) and cfg.policy_dir == "runs/mine/policy" and cfg.seed == 3


def test_help_names_every_option(capsys):
    assert cli.main(["serve", "--help"]) == 0
    printed = capsys.readouterr().out
    for field in dataclasses.fields(serve.ServeOptions):
        assert re.search(rf"--{field.name.replace('_', '-')}[ ,]", printed)


def test_an_open_host_without_a_key_is_said(run_folder):
    with served.Served("--run", str(run_folder), "--port", "0", "--host", "0.0.0.0", "--max-batch", "1") as running:
        assert "whoever reaches it may use the policy" in running.text()
        assert running.get("/healthz")[0] == 200


def test_the_default_prompt_is_the_only_task(tmp_path):
    cfg = factory.experiment(tmp_path)
    assert default_prompt(cfg) == "", "no data on this machine"
    for role in ("optimal", "suboptimal"):
        factory.write_dataset(tmp_path / "data" / role, episodes=2, length=6, seed=0)
    assert default_prompt(cfg) == "carry the tote"
    served.make_dataset(tmp_path / "two", lengths=(4, 4), kind="image", cameras=())
    two = dataclasses.replace(cfg.suboptimal_data, root=str(tmp_path / "two"))
    assert default_prompt(dataclasses.replace(cfg, suboptimal_data=two)) == ""
