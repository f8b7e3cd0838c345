"""Nothing is compiled again once a run is under way: not for steps, validation or saves (B5). Compiled programs are
kept where nobody else can put any.
"""

import os
import stat

import jax
import pytest

from hvd.data.loader import Loader
from hvd.method import policy, value
from hvd.train import compilation, inference, stage_data


@pytest.fixture
def compiled(monkeypatch):
    """(steps handed out before, compiled function) of each compilation, in order."""
    seen: list[tuple[int, str]] = []
    steps = [0]

    def listener(event: str, duration: float, **details) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            seen.append((steps[0], str(details.get("fun_name", ""))))

    class Counted(Loader):
        def __next__(self):
            steps[0] += 1
            return super().__next__()

    monkeypatch.setattr(stage_data, "Loader", Counted)
    jax.monitoring.register_event_duration_secs_listener(listener)
    yield seen
    jax.monitoring.unregister_event_duration_listener(listener)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [value, policy])
def test_nothing_is_compiled_again(fresh, compiled, stage):
    """Validation at steps 2, 4, ..., saves at 3, 6, ...: from step 4 on every kind of thing has been done once."""
    own = {"val_interval": 2, "save_interval": 3, "grad_accum_steps": 2}
    cfg = fresh(value=own, policy=own | {"weighting": "none"})
    stage.main(cfg)
    before_first = [name for step, name in compiled if step == 0]
    during = [(step, name) for step, name in compiled if step > 0]
    steps = [step for step, name in during if "packed" in name and step == 1]
    assert before_first and len(steps) == 1, compiled
    late = [found for found in during if 4 <= found[0] < 12]
    assert not late, late
    assert {step for step, _ in during if 1 < step < 4} <= {2}, during


@pytest.fixture
def cache(monkeypatch, tmp_path):
    """cache() -> the folder that jax is told to keep programs in."""
    told: dict[str, object] = {}
    monkeypatch.setattr(compilation.jax.config, "update", told.__setitem__)
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    monkeypatch.setenv("HVD_CACHE", str(tmp_path / "mine"))

    def use() -> object:
        compilation.use_cache()
        return told["jax_compilation_cache_dir"]

    return use


def test_programs_are_kept_in_a_folder_of_the_users_own(cache, tmp_path, capsys):
    assert cache() == str(tmp_path / "mine" / "jax")
    assert stat.S_IMODE((tmp_path / "mine" / "jax").stat().st_mode) == 0o700
    assert capsys.readouterr().out == ""


def writable_parent(folder):
    folder.mkdir(parents=True, mode=0o700)
    folder.parent.chmod(0o777)


def writable(folder):
    folder.mkdir(parents=True)
    folder.chmod(0o770)


@pytest.mark.parametrize("make", [writable, writable_parent])
@pytest.mark.parametrize("given", [True, False])
def test_programs_that_others_may_have_put_there_are_not_run(cache, monkeypatch, tmp_path, capsys, make, given):
    make(tmp_path / "mine" / "jax")
    if given:
        monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "mine" / "jax"))
    assert cache() is None
    assert "others may write to" in capsys.readouterr().out


def test_a_cache_that_cannot_be_made_costs_time_only(cache, tmp_path, capsys):
    (tmp_path / "mine").write_text("")
    assert cache() is None
    assert "compiled programs are not kept" in capsys.readouterr().out


def test_a_run_does_not_bring_its_programs_along(copied, cache, monkeypatch):
    """Neither by a folder of its own nor by what its config.yaml calls runs_dir."""
    seen, use = [], compilation.use_cache
    monkeypatch.setattr(compilation, "use_cache", lambda: seen.append(use()))
    inference.load_policy(copied.policy_dir)
    assert seen and not str(cache()).startswith(copied.runs_dir)
    assert not os.path.exists(os.path.join(copied.runs_dir, ".jax_cache"))
