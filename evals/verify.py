"""Decide whether an answer to an eval is right, by running it.

    python evals/verify.py prepare ID FOLDER  # puts the input files of the task there
    python evals/verify.py ID FOLDER          # prints grading.json; exits 1 if wrong

FOLDER is where the assistant worked. Needs torch, pandas, pyarrow, pillow.
"""

import importlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from evals.common import FOLDER, Failed  # noqa: E402


def load_evals() -> dict[int, dict]:
    text = (FOLDER / "evals.json").read_text(encoding="utf-8")
    return {item["id"]: item for item in json.loads(text)["evals"]}


def load_verifier(number: int) -> ModuleType:
    (path,) = (FOLDER / "verifiers").glob(f"v{number:02}_*.py")
    return importlib.import_module(f"evals.verifiers.{path.stem}")


def checks_of(number: int) -> dict:
    """The checks of an eval by their statements, in the order of the file."""
    functions = vars(load_verifier(number)).items()
    checks = [value for name, value in functions if name.startswith("check_")]
    return {" ".join(check.__doc__.split()): check for check in checks}


def prepare(number: int, folder: Path) -> None:
    """Put the input files there; `make_*.py` are run, and do not stay."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in load_evals()[number]["files"]:
        path = ROOT / name
        if path.name.startswith("make_"):
            subprocess.run([sys.executable, path], cwd=folder, check=True)
        else:
            shutil.copy(path, folder)


def grade(number: int, folder: Path) -> dict:
    """What grading.json holds: each statement, whether it holds, and why not."""
    results = []
    for text, check in checks_of(number).items():
        try:
            check(folder.resolve())
        except Failed as failure:
            results.append({"text": text, "passed": False, "evidence": str(failure)})
        else:
            results.append({"text": text, "passed": True, "evidence": "it was run"})
    passed = sum(result["passed"] for result in results)
    counts = {"passed": passed, "failed": len(results) - passed, "total": len(results)}
    summary = {**counts, "pass_rate": passed / len(results)}
    return {"eval_id": number, "assertion_results": results, "summary": summary}


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["prepare", number, folder]:
            prepare(int(number), Path(folder))
        case [number, folder] if number.isdigit():
            grading = grade(int(number), Path(folder))
            print(json.dumps(grading, indent=2, ensure_ascii=False))
            sys.exit(int(grading["summary"]["failed"] > 0))
        case _:
            sys.exit(__doc__)
