"""The doors: readers that are given damaged inputs, by name.

A door writes good files into a folder when it is made; `damage` spoils a copy of them and says how; `read` reads the
copy, and returns what is wrong with what it accepted, "" for nothing.
"""

from collections.abc import Callable
from pathlib import Path

from tests.fuzz import data, results, runs, serving
from tests.fuzz.door import Door

DOORS: dict[str, Callable[[Path], Door]] = {
    "dataset": data.dataset,
    "images": data.images,
    "videos": data.videos,
    "recording": data.recording,
    "labels": data.labels,
    "norm_stats": data.norm_stats,
    "config": runs.config,
    "overrides": runs.overrides,
    "owner": runs.owner,
    "advantages": runs.advantages,
    "checkpoint": runs.checkpoint,
    "results": results.results,
    "metrics": results.metrics,
    "openpi": serving.openpi,
    "message": serving.message,
    "connection": serving.connection,
    "store": serving.store,
    "site": serving.site,
}
