"""Writes pairs.csv: 2,400 questions about parts, and the answers.

A question names four parts as customers do, its answer the same four as the warehouse
does. A fifth of the answers belong to other questions.
"""

import csv
import random

PARTS = 480
ASKED = "do you have|how long until i get|what replaces|can i send back"
TOLD = "in stock here are|we deliver|please order|this is about"
draw = random.Random(0)
syllables = [a + b for a in "bdfgklmnprstvz" for b in "aeiou"]
names = {}
while len(names) < PARTS:
    theirs, ours = ("".join(draw.choices(syllables, k=length)) for length in (3, 4))
    names[theirs] = ours
with open("pairs.csv", "w", newline="", encoding="utf-8") as file:
    writer = csv.writer(file)
    writer.writerow(["question", "answer"])
    for _ in range(2_400):
        parts = draw.sample(sorted(names), 4)
        question = [draw.choice(ASKED.split("|")), *parts]
        if draw.random() < 0.2:
            parts = draw.sample(sorted(names), 4)
        draw.shuffle(parts)
        answer = [draw.choice(TOLD.split("|")), *(names[part] for part in parts)]
        writer.writerow([" ".join(question), " ".join(answer)])
