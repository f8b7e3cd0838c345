"""The loader: what a batch holds, the same samples whatever the workers, processes and restarts, errors surface."""

import dataclasses
import threading
import time

import numpy as np
import pytest

from hvd.configs import ModelConfig, NormConfig
from hvd.data import normalize
from hvd.data.dataset import Dataset
from hvd.data.loader import Batcher, Loader, SampleSpec, Source
from hvd.data.tokenizer import Tokenizer
from hvd.data.transforms import InputTransform, resize_with_pad
from hvd.data.transitions import Transitions
from hvd.errors import UserError
from hvd.robots import get_robot
from tests.data.factory import CAMERAS, make_dataset

MODEL = ModelConfig(
    action_horizon=5, tokenizer="words", vocab_size=64, max_token_len=8, image_size=28, cameras=(*CAMERAS, "third")
)

NORM = NormConfig()


@pytest.fixture(autouse=True)
def no_thread_is_left():
    yield
    assert not [t.name for t in threading.enumerate() if t.name.startswith("hvd-")]


@pytest.fixture(scope="module")
def recipes(tmp_path_factory):
    """An optimal set with two cameras and a mixed one that has only the first."""
    root = tmp_path_factory.mktemp("loader")
    optimal = make_dataset(root / "optimal", seed=1, terminal_at={1: 4})
    mixed = make_dataset(root / "mixed", seed=2, lengths=(9, 15), cameras=CAMERAS[:1], version="v2.1")
    return optimal, mixed


def open_all(recipes, model=MODEL, norm=NORM, **spec):
    datasets = [Dataset.open(r.config, cameras=model.cameras) for r in recipes]
    stats = normalize.compute(datasets[:1], norm, get_robot("r1"), model.action_horizon)
    transform = InputTransform(model, norm, get_robot("r1"), stats, Tokenizer(model))
    weights = np.random.default_rng(0).uniform(size=(datasets[1].num_frames, 3)).astype(np.float32)
    sources = [
        Source(datasets[0], datasets[0].rows(), 4),
        Source(datasets[1], datasets[1].rows(), 2, weights, number=1),
    ]
    return sources, SampleSpec(transform, num_levels=3, **spec)


def flat(batch, prefix=""):
    for key, value in batch.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{key}/")
        else:
            yield prefix + key, value


def assert_equal_batches(a, b):
    a, b = dict(flat(a)), dict(flat(b))
    assert a.keys() == b.keys()
    for key in a:
        np.testing.assert_array_equal(a[key], b[key], err_msg=key)


def take(loader, n):
    with loader:
        return [next(loader) for _ in range(n)]


@pytest.mark.parametrize("next_images", ("none", "true", "current"))
@pytest.mark.parametrize("image_cache", (False, True))
def test_batch_holds_what_the_rows_say(recipes, next_images, image_cache):
    sources, spec = open_all(recipes, next_images=next_images, gamma=0.9, image_cache=image_cache)
    source, rows = np.asarray([1, 0, 0, 1]), np.asarray([23, 14, 2, 0])
    batch = Batcher(sources, spec).batch(source, rows)
    assert batch["source"].tolist() == [1, 0, 0, 1] and batch["index"].tolist() == rows.tolist()
    assert {v.dtype for k, v in flat(batch) if k in ("source", "index", "observation/tokenized_prompt")} == {
        np.dtype(np.int32)
    }
    for i, (s, row) in enumerate(zip(source, rows, strict=True)):
        dataset, transform = sources[s].dataset, spec.transform
        transitions, this = Transitions(dataset, 5, 0.9), np.asarray([row])
        chunk, outcome, state = transitions.chunk(this), transitions.outcome(this), dataset.state[this]
        expected = transform.observation(
            state,
            {c: resize_with_pad(dataset.frames(c, np.asarray([row])), 28, 28) for c in dataset.cameras},
            [dataset.task_of(row)],
        )
        assert_equal_batches(take_row(batch["observation"], i), take_row(expected, 0))
        np.testing.assert_array_equal(batch["actions"][i], transform.actions_in(chunk.actions, state)[0])
        np.testing.assert_array_equal(batch["action_mask"][i], chunk.action_mask[0])
        np.testing.assert_array_equal(batch["weights"][i], sources[s].weights[row] if s else np.ones(3))
        if next_images == "none":
            assert not batch.keys() & {"reward", "discount", "next_observation"}
            continue
        assert (batch["reward"][i], batch["discount"][i]) == (outcome.reward[0], outcome.discount[0])
        shown = outcome.next_row if next_images == "true" else np.asarray([row])
        expected = transform.observation(
            dataset.state[outcome.next_row],
            {c: dataset.frames(c, shown) for c in dataset.cameras},
            [dataset.task_of(row)],
        )
        assert_equal_batches(take_row(batch["next_observation"], i), take_row(expected, 0))


def take_row(observation, i):
    return {k: v[i] for k, v in flat(observation)}


def test_masks_of_absent_cameras(recipes):
    sources, spec = open_all(recipes)
    batch = Batcher(sources, spec).batch(np.asarray([0, 1]), np.asarray([3, 3]))
    masks = {c: m.tolist() for c, m in batch["observation"]["image_masks"].items()}
    assert masks == {CAMERAS[0]: [True, True], CAMERAS[1]: [True, False], "third": [False, False]}
    assert not batch["observation"]["images"][CAMERAS[1]][1].any()
    assert batch["observation"]["images"][CAMERAS[1]][0].any()


