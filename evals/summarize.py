"""Add up an iteration: pass rate, time and tokens, with the skill and without.

    python evals/summarize.py WORKSPACE/iteration-1

Reads eval-ID/{with_skill,without_skill}/grading.json and timing.json, prints a table
and writes benchmark.json. Several runs of an arm go into run-1, run-2, ... below it.
"""

import json
import statistics
import sys
from pathlib import Path

ARMS = ("with_skill", "without_skill")
MEASURES = ("pass_rate", "time_seconds", "tokens")


def read_run(folder: Path) -> dict[str, float]:
    """Pass rate, and time and tokens where they were written down."""
    grading = json.loads((folder / "grading.json").read_text(encoding="utf-8"))
    run = {"pass_rate": grading["summary"]["pass_rate"]}
    if (folder / "timing.json").exists():
        timing = json.loads((folder / "timing.json").read_text(encoding="utf-8"))
        if "duration_ms" in timing:
            run["time_seconds"] = timing["duration_ms"] / 1000
        if "total_tokens" in timing:
            run["tokens"] = timing["total_tokens"]
    return run


def read_runs(iteration: Path, arm: str) -> dict[str, list[dict[str, float]]]:
    """The runs of each eval."""
    found: dict[str, list[dict[str, float]]] = {}
    for path in sorted(iteration.glob(f"eval-*/{arm}/**/grading.json")):
        name = path.relative_to(iteration).parts[0]
        found.setdefault(name, []).append(read_run(path.parent))
    return found


def summarize(runs: dict[str, list[dict[str, float]]]) -> dict[str, dict[str, float]]:
    summary = {}
    every = [run for several in runs.values() for run in several]
    for measure in MEASURES:
        values = [run[measure] for run in every if measure in run]
        if values:
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            summary[measure] = {"mean": statistics.mean(values), "stddev": spread}
    return summary


def mean_of(several: list[dict[str, float]], measure: str) -> str:
    values = [run[measure] for run in several if measure in run]
    if not values:
        return "-"
    mean = statistics.mean(values)
    return f"{mean:.0%}" if measure == "pass_rate" else f"{mean:.0f}"


def main(iteration: Path) -> None:
    arms = {arm: read_runs(iteration, arm) for arm in ARMS}
    both = sorted(arms[ARMS[0]].keys() & arms[ARMS[1]].keys())
    if not both:
        sys.exit(f"{iteration}: no eval has a grading.json in both arms")
    left_out = sorted((arms[ARMS[0]].keys() | arms[ARMS[1]].keys()) - set(both))
    print("| eval | passed, with / without | seconds | tokens |\n|---|---|---|---|")
    for name in both:
        cells = [
            " / ".join(mean_of(arms[arm][name], measure) for arm in ARMS)
            for measure in MEASURES
        ]
        print(f"| {name} | {' | '.join(cells)} |")
    total = {arm: summarize({n: arms[arm][n] for n in both}) for arm in ARMS}
    delta = {
        measure: total[ARMS[0]][measure]["mean"] - total[ARMS[1]][measure]["mean"]
        for measure in MEASURES
        if all(measure in total[arm] for arm in ARMS)
    }
    print(f"lift: {delta['pass_rate'] * 100:+.0f} points", end="")
    print("".join(f", {delta[m]:+.0f} {m}" for m in MEASURES[1:] if m in delta))
    if left_out:
        print(f"left out, only in one arm: {', '.join(left_out)}")
    report = {"run_summary": {**total, "delta": delta}}
    text = json.dumps(report, indent=2) + "\n"
    (iteration / "benchmark.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
