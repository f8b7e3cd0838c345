"""report.html: what is there is shown, what is not is said, and nothing is fetched from elsewhere."""

import base64
import dataclasses
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from hvd.configs import DataConfig, EvaluateConfig, Experiment, SimConfig
from hvd.data.labels import Labels, Mistake, Subtask, episode_path, write_labels
from hvd.errors import UserError
from hvd.method.table import Advantages
from hvd.report import advantages as report_advantages
from hvd.report import command as report
from hvd.report import page as report_page
from hvd.report import results as report_results
from hvd.report.page import Section, page
from hvd.train import run_dir as runs
from tests.data.factory import make_dataset

LEVELS = ("base", "torso", "arms")


@pytest.fixture
def cfg(tmp_path) -> Experiment:
    """An experiment with a small dataset as its suboptimal set and nothing trained."""
    data = make_dataset(tmp_path / "mixed", lengths=(12, 9), success=(True, False)).config
    (tmp_path / "mixed" / "labels").mkdir()
    labels = Labels("open", True, (Subtask("reached", 0, 4, 1.0),))
    write_labels(episode_path(tmp_path / "mixed" / "labels", 0), labels)
    failed = Labels("open", False, (), mistakes=(Mistake("torso", 2, 6, "late_bend"),))
    write_labels(episode_path(tmp_path / "mixed" / "labels", 1), failed)
    return Experiment(
        name="demo",
        exp_name="a <b>",
        runs_dir=str(tmp_path / "runs"),
        optimal_data=DataConfig(repo_id="optimal", root=str(tmp_path / "nowhere")),
        suboptimal_data=data,
        sim=SimConfig(task="tote"),
        evaluate=EvaluateConfig(baselines=True),
    )


def estimate(mean: float, n: int = 40) -> dict:
    return {"mean": mean, "low": max(mean - 0.1, 0.0), "high": mean + 0.1, "n": n}


def write_run(cfg: Experiment, name: str, stage: runs.Stage, digest: str = "new") -> None:
    folder = Path(cfg.exp_dir) / name
    folder.mkdir(parents=True)
    runs.write_config(folder, cfg, stage, {})
    lines = []
    for step in (10, 20, 30):
        values = {"loss": 3.0 / step, "loss_q": 2.0 / step, "loss_v": 1.0 / step, "flow_error": 1.0 / step}
        values |= {"v_mean": 0.1, "td_target": 0.2, "time/step_s": 0.1, "time/samples_per_s": 640.0}
        values |= {"time/data_wait_s": 0.001, "time/busy_s": step / 10, "time/restarts": 0, "memory/rss_mb": 900.0}
        for level in LEVELS:
            values |= {f"q/{level}": 0.3, f"advantage_std/{level}": 0.1, f"flow_error/{level}": 0.5}
            values[f"weight/{level}"] = 1.0
        lines.append({"step": step, "split": "train", **values})
        lines.append({"step": step, "split": "val", "loss": 1.0, "flow_error": 0.4, "loss_q": 0.5, "loss_v": 1.0})
    text = "".join(json.dumps(line) + "\n" for line in lines) + '{"step": 40, "spl'  # torn by a kill
    (folder / "metrics.jsonl").write_text(text)
    (folder / "complete.json").write_text(json.dumps({"digest": digest}))


