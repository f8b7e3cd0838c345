"""`hvd report`: <exp_dir>/report.html, one file with everything that is known about an experiment.

What is not there yet is said at the top of the page and does not stop the report; only an experiment without any run is
an error.
"""

import os
import time

import yaml
from etils import epath

from hvd import files
from hvd.configs import Experiment
from hvd.errors import UserError
from hvd.fields import to_plain
from hvd.method.table import Advantages
from hvd.report import advantages as report_advantages
from hvd.report import curves as report_curves
from hvd.report import evaluation as report_evaluation
from hvd.report import results as report_results
from hvd.report.page import Section, page
from hvd.train import run_dir as runs


def main(cfg: Experiment) -> None:
    """Write the report and print its path."""
    root = epath.Path(cfg.exp_dir)
    if not root.exists():
        raise UserError(f"no experiment at {root}: train it first (launch/submit.py --stage all)")
    path = root / "report.html"
    files.write_shared(path, render(cfg))
    print(f"report: {os.fspath(path)} ({path.stat().length / 1e6:.1f} MB)")


def render(cfg: Experiment) -> str:
    """The page as text."""
    found = report_results.read(cfg)
    table = Advantages.find(cfg.advantages_dir)
    sections = [
        report_evaluation.success(cfg, found),
        report_evaluation.offline(cfg, found),
        report_evaluation.videos(cfg, found),
        report_advantages.along_episodes(cfg, table),
        report_evaluation.credit(cfg),
        report_advantages.distributions(cfg, table),
        report_curves.section(cfg, policy_runs(cfg)),
        _settings(cfg),
    ]
    model = cfg.model
    subtitle = (
        f"config {cfg.name}, robot {cfg.robot}, {model.network_type}, {model.method}; hvd {runs.code_version()}, "
        f"{time.strftime('%Y-%m-%d %H:%M')}"
    )
    return page(f"hvd: {cfg.exp_name or cfg.name}", subtitle, sections)


def policy_runs(cfg: Experiment) -> list[str]:
    """Names of the policy runs of the experiment, its own first."""
    root = epath.Path(cfg.exp_dir)
    names = []
    for path in sorted(root.iterdir()):
        record = runs.read(path) if path.is_dir() else None
        if record is not None and record.stage == "policy":
            names.append(path.name)
    return sorted(names, key=lambda name: (name != cfg.policy.run_name, name))


def _settings(cfg: Experiment) -> Section:
    out = Section("Settings")
    for name in ("value", *policy_runs(cfg)):
        record = runs.read(epath.Path(cfg.exp_dir) / name)
        if record is None:
            continue
        text = yaml.safe_dump({"version": record.version, **to_plain(record.config)}, sort_keys=False)
        out.fold(f"{name}: config of the run", text)
    return out
