"""Nothing is compiled again once a run is under way: not for steps, validation or saves (B5)."""

import jax
import pytest

from hvd.data.loader import Loader
from hvd.method import policy, value
from hvd.train import stage_data


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