def write_results(
    cfg: Experiment, name: str, success: float, videos: int = 0, digest: str = "new", seed: int = 7
) -> None:
    folder = Path(cfg.exp_dir) / "evaluation" / name
    (folder / "videos").mkdir(parents=True)
    episodes = []
    for i in range(4):
        filmed = i < videos
        video = f"videos/rollout_{i}.mp4" if filmed else ""
        if filmed:
            (folder / video).write_bytes(f"video {name} {i}".encode())
        episodes.append({"seed": i, "success": i % 2 == 0, "dropped": False, "stage": i, "steps": 90, "video": video})
    control = name == "doing_nothing"
    seen = None if control else {"proprioception": True, "object_pose": True, "images": []}
    results = {
        "kind": "rollouts",
        "run_name": name,
        "task": "tote",
        "prompt": "carry the tote",
        "weighting": "" if control else "hvd" if name == "policy" else "none",
        "observes": seen,
        "seeds": [seed, 4],
        "num_rollouts": 4,
        "horizon": 200,
        "execute_steps": 10,
        "action_horizon": 20,
        "policy_digest": "" if control else digest,
        "success": {**estimate(success), "count": round(success * 40)},
        "stage": estimate(4 * success),
        "subtasks": {"reached": 1.0, "grasped": success},
        "episodes": episodes,
    }
    (folder / "results.json").write_text(json.dumps(results))


def write_credit(cfg: Experiment) -> None:
    pair = {"rest": estimate(0.81), "other": None}
    by_advantage, by_marginal = ({f"{letter}_{level}": pair for level in LEVELS} for letter in "AM")
    result = {
        "levels": list(LEVELS),
        "clean_frames": 300,
        "mistake_frames": {"base": 1234},
        "whole_frames": {"base": 2345},
        "auc": {"base": by_advantage},
        "auc_whole": {"base": by_advantage},
        "auc_marginal": {"base": by_marginal},
        "omega": {"base": {"mistakes": 0.7, "whole": 0.8, "rest": 1.3}},
    }
    (Path(cfg.exp_dir) / "evaluation" / "credit.json").write_text(json.dumps(result))


def write_table(cfg: Experiment) -> None:
    rng = np.random.default_rng(0)
    episode = np.repeat([0, 1], [12, 9])
    n = len(episode)
    q, a, omega = (rng.normal(size=(n, 3)).astype(np.float32) for _ in range(3))
    Advantages(
        levels=tuple(LEVELS),
        dataset=np.full(n, "suboptimal", object),
        split=np.where(episode == 0, "val", "train"),
        episode=episode,
        frame=np.concatenate([np.arange(12), np.arange(9)]),
        row=np.arange(n),
        v=rng.normal(size=n).astype(np.float32),
        q=q,
        a=a,
        omega=np.abs(omega),
    ).write(cfg.advantages_dir, {})


def write_all(cfg: Experiment) -> None:
    write_run(cfg, "value", "value")
    for name, success, videos in (
        ("policy", 0.75, 2),
        ("imitation-expert", 0.5, 2),
        ("imitation-mixed", 0.4, 1),
        ("imitation-success", 0.6, 1),
    ):
        write_run(cfg, name, "policy")
        write_results(cfg, name, success, videos)
    write_results(cfg, "doing_nothing", 0.0)
    write_credit(cfg)
    write_table(cfg)


