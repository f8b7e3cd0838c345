"""`hvd` whose steps wait HVD_TEST_STEP_SECONDS each, so that what happens to a job finds it at work."""

import os

from tests import compilation

# isort: split
from hvd import cli
from hvd.train import stage_data
from tests.train import factory

if __name__ == "__main__":
    compilation.every_process_writes()
    factory.slow(stage_data, float(os.environ.get("HVD_TEST_STEP_SECONDS", "0")))
    cli.command()