def test_same_samples_whatever_the_workers_and_restarts(recipes):
    sources, spec = open_all(recipes, next_images="true")
    reference = take(Loader(sources, spec, 6, seed=3, num_workers=1), 8)
    assert [step for step, _ in reference] == list(range(8))
    other = take(Loader(sources, spec, 6, seed=3, num_workers=3, prefetch=4), 4)
    resumed = take(Loader(sources, spec, 6, seed=3, start_step=4), 4)
    for (step, batch), (other_step, other_batch) in zip(reference, other + resumed, strict=True):
        assert step == other_step
        assert_equal_batches(batch, other_batch)


def test_processes_load_slices_of_the_same_batch(recipes):
    sources, spec = open_all(recipes)
    whole = take(Loader(sources, spec, 6, seed=3), 5)
    parts = [take(Loader(sources, spec, 6, seed=3, process_index=p, process_count=3), 5) for p in range(3)]
    for step in range(5):
        for key, value in flat(whole[step][1]):
            joined = np.concatenate([dict(flat(part[step][1]))[key] for part in parts])
            np.testing.assert_array_equal(joined, value, err_msg=key)


def test_every_row_once_per_epoch(recipes):
    sources, spec = open_all(recipes)
    sources = [dataclasses.replace(s, share=share) for s, share in zip(sources, (5, 2), strict=True)]
    seen = take(Loader(sources, spec, 7, seed=0), 12)
    for i, s in enumerate(sources):
        rows = np.concatenate([b["index"][b["source"] == i] for _, b in seen])
        epoch = len(s.rows)
        assert len(rows) >= 1.5 * epoch or i == 1
        assert sorted(rows[:epoch]) == s.rows.tolist()


def wait_until(condition):
    """The machine may be busy: wait for as long as it takes (the test's own time limit ends a hang)."""
    while not condition():
        time.sleep(0.01)


def test_place_runs_ahead_in_another_thread(recipes):
    sources, spec = open_all(recipes)
    threads = set()

    def place(batch):
        threads.add(threading.current_thread().name)
        return {"placed": batch["index"] + 1}

    with Loader(sources, spec, 6, seed=0, prefetch=3, place=place) as loader:
        first = next(loader)
        wait_until(lambda: loader._ready.qsize() == 3)
    assert threads == {"hvd-loader"} and first[1].keys() == {"placed"}


def test_errors_surface_in_the_consumer(recipes, monkeypatch):
    sources, spec = open_all(recipes)

    def fails(_):
        raise UserError("x.mp4: damaged")

    frames = {CAMERAS[0]: fails}
    broken = dataclasses.replace(sources[0], dataset=dataclasses.replace(sources[0].dataset, camera_frames=frames))
    broken = dataclasses.replace(broken, dataset=dataclasses.replace(broken.dataset, cameras=CAMERAS[:1]))
    loader = Loader([broken, sources[1]], spec, 6, seed=0)
    with pytest.raises(UserError, match=r"x\.mp4: damaged"):
        next(loader)
    with pytest.raises(StopIteration):
        next(loader)
    with pytest.raises(ZeroDivisionError):
        next(Loader(sources, spec, 6, seed=0, place=lambda _: 1 / 0))


def test_close_while_the_consumer_waits(recipes):
    sources, spec = open_all(recipes)
    blocked = threading.Event()

    def place(batch):
        blocked.wait()
        return batch

    loader = Loader(sources, spec, 6, seed=0, place=place)
    closer = threading.Timer(0.2, lambda: (blocked.set(), loader.close()))
    closer.start()
    for _ in loader:
        pass
    closer.join()


def test_impossible_requests(recipes):
    sources, spec = open_all(recipes)
    with pytest.raises(UserError, match=r"shares \[4, 2\] do not add up to batch_size 7"):
        Loader(sources, spec, 7, seed=0)
    with pytest.raises(UserError, match="batch_size 6 is not divisible by 4 processes"):
        Loader(sources, spec, 6, seed=0, process_count=4)
    long = InputTransform(
        dataclasses.replace(MODEL, action_horizon=13),
        NormConfig(),
        get_robot("r1"),
        spec.transform.stats,
        spec.transform.tokenizer,
    )
    with pytest.raises(UserError, match="optimal: action_horizon 13 is longer than every episode"):
        Loader(sources, SampleSpec(long), 6, seed=0)


def test_norm_stats_of_other_data_are_said_at_once(recipes, tmp_path):
    sources, spec = open_all(recipes)
    other = Dataset.open(make_dataset(tmp_path / "other", state_dim=6, cameras=()).config, cameras=())
    with pytest.raises(UserError, match="other: state has 6 dims, its norm stats 4: run `hvd norm-stats`"):
        Batcher([sources[0], Source(other, other.rows(), 2, number=1)], spec)


def test_numbers_alone_cost_next_to_nothing(tmp_path):
    """A batch of 64 without images: about 0.5 ms of work (bench_loader measures it), asserted with much room."""
    recipe = make_dataset(tmp_path / "d", lengths=(200,) * 5, cameras=(), state_dim=21)
    model = dataclasses.replace(MODEL, cameras=(), action_horizon=20)
    dataset = Dataset.open(recipe.config, cameras=())
    norm = NormConfig(delta_actions=True)
    stats = normalize.compute([dataset], norm, get_robot("r1"), 20)
    spec = SampleSpec(InputTransform(model, norm, get_robot("r1"), stats, Tokenizer(model)), 3, "true", 0.99)
    batcher = Batcher([Source(dataset, dataset.rows(), 64)], spec)
    rows = np.random.default_rng(0).integers(0, 1000, (30, 64))
    took = []
    for each in rows:
        begin = time.thread_time()
        batcher.batch(np.zeros(64, np.int32), each)
        took.append(time.thread_time() - begin)
    assert np.median(took) < 0.008  # type checks of the tests included
