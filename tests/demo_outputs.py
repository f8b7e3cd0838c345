"""Is what the README's main line promises there? python tests/demo_outputs.py runs/demo LOG   (used by .ci/run)

LOG is what `launch/submit.py --stage all` printed. Exit code 1 with one line for each broken promise.
"""

import json
import sys
from pathlib import Path

POLICIES = ("policy", "published-hvd", "level-by-level", "imitation-expert", "imitation-mixed", "imitation-success")


def problems(folder: Path, printed: list[str]) -> list[str]:
    found = []

    def must(holds: bool, words: str) -> None:
        if not holds:
            found.append(words)

    report = folder / "report.html"
    must(bool(printed) and printed[-1].strip() == f"report: {report}", f"the last line is not `report: {report}`")
    rows = printed[-2 - len(POLICIES) : -1]
    table = [line.split()[0] for line in rows if line.split()]
    must(set(table[:-1]) == set(POLICIES), f"the last lines are no table of {', '.join(POLICIES)}: {table}")
    by_ratio = ("policy", "level-by-level")  # 40 rollouts do not tell the twins apart
    must(set(table[:2]) == set(by_ratio), f"the table's first rows are not those of the filters by the ratio: {table}")
    must(table[-1:] == ["doing"], "the table's last row is not doing nothing")
    must(all("object pose" in line for line in rows[:-1]), "the table does not say what the policies observe")

    for name in ("value", *POLICIES):
        must((folder / name / "complete.json").is_file(), f"{name} is not complete")
    text = report.read_text() if report.is_file() else ""
    must(len(text) > 300_000, f"{report} is missing or empty")
    must("Not in this report" not in text, f"{report} lacks something: see its first lines")
    must(text.count("data:video/mp4") >= 3, f"{report} holds fewer than three videos")

    rates = {}
    for name in (*POLICIES, "doing_nothing"):
        path = folder / "evaluation" / name / "results.json"
        must(path.is_file(), f"{path} is missing")
        rates[name] = json.loads(path.read_text())["success"]["mean"] if path.is_file() else float("nan")
    must(rates["policy"] >= 0.5, f"the policy succeeds in {rates['policy']:.2f} of its rollouts, not in half of them")
    must(rates["doing_nothing"] == 0, f"doing nothing succeeds in {rates['doing_nothing']:.2f} of its rollouts")
    for name in ("credit.json", "scores.json"):
        must((folder / "evaluation" / name).is_file(), f"{name} is missing")
    return found


if __name__ == "__main__":
    said = problems(Path(sys.argv[1]), [line for line in Path(sys.argv[2]).read_text().splitlines() if line.strip()])
    print("\n".join(said) or "the main line's outputs are all there")
    sys.exit(1 if said else 0)
