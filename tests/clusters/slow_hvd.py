"""`hvd` whose steps wait HVD_TEST_STEP_SECONDS each, so that what happens to a job finds it at work."""

import os

from hvd import cli
from hvd.train import stage_data
from tests.train import factory

if __name__ == "__main__":
    factory.slow(stage_data, float(os.environ.get("HVD_TEST_STEP_SECONDS", "0")))
    cli.command()
