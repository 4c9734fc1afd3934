"""The evals have the standard's form, and their verifiers tell right from wrong."""

import json
from pathlib import Path

import pytest

from evals import summarize
from evals.answers import ANSWERS
from evals.check import try_verifier
from evals.verify import checks_of, load_evals

ROOT = Path(__file__).resolve().parents[2]
EVALS = load_evals()
FAST = (7, 12)  # a few seconds each; all of them in `make evals-check`
NEGATIVE = (10, 11, 12)


def test_form_is_that_of_the_standard():
    document = json.loads((ROOT / "evals/evals.json").read_text(encoding="utf-8"))
    assert document.keys() == {"skill_name", "evals"}
    assert document["skill_name"] == "pytorch-optimization"
    assert [item["id"] for item in document["evals"]] == list(range(1, 17))
    for item in document["evals"]:
        expected = ["id", "prompt", "expected_output", "files", "assertions"]
        assert list(item) == expected
        assert len(item["prompt"]) > 80
        for file in item["files"]:
            assert (ROOT / file).is_file()
        # Nothing in a prompt gives away that there is a skill.
        assert "skill" not in item["prompt"].lower()
        assert "generate-script" not in item["prompt"]
    assert any(ord(c) > 0xAC00 for item in EVALS.values() for c in item["prompt"])


@pytest.mark.parametrize("number", EVALS)
def test_assertions_are_those_of_the_verifier(number):
    assert EVALS[number]["assertions"] == list(checks_of(number))
    if number in NEGATIVE:
        assert any("Nothing of PyTorch" in text for text in checks_of(number))


def test_every_eval_has_answers_and_every_file_a_use():
    assert ANSWERS.keys() == EVALS.keys()
    used = {file for item in EVALS.values() for file in item["files"]}
    files = (ROOT / "evals/files").rglob("*.*")
    there = {path.relative_to(ROOT).as_posix() for path in files}
    assert {name for name in there if "__pycache__" not in name} == used


def test_triggers():
    text = (ROOT / "evals/triggers.json").read_text(encoding="utf-8")
    triggers = json.loads(text)
    assert len(triggers) == 20
    assert sum(item["should_trigger"] for item in triggers) == 10
    assert len({item["query"] for item in triggers}) == 20
    for item in triggers:
        assert item.keys() == {"query", "should_trigger"}


@pytest.mark.parametrize("number", FAST)
def test_verifier_tells_right_from_wrong(number):
    assert not try_verifier(number)


@pytest.mark.slow
@pytest.mark.parametrize("number", [n for n in EVALS if n not in FAST])
def test_slow_verifier_tells_right_from_wrong(number):
    assert not try_verifier(number)


def write_run(
    folder: Path, passed: int, failed: int, seconds: int, tokens: int
) -> None:
    folder.mkdir(parents=True)
    rate = passed / (passed + failed)
    grading = {"summary": {"passed": passed, "failed": failed, "pass_rate": rate}}
    timing = {"duration_ms": seconds * 1000, "total_tokens": tokens}
    (folder / "grading.json").write_text(json.dumps(grading))
    (folder / "timing.json").write_text(json.dumps(timing))


def test_summary_adds_up_both_arms(tmp_path, capsys):
    write_run(tmp_path / "eval-01/with_skill", 2, 0, 60, 1000)
    write_run(tmp_path / "eval-01/without_skill/run-1", 1, 1, 200, 5000)
    write_run(tmp_path / "eval-01/without_skill/run-2", 0, 2, 100, 3000)
    write_run(tmp_path / "eval-02/with_skill", 1, 1, 1, 1)  # has no other arm
    summarize.main(tmp_path)
    output = capsys.readouterr().out
    assert "| eval-01 | 100% / 25% | 60 / 150 | 1000 / 4000 |" in output
    assert "lift: +75 points, -90 time_seconds, -3000 tokens" in output
    assert "left out, only in one arm: eval-02" in output
    report = json.loads((tmp_path / "benchmark.json").read_text())["run_summary"]
    assert report["without_skill"]["tokens"]["mean"] == 4000
    assert report["delta"]["pass_rate"] == 0.75
