"""Which skips CI accepts: tests whose machine CI is not, and reference data that are not part of a checkout."""

# Markers of tests that need what an ordinary CI machine lacks.
MARKERS_CI_MAY_SKIP = ("gpu",)
# Beginnings of reasons; see tests/folders.py: a clone without ../shared beside it has no golden arrays and no G1 data.
REASONS_CI_MAY_SKIP = (
    "HVD_GOLDEN",
    "HVD_G1_DATA",
    "got empty parameter set",
    # what the machine itself may lack, whatever is installed
    "no CUDA compiler",  # jax's CUDA plugin: 2.5 GB
    "no Slurm here: namespaces and daemons need root",
    "no Kubernetes here: namespaces and daemons need root",
    "HVD_KUBERNETES_TOOLS",
    "no image builder here: it needs root",
    "no kubectl here",  # .ci/run installs one where it may
    "one core only",
    "no OpenGL on this machine",
    "no user namespaces here",
)


def unexpected(reason: str, markers: list[str]) -> bool:
    """True when CI must not skip a test that has these markers for this reason."""
    if any(name in MARKERS_CI_MAY_SKIP for name in markers):
        return False
    reason = reason.removeprefix("Skipped: ")
    return not any(allowed in reason for allowed in REASONS_CI_MAY_SKIP)
