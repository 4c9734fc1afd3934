"""A page about attention, with the right numbers and without code."""

import math
import re
from pathlib import Path

from evals.common import expect, need, no_pytorch


def check_numbers(answer: Path) -> None:
    """The two weights are softmax((2, 0) / sqrt(2)), to three decimals."""
    text = need(answer, "attention.md").read_text(encoding="utf-8")
    first = math.exp(2 / math.sqrt(2)) / (math.exp(2 / math.sqrt(2)) + 1)
    numbers = [float(n) for n in re.findall(r"(?<![\d.])0\.\d{3,}", text)]
    for weight in (first, 1 - first):
        close = [n for n in numbers if abs(n - weight) < 6e-4]
        expect(close, f"{weight:.3f} is not there, but {numbers[:8]}")


def check_one_page_without_code(answer: Path) -> None:
    """100 to 900 words with the formula, no code block of a language, no script."""
    text = need(answer, "attention.md").read_text(encoding="utf-8")
    words = len(text.split())
    expect(100 <= words <= 900, f"{words} words")
    expect(re.search("softmax", text, re.I), "no formula")
    expect("sqrt" in text or "√" in text, "no square root in the formula")
    expect(not re.search(r"```(python|py|torch)|def \w+\(", text), "there is code")
    expect(not list(answer.glob("*.py")), "there is a script")


def check_no_pytorch(answer: Path) -> None:
    """Nothing of PyTorch and nothing of the generator is in the answer."""
    need(answer, "attention.md")
    no_pytorch(answer)
