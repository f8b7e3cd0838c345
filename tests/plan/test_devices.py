"""Device strings, limits, and what XLA is told of a device."""

import pytest

from hvd.accelerators import ACCELERATORS
from hvd.errors import UserError
from hvd.plan import devices as plan_devices

pytestmark = pytest.mark.optimised

GIB = 1 << 30


@pytest.mark.parametrize(
    "text, name, per_node",
    [
        ("8xh100-80gb", "h100-80gb", 8),
        ("2xrtx4090-24gb", "rtx4090-24gb", 2),
        ("8 x A100-40GB", "a100-40gb", 8),
        ("h200", "h200-141gb", 1),
        ("4xrtx4090", "rtx4090-24gb", 4),
    ],
)
def test_device_strings(text, name, per_node):
    found = plan_devices.parse(text, 2)
    assert (found.name, found.per_node, found.nodes, found.count) == (name, per_node, 2, 2 * per_node)
    assert found.accelerator is ACCELERATORS[name]


@pytest.mark.parametrize(
    "text, nodes, line",
    [
        ("8xh10-80gb", 1, "unknown device 'h10-80gb'; nearest: h100-80gb"),
        ("rtx4080", 1, "nearest: rtx4090-24gb"),
        ("8xa100", 1, "unknown device 'a100'; nearest: "),
        ("0xh100-80gb", 1, "at least one device"),
        ("8 h100", 1, "not of the form 8xh100-80gb"),
        ("", 1, "not of the form"),
        ("8xh100-80gb", 0, "--nodes 0 must be at least 1"),
    ],
)
def test_wrong_device_strings_are_one_line(text, nodes, line):
    with pytest.raises(UserError) as caught:
        plan_devices.parse(text, nodes)
    assert line in str(caught.value)


def test_the_limit_leaves_room_for_what_is_outside_the_pool():
    one, two = plan_devices.parse("rtx4090-24gb"), plan_devices.parse("2xrtx4090-24gb")
    usable = ACCELERATORS["rtx4090-24gb"].usable
    assert one.limit(1.0) == usable - plan_devices.CONTEXT - plan_devices.LIBRARIES
    assert two.limit(1.0) == one.limit(1.0) - plan_devices.NCCL
    assert two.limit(0.75) == int(0.75 * (usable - plan_devices.CONTEXT)), "JAX's pool is the smaller one"
    assert two.limit(1.0, reserve=4 * GIB) == usable - 4 * GIB
    assert two.limit(1.0, reserve=40 * GIB) == 0


def test_every_device_of_the_table_has_a_target_and_less_memory_than_its_name_says():
    for name, accelerator in ACCELERATORS.items():
        text = plan_devices.target_config(accelerator, name)
        assert f"core_count: {accelerator.cores}\n" in text and "nan" not in text
        assert 0.9 * accelerator.memory < accelerator.usable < accelerator.memory


@pytest.mark.parametrize(
    "kind, name",
    [
        ("NVIDIA H100 80GB HBM3", "h100-80gb"),
        ("NVIDIA H100 PCIe", "h100-pcie-80gb"),
        ("NVIDIA A100-SXM4-40GB", "a100-40gb"),
        ("NVIDIA GeForce RTX 4090", "rtx4090-24gb"),
        ("NVIDIA L4", "l4-24gb"),
        ("Tesla K80", None),
    ],
)
def test_names_of_the_driver(kind, name):
    assert plan_devices.name_of(kind) == name
