"""What the generator costs: the whole process beside its parts, and script lengths.

    make bench

"yours" are the lines before the tools, docstring and imports included.

Times are medians of interleaved runs, so that whatever else the machine does slows all
of them alike; compare the ratios, not the milliseconds.
"""

import importlib.metadata
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from generator import __version__  # noqa: E402
from generator.options import SECTIONS, TASKS, check_request  # noqa: E402
from generator.render import render_script  # noqa: E402

RUNS = 10
TOOLS_START = "# --- templates/"


def time_command(words: list[str], folder: str) -> float:
    """Milliseconds of a whole process."""
    start = time.perf_counter()
    subprocess.run(words, cwd=folder, check=True, capture_output=True)
    return (time.perf_counter() - start) * 1000


def measure_times() -> dict[str, list[float]]:
    """Milliseconds of each run, by what was run."""
    python = sys.executable
    flags = ["--amp", "--checkpointing", "-o", "train.py", "--force"]
    commands = {
        'python -c "pass"': [python, "-c", "pass"],
        'python -c "import jinja2"': [python, "-c", "import jinja2"],
        "generate-script --amp --checkpointing": [
            python,
            str(ROOT / "generator"),
            *flags,
        ],
    }
    times: dict[str, list[float]] = {name: [] for name in commands}
    with tempfile.TemporaryDirectory() as folder:
        for words in commands.values():  # fills the caches of bytecode and files
            time_command(words, folder)
        for _ in range(RUNS):
            for name, words in commands.items():
                times[name].append(time_command(words, folder))
    return times


def count_lines(task: str, names: list[str]) -> tuple[int, int]:
    """Lines of a script: the part that its user owns, and the tools behind it."""
    # A section that needs a value gets its first choice, or 2.
    values = {
        name: None
        if SECTIONS[name].default is not None
        else (*SECTIONS[name].choices, "2")[0]
        for name in names
    }
    request, problems = check_request(task, values, "train.py", split=False)
    assert request is not None, problems
    text = render_script(request).text
    yours = text.partition(TOOLS_START)[0].count("\n")
    return yours, text.count("\n") - yours


def main() -> None:
    """Print both tables."""
    jinja2 = importlib.metadata.version("jinja2")
    print(
        f"pytorch-optimization {__version__}, Python {platform.python_version()},"
        f" jinja2 {jinja2}, {platform.system()} {platform.machine()}"
    )
    print(f"\n{f'whole process, {RUNS} runs each':40} median ms  lowest  highest")
    for name, times in measure_times().items():
        middle = statistics.median(times)
        print(f"{name:40} {middle:9.0f} {min(times):7.0f} {max(times):8.0f}")
    print(f"\n{'lines of the script':40} yours  tools  total")
    choices = {
        "no section": [],
        "--amp --checkpointing": ["amp", "checkpointing"],
        "all sections": list(SECTIONS),
    }
    for task in TASKS:
        for title, names in choices.items():
            yours, tools = count_lines(task, names)
            print(f"{f'{task}: {title}':40} {yours:5} {tools:6} {yours + tools:6}")


if __name__ == "__main__":
    main()
