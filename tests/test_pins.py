"""Every version is pinned in pyproject.toml, and the pins hold here."""

import tomllib

from tests import pins


def test_every_installed_package_is_pinned_at_its_version():
    found = pins.from_pyproject(pins.PYPROJECT.read_text())
    assert found, "no pins: python tests/pins.py --write"
    assert pins.differences(found) == []


def test_an_unpinned_package_is_found():
    found = pins.from_pyproject(pins.PYPROJECT.read_text())
    without = [pin for pin in found if not pin.startswith("numpy==")]
    other = ["numpy==0.0.1" if pin.startswith("numpy==") else pin for pin in found]
    assert any("numpy" in line and "not pinned" in line for line in pins.differences(without))
    assert any("numpy" in line and "pinned is 0.0.1" in line for line in pins.differences(other))


def test_pins_of_a_lock_keep_the_marker_where_platforms_differ():
    registry = {"registry": "https://index.invalid/simple"}
    lock = {
        "package": [
            {"name": "hvd", "version": "0.1.0", "source": {"editable": "."}},
            {"name": "One", "version": "1.0", "source": registry},
            {"name": "two", "version": "1.0", "source": registry, "resolution-markers": ["sys_platform == 'linux'"]},
            {"name": "two", "version": "2.0", "source": registry, "resolution-markers": ["sys_platform == 'darwin'"]},
        ]
    }
    expected = ["one==1.0", "two==1.0; (sys_platform == 'linux')", "two==2.0; (sys_platform == 'darwin')"]
    assert pins.from_lock(lock) == expected


def test_writing_pins_twice_changes_nothing_else():
    text = pins.PYPROJECT.read_text()
    once = pins.with_pins(text, ["a==1"])
    assert pins.from_pyproject(once) == ["a==1"]
    assert pins.with_pins(once, ["a==1"]) == once
    assert pins.with_pins(once, pins.from_pyproject(text)) == text
    before, after = tomllib.loads(text), tomllib.loads(once)
    del before["tool"]["uv"]["constraint-dependencies"], after["tool"]["uv"]["constraint-dependencies"]
    assert before == after
