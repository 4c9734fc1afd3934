"""A kill while saving costs nothing that was there before."""

from pathlib import Path

from evals.common import copy_of, expect, must_run, need, run

SAVE = """
import sys, torch
from checkpoints import save
for step in map(int, sys.argv[1:]):
    save({"weights": torch.full((1000,), float(step)), "step": step}, "saved", step)
"""
# torch.save writes half of the file, then the process is gone.
KILLED = """
import io, os, torch
whole = torch.save
def save(value, file, *args, **kwargs):
    buffer = io.BytesIO()
    whole(value, buffer)
    half = buffer.getvalue()[: buffer.tell() // 2]
    if hasattr(file, "write"):
        file.write(half)
        file.flush()
    else:
        with open(file, "wb") as opened:
            opened.write(half)
    os._exit(9)
torch.save = save
"""
LOAD = """
from checkpoints import load_latest
state, step = load_latest("saved")
print(step, "none" if state is None else state["step"])
"""
BAD_CODE = """
import os, pickle, torch
class Harm:
    def __reduce__(self):
        return os.mkdir, ("harm",)
torch.save({"step": Harm()}, NEWEST)
"""


def prepare(folder: Path, steps: list[int]) -> None:
    need(folder, "checkpoints.py")
    (folder / "save_one.py").write_text(SAVE, encoding="utf-8")
    (folder / "save_half.py").write_text(KILLED + SAVE, encoding="utf-8")
    (folder / "load_it.py").write_text(LOAD, encoding="utf-8")
    if steps:
        must_run(["save_one.py", *steps], folder)


def loaded(folder: Path) -> str:
    """Step and content, from the last line: what comes before may be a warning."""
    return must_run(["load_it.py"], folder).strip().rpartition("\n")[2]


def check_saves_and_loads(answer: Path) -> None:
    """The newest by number is loaded, step 10 after step 9; none gives (None, 0)."""
    with copy_of(answer) as folder:
        prepare(folder, [])
        expect(loaded(folder) == "0 none", "an empty folder does not give (None, 0)")
        prepare(folder, [9, 10])
        expect(loaded(folder) == "10 10", f"after 9 and 10 it loads {loaded(folder)}")


def check_survives_a_kill_while_saving(answer: Path) -> None:
    """Killed in the middle of torch.save, the one before is loaded."""
    with copy_of(answer) as folder:
        prepare(folder, [5])
        for step in (6, 5):  # the next one, and the same one again
            done = run(["save_half.py", step], folder)
            expect(done.returncode == 9, "torch.save was not called in save")
            expect(loaded(folder) == "5 5", f"it loads {loaded(folder)}")


def check_skips_a_damaged_file(answer: Path) -> None:
    """With the newest file cut short, the one before is loaded."""
    with copy_of(answer) as folder:
        prepare(folder, [1, 2])
        newest = newest_file(folder)
        newest.write_bytes(newest.read_bytes()[: newest.stat().st_size // 2])
        expect(loaded(folder) == "1 1", f"it loads {loaded(folder)}")


def check_runs_no_code_of_a_file(answer: Path) -> None:
    """A file with code in it is not executed."""
    with copy_of(answer) as folder:
        prepare(folder, [1, 2])
        code = BAD_CODE.replace("NEWEST", repr(str(newest_file(folder))))
        must_run(["-c", code], folder)
        run(["load_it.py"], folder)  # may fail or load step 1, but not obey
        expect(not (folder / "harm").exists(), "the code in the file was executed")


def newest_file(folder: Path) -> Path:
    """What was written last of the files that hold tensors."""
    paths = [p for p in (folder / "saved").rglob("*") if p.is_file()]
    paths = [p for p in paths if p.stat().st_size > 2000]
    expect(paths, "nothing was saved in the folder")
    return max(paths, key=lambda p: (p.stat().st_mtime_ns, p.name))
