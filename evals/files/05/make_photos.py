"""Writes photos/CLASS/NUMBER.png: 40 pictures each of a disc, a frame and stripes."""

import random
from pathlib import Path

from PIL import Image, ImageDraw

draw = random.Random(0)
for name in ("disc", "frame", "stripes"):
    folder = Path("photos", name)
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(40):
        dark = tuple(draw.randint(0, 90) for _ in range(3))
        light = tuple(draw.randint(150, 255) for _ in range(3))
        image = Image.new("RGB", (32, 32), dark)
        pen = ImageDraw.Draw(image)
        left, top, size = draw.randint(1, 8), draw.randint(1, 8), draw.randint(16, 22)
        if name == "disc":
            pen.ellipse((left, top, left + size, top + size), fill=light)
        elif name == "frame":
            box = (left, top, left + size, top + size)
            pen.rectangle(box, outline=light, width=3)
        else:
            for y in range(top % 4, 32, 6):
                pen.rectangle((0, y, 31, y + 2), fill=light)
        image.save(folder / f"{number:02}.png")
