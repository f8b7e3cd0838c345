"""What every test has: shape and type checks of the whole package, a strict JAX on the CPU, folders of reference data.

The import hook must be there before the first `import hvd`, so this file imports nothing of ours.
"""

import os

# Set for this process and every subprocess that a test starts.
os.environ["JAX_PLATFORMS"] = os.environ.get("HVD_TEST_PLATFORM", "cpu")
os.environ.setdefault("MUJOCO_GL", "egl")
os.environ.setdefault("MPLBACKEND", "Agg")

from tests import compilation  # sets Python's and jax's environment

# isort: split
import submitit  # noqa: F401  # first: its logging set-up closes the handlers there are, and absl's has pytest's stderr

# isort: split
import jax
import pytest
from jaxtyping import install_import_hook

from tests import trained as training
from tests import typecheck
from tests.folders import FOLDERS, folder
from tests.skips import unexpected

install_import_hook("hvd", f"{typecheck.__name__}.check")

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_threefry_partitionable", True)

# `pytest` alone runs what needs no root, no cluster and no GPU, and takes minutes; the rest is asked for by its marker.
ON_REQUEST = ("slow", "gpu", "slurm", "kubernetes", "image")
# These files take longest and begin first: at the end one process would work on them alone
LONGEST = ("train/test_processes.py", "launch/test_whole_way.py", "train/test_sharding.py", "train/test_stages.py")


def pytest_collection_modifyitems(config, items):
    items.sort(key=lambda item: not item.path.as_posix().endswith(LONGEST))
    if config.option.markexpr:
        return
    chosen = [item for item in items if not any(item.get_closest_marker(name) for name in ON_REQUEST)]
    # A test named on the command line is run whatever its markers are.
    named = any("::" in arg for arg in config.args)
    if not named and len(chosen) < len(items):
        config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
        items[:] = chosen


@pytest.hookimpl(optionalhook=True)  # the image's tests have no xdist
def pytest_xdist_auto_num_workers(config) -> int:
    """One process more than there are cores (many tests wait), at most four; one for a single file, and for what needs
    the machine to itself."""
    alone = set(ON_REQUEST) - {"slow"}
    if "PYTEST_XDIST_AUTO_NUM_WORKERS" in os.environ:
        workers = int(os.environ["PYTEST_XDIST_AUTO_NUM_WORKERS"])
    elif (len(config.args) == 1 and ".py" in config.args[0]) or config.option.markexpr in alone:
        workers = 0
    else:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        workers = min(4, cores + 1)
    if workers > 1:
        return workers
    config.option.dist = "no"
    return 0


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """With HVD_CI=1 a skip that CI should not have is a failure: nobody reads the list of skips."""
    report = yield
    if not hasattr(report, "wasxfail"):
        _fail_if_skipped(report, item.nodeid, [mark.name for mark in item.iter_markers()])
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    """The same for a module that skips itself as a whole."""
    report = yield
    _fail_if_skipped(report, collector.nodeid, [])
    return report


def _fail_if_skipped(report, name: str, markers: list[str]) -> None:
    if not report.skipped or os.environ.get("HVD_CI") != "1":
        return
    reason = str(report.longrepr[2]) if isinstance(report.longrepr, tuple) else str(report.longrepr)
    if unexpected(reason, markers):
        report.outcome = "failed"
        report.longrepr = f"{name}: CI must not skip this: {reason}"


@pytest.fixture(autouse=True)
def _strict_dtypes(request):
    """No silent dtype promotion in the pure functions; flax's and optax's own code needs the standard rules."""
    pure = "tests/method/" in str(request.path).replace(os.sep, "/")
    with jax.numpy_dtype_promotion("strict" if pure else "standard"):
        yield


@pytest.fixture(scope="module", autouse=True)
def _optimised(request):
    """Full optimisation for modules with that marker."""
    marked = request.node.get_closest_marker("optimised") is not None
    if marked:
        compilation.optimise(True)
    yield
    if marked:
        compilation.optimise(False)


@pytest.fixture(scope="session")
def data_folder(tmp_path_factory):
    """Both datasets of the tiny experiment and their norm stats; read only."""
    from tests.train import factory

    return training.once(tmp_path_factory, "tiny", factory.make_data)


@pytest.fixture(scope="session")
def trained(data_folder, tmp_path_factory):
    """The tiny experiment with its value and policy run complete; read only."""
    from tests.train import factory

    def train(folder) -> None:
        from hvd.method import policy, value

        cfg = factory.experiment(data_folder, runs_dir=str(folder))
        value.main(cfg)
        policy.main(cfg)

    runs = training.once(tmp_path_factory, "tiny-runs", train)
    return factory.experiment(data_folder, runs_dir=str(runs))


@pytest.fixture(scope="session")
def served_experiment(tmp_path_factory):
    """A small policy with cameras, trained for three steps (tests/served.py); read only."""
    from tests import served

    return served.experiment(training.once(tmp_path_factory, "served", served.train))


@pytest.fixture(scope="session")
def golden():
    """Folder of the golden arrays: $HVD_GOLDEN, else ../shared/golden beside the checkout; skips when it is missing."""
    return _folder_or_skip("HVD_GOLDEN")


@pytest.fixture(scope="session")
def g1_data():
    """Recordings of the real humanoid: $HVD_G1_DATA, else ../shared/data/g1_bottle; skips where it is missing."""
    return _folder_or_skip("HVD_G1_DATA")


def _folder_or_skip(variable: str):
    path = folder(variable)
    if path is None:
        pytest.skip(f"{variable}: no folder {FOLDERS[variable]} beside the checkout and the variable is not set")
    return path
