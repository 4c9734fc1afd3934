"""The same batches, much sooner, and each row once."""

from pathlib import Path

from evals.common import copy_of, expect, must_run, need, original

PROBE = """
import sys, time
import loader
for workers in (0, 2):
    seconds = []  # the first time, imports count as well
    for _ in range(3 - workers):
        began = time.perf_counter()
        batches = [(x.clone(), y.clone()) for x, y in loader.make_loader(
            "events.parquet", 256, workers)]
        seconds.append(time.perf_counter() - began)
    if workers == 0:
        lines = [tuple(row) for x, y in batches
                 for row in x[:, :2].double().tolist()]
        sizes = [len(y) for _, y in batches]
        kinds = sorted({(str(x.dtype), str(y.dtype), x.shape[1]) for x, y in batches})
        labels = [v for _, y in batches for v in y.tolist()]
        print("seconds", min(seconds))
        print("order", hash((tuple(lines), tuple(labels))), sizes == [256] * 78 + [43],
              kinds)
    else:
        rows = [tuple(row) for x, _ in batches for row in x.double().tolist()]
        print("workers", len(rows), len(set(rows)))
    if "--one" in sys.argv:
        break
"""


def probe(folder: Path, *words: str) -> dict[str, str]:
    (folder / "probe.py").write_text(PROBE, encoding="utf-8")
    lines = must_run(["probe.py", *words], folder, PYTHONHASHSEED="0").splitlines()
    return dict(line.split(" ", 1) for line in lines)


def compare(answer: Path) -> tuple[dict, dict]:
    need(answer, "loader.py")
    if answer not in _compared:
        with copy_of(answer) as folder:
            new = probe(folder)
            (folder / "loader.py").write_bytes(original(3, "loader.py").read_bytes())
            _compared[answer] = new, probe(folder, "--one")
    return _compared[answer]


_compared: dict[Path, tuple[dict, dict]] = {}


def check_same_batches(answer: Path) -> None:
    """Without workers: the same rows in the same order, sizes and dtypes."""
    new, old = compare(answer)
    expect(new["order"] == old["order"], "another order, batch size, dtype or label")


def check_each_row_once(answer: Path) -> None:
    """With two workers each of the 20,011 rows comes once."""
    new, _ = compare(answer)
    expect(new["workers"] == "20011 20011", f"{new['workers']} rows, different rows")


def check_faster(answer: Path) -> None:
    """Without workers it takes at most a fifth of the time."""
    new, old = compare(answer)
    ratio = float(old["seconds"]) / float(new["seconds"])
    expect(ratio >= 5, f"{ratio:.1f} x as fast")
