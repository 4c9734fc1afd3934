"""Writes tickets.csv: 640 support requests whose words tell the team they are for."""

import csv
import random

WORDS = {
    "billing": "invoice charged twice refund receipt payment",
    "network": "router offline dns latency vpn dropped",
    "hardware": "keyboard fan battery screen hinge charger",
    "accounts": "password locked login reset username expired",
}
OTHERS = "hello please since this morning our office can you look at it again thanks"
draw = random.Random(0)
with open("tickets.csv", "w", newline="", encoding="utf-8") as file:
    writer = csv.writer(file)
    writer.writerow(["message", "team"])
    for _ in range(640):
        team = draw.choice(list(WORDS))
        words = draw.choices(WORDS[team].split(), k=2)
        words += draw.choices(" ".join(WORDS.values()).split(), k=1)  # of any team
        words += draw.choices(OTHERS.split(), k=draw.randint(4, 12))
        draw.shuffle(words)
        writer.writerow([" ".join(words), team])
