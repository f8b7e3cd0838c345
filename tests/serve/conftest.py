"""The stand-in for the model, a server that asks it, and a certificate."""

import subprocess

import pytest

from tests.serve.running import Model, Running
from tests.serve.test_observation import make_reader


@pytest.fixture
def model():
    return Model()


@pytest.fixture
def run(model):
    """run(**options): a running server; it is stopped afterwards."""
    made: list[Running] = []

    def start(**options):
        made.append(Running(model, make_reader(cameras=()), **options))
        return made[-1]

    yield start
    model.enough.set()
    for server in made:
        server.close()


@pytest.fixture
def pem(tmp_path):
    """A certificate and its key in one file."""
    pem = tmp_path / "both.pem"
    words = "req -x509 -newkey ed25519 -nodes -days 2 -subj /CN=localhost -addext subjectAltName=IP:127.0.0.1"
    subprocess.run(["openssl", *words.split(), "-keyout", pem, "-out", tmp_path / "c.pem"], check=True)
    pem.write_text(pem.read_text() + (tmp_path / "c.pem").read_text())
    return pem