class Page(HTMLParser):
    """Text, headings, table cells and sources of a page; fails where tags do not close."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.headings: list[str] = []
        self.cells: list[str] = []
        self.sources: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == [], "every tag is closed"

    def handle_starttag(self, tag, attrs):
        self.sources += [value for name, value in attrs if name in ("src", "href", "data", "poster")]
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        here = self.open[-1] if self.open else ""
        self.words.append(data)
        if here in ("h1", "h2", "h3"):
            self.headings.append(data)
        if here in ("td", "th"):
            self.cells.append(data)


def test_everything_that_is_there_is_shown(cfg, capsys):
    write_all(cfg)
    report.main(cfg)
    path = Path(cfg.exp_dir) / "report.html"
    assert str(path) in capsys.readouterr().out
    page = Page(path.read_text())
    text = " ".join(page.words)
    assert "Not in this report" not in text
    assert page.headings[0] == "hvd: a <b>", "names are escaped"
    for heading in ("Success", "Rollouts", "Values along an episode", "Credit assignment", "Training", "Settings"):
        assert heading in page.headings
    assert "30/40 = 0.75" in page.cells
    assert "state with object pose, no cameras" in page.cells
    assert "0.81 [0.71, 0.91]" in page.cells
    assert {"1,234", "2,345", "A arms", "M arms", "0.70", "0.80", "1.30"} <= set(page.cells)
    assert "Episode 0 of the suboptimal set: success, held out from training" in page.headings
    assert "Episode 1 of the suboptimal set: failure" in page.headings


def test_nothing_is_fetched_from_elsewhere(cfg):
    write_all(cfg)
    text = report.render(cfg)
    sources = Page(text).sources
    assert all(source.startswith(("data:", "#")) for source in sources)
    assert not re.search(r"<(script|link|iframe)\b|@import|url\(", text)


def test_the_videos_are_inside(cfg, monkeypatch):
    write_all(cfg)
    monkeypatch.setattr(report_page, "_svg", lambda figure: "data:")
    videos = [source for source in Page(report.render(cfg)).sources if source.startswith("data:video/mp4")]
    inside = [base64.b64decode(source.partition(",")[2]).decode() for source in videos]
    # all of the policy's, one of each baseline; the best first
    assert inside == [
        "video policy 0",
        "video policy 1",
        "video imitation-success 0",
        "video imitation-expert 0",
        "video imitation-mixed 0",
    ]


def missing(cfg: Experiment) -> str:
    """The page's list of what is not there; figures are made, but not drawn."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report_page, "_svg", lambda figure: "data:")
        return _missing(cfg)


def _missing(cfg: Experiment) -> str:
    found = re.search(r'<div class="note">.*?</div>', report.render(cfg), re.DOTALL)
    return found.group() if found else ""


def test_an_empty_experiment_says_what_is_missing(cfg):
    Path(cfg.exp_dir).mkdir(parents=True)
    said = missing(cfg)
    for words in (
        "rollouts of policy: not evaluated",
        "rollouts of imitation-mixed: not evaluated",
        "rollouts of doing nothing: not evaluated",
        "rollout videos",
        "credit assignment",
        "there is no table",
        "value stage&#x27;s curves",
        "policy stage&#x27;s curves",
    ):
        assert words in said


@pytest.mark.parametrize(
    "path, words",
    [
        ("evaluation/policy/results.json", "rollouts of policy: not evaluated"),
        ("evaluation/policy/videos/rollout_1.mp4", "rollout_1.mp4 is not there"),
        ("evaluation/credit.json", "credit assignment"),
        ("advantages/advantages.parquet", "there is no table"),
        ("value/metrics.jsonl", "the value stage&#x27;s curves"),
    ],
)
def test_one_missing_part_is_named_and_the_rest_is_shown(cfg, path, words):
    write_all(cfg)
    (Path(cfg.exp_dir) / path).unlink()
    said = missing(cfg)
    assert words in said
    assert said.count("<li>") <= 2


def test_results_of_an_older_checkpoint_are_marked(cfg):
    write_all(cfg)
    (Path(cfg.policy_dir) / "complete.json").write_text(json.dumps({"digest": "newer"}))
    assert "it was trained on after its evaluation" in missing(cfg)


def test_rollouts_from_different_starts_are_marked(cfg):
    write_all(cfg)
    path = Path(cfg.exp_dir) / "evaluation" / "imitation-mixed" / "results.json"
    path.write_text(path.read_text().replace('"seeds": [7, 4]', '"seeds": [8, 4]'))
    assert "evaluated on different starts" in missing(cfg)


def test_values_need_no_camera(cfg):
    keys = dataclasses.replace(cfg.suboptimal_data.keys, images={"base_0_rgb": "observation.images.nowhere"})
    cfg = dataclasses.replace(cfg, suboptimal_data=dataclasses.replace(cfg.suboptimal_data, keys=keys))
    write_all(cfg)
    shown = Page(report.render(cfg))
    assert "Episode 1 of the suboptimal set: failure" in shown.headings
    assert any("There are no frames: " in text and "nowhere" in text for text in shown.words)


