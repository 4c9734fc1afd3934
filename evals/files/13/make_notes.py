"""Writes notes/NUMBER.txt: 28 files of sentences that a few templates make."""

import random
from pathlib import Path

CHOICES = {
    "who": "Amina Bruno Chandra Dolores Emeka Freya Giorgos Hanae Ivan Jolanta",
    "what": "compressor gearbox thermostat conveyor generator dispenser",
    "where": "downstairs upstairs outdoors backstage",
    "when": "Monday Tuesday Wednesday Thursday Friday Saturday Sunday",
}
TEMPLATES = (
    "{who} inspected the {what} {where} on {when} and found nothing unusual.\n",
    "On {when} the {what} {where} was stopped; {who} replaced two bearings.\n",
    "The {what} {where} has to be cleaned again before {when}, says {who}.\n",
    "{when}: {who} ordered spare parts for the {what} {where}.\n",
)
draw = random.Random(0)
folder = Path("notes")
folder.mkdir(exist_ok=True)
for number in range(28):
    lines = []
    for _ in range(draw.randint(10, 40)):
        chosen = {name: draw.choice(words.split()) for name, words in CHOICES.items()}
        lines.append(draw.choice(TEMPLATES).format(**chosen))
    (folder / f"{number:02}.txt").write_text("".join(lines), encoding="utf-8")
