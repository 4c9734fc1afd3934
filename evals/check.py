"""Try the verifiers: an empty and a wrong answer must fail, a right one must pass.

python evals/check.py [ID ...]  # make evals-check; all take a quarter of an hour
"""

import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from evals.answers import ANSWERS  # noqa: E402
from evals.verify import grade, load_evals, prepare  # noqa: E402


def try_verifier(number: int) -> list[str]:
    """What is wrong with the verifier of an eval."""
    right, wrong = ANSWERS[number]
    problems = []
    for kind, answer in {"empty": None, "wrong": wrong, "right": right}.items():
        with tempfile.TemporaryDirectory(prefix="eval ") as name:
            folder = Path(name)
            prepare(number, folder)
            if answer:
                answer(folder)
            began = time.monotonic()
            grading = grade(number, folder)
            seconds = time.monotonic() - began
        failed = [r for r in grading["assertion_results"] if not r["passed"]]
        print(f"eval {number:2} {kind:5} {seconds:5.1f} s", end="  ")
        print("; ".join(r["evidence"] for r in failed)[:150] or "passed", flush=True)
        if kind == "right":
            problems += [f"{r['text']}: {r['evidence']}" for r in failed]
        elif not failed:
            problems.append(f"the {kind} answer passed")
    return [f"eval {number}: {problem}" for problem in problems]


if __name__ == "__main__":
    numbers = [int(word) for word in sys.argv[1:]] or list(load_evals())
    problems = [problem for number in numbers for problem in try_verifier(number)]
    print(*problems, sep="\n")
    good = len(numbers) - len({p.partition(":")[0] for p in problems})
    print(f"{good} passed, {len(numbers) - good} failed")
    sys.exit(int(bool(problems)))