def test_a_dataset_that_has_gone_is_named(cfg, tmp_path):
    write_all(cfg)
    (tmp_path / "mixed").rename(tmp_path / "moved")
    assert "values along an episode:" in missing(cfg)


def test_without_any_experiment_it_is_the_user_s_mistake(cfg):
    with pytest.raises(UserError, match="no experiment at"):
        report.main(cfg)
    assert not Path(cfg.runs_dir).exists()


def test_the_launcher_s_last_lines(cfg):
    write_all(cfg)
    lines = report_results.summary(cfg).splitlines()
    assert lines[0] == "task tote: 4 rollouts from unseen starts each"
    assert lines[1].split()[:3] == ["policy", "observes", "success"]
    assert [line.split()[0] for line in lines[2:]] == [
        "policy",
        "imitation-success",
        "imitation-expert",
        "imitation-mixed",
        "doing",
    ]
    assert "30/40 = 0.75" in lines[2] and "state with object pose, no cameras" in lines[2]


def offline(cfg: Experiment) -> Experiment:
    """The same experiment without a simulator, evaluated on held-out episodes."""
    cfg = dataclasses.replace(cfg, sim=SimConfig(), evaluate=EvaluateConfig())
    write_run(cfg, "value", "value")
    write_run(cfg, "policy", "policy")
    write_table(cfg)
    error = {
        "policy": {"normalised": 0.21, "raw": 0.011},
        "hold the current pose": {"normalised": 0.63, "raw": 0.044},
        "mean action": {"normalised": 0.9, "raw": 0.06},
    }
    rank = {**estimate(0.87, 2), "episodes": {"3": 0.85, "7": 0.89}}
    dataset = {"episodes": [3, 7], "chunks": 128, "action_error": error, "value_rank": rank}
    results = {
        "kind": "offline",
        "run_name": "policy",
        "weighting": "hvd",
        "observes": {"proprioception": True, "object_pose": False, "images": ["base_0_rgb"]},
        "policy_digest": "new",
        "datasets": {"optimal": dataset},
    }
    folder = Path(cfg.exp_dir) / "evaluation" / "policy"
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps(results))
    return cfg


def test_without_a_simulator_action_errors_and_rank_are_shown(cfg):
    cfg = offline(cfg)
    assert missing(cfg) == ""
    page = Page(report.render(cfg))
    assert "Held-out episodes" in page.headings and "Rollouts" not in page.headings
    assert {"hold the current pose", "0.210", "0.630"} <= set(page.cells)
    assert any("rank correlation with progress 0.87" in words for words in page.words)
    said = report_results.summary(cfg)
    assert "mean action" in said and "rank correlation with progress 0.87" in said


def test_a_success_and_a_failure_are_chosen(cfg):
    from hvd.data.dataset import Dataset

    write_table(cfg)
    table = Advantages.find(cfg.advantages_dir)
    assert table is not None
    dataset = Dataset.open(cfg.suboptimal_data, cameras=())
    labels = dataset.root / "labels"
    chosen = report_advantages.choose(dataset, table, "suboptimal", labels, 2)
    assert [(episode.index, episode.success) for episode in chosen] == [(0, True), (1, False)]


def test_columns_of_numbers_are_aligned_as_numbers():
    section = report_page.Section("x")
    section.table(["name", "count"], [["a", "1,200"], ["b", "-"]])
    assert section.body[0].count('class="n"') == 3
    section.table(["name", "what"], [["a", "1,200"], ["b", "<many>"]])
    assert 'class="n"' not in section.body[1] and "&lt;many&gt;" in section.body[1]


def test_no_text_breaks_the_page():
    evil = "</p><script>alert(1)</script>\" onload='x'"
    section = Section(evil)
    section.text(evil)
    section.table([evil], [[evil]])
    section.missing.append(evil)
    text = page(evil, evil, [section])
    assert "<script" not in text and "</p><" not in text.replace("</p><nav", "")
    assert 'http-equiv="Content-Security-Policy" content="default-src \'none\';' in text
