"""Writes reviews.csv: 480 short reviews whose words tell the stars."""

import csv
import random

WORDS = {
    "1": "broken awful refund useless returned angry",
    "3": "okay average fine acceptable ordinary mixed",
    "5": "excellent perfect love superb recommend happy",
}
OTHERS = "the a it box came with screen and after two days of use in my house"
draw = random.Random(0)
with open("reviews.csv", "w", newline="", encoding="utf-8") as file:
    writer = csv.writer(file)
    writer.writerow(["review", "stars"])
    for _ in range(480):
        stars = draw.choice(list(WORDS))
        words = draw.choices(WORDS[stars].split(), k=3)
        words += draw.choices(OTHERS.split(), k=draw.randint(3, 12))
        draw.shuffle(words)
        writer.writerow([" ".join(words), stars])
