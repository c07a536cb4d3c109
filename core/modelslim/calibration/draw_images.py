# SPDX-License-Identifier: Apache-2.0
"""Draws the images of the calibration set ``calibImages``: ``python -m modelslim.calibration.draw_images FOLDER``.

Between them they have what a vision tower meets: smooth and hard edges, fine texture, text, empty areas, and
widths and heights that differ.
"""

from __future__ import annotations

import sys
from math import cos, pi, sin
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

Color = tuple[int, int, int]


def draw_all(folder: Path) -> None:
    """Write every image into ``folder``, which must exist."""
    for name, image in (
        ("hills.jpg", hills()),
        ("harvest.png", harvest()),
        ("notice.png", notice()),
        ("shapes.png", shapes()),
        ("street.jpg", street()),
        ("bowl.jpeg", bowl()),
    ):
        image.save(folder / name, **({"optimize": True} if name.endswith(".png") else {"quality": 80}))


def hills() -> Image.Image:
    """A wide landscape: three ridges below a sun."""
    image = _fade(560, 240, (94, 148, 214), (250, 214, 170))
    draw = ImageDraw.Draw(image)
    draw.ellipse((410, 60, 466, 116), fill=(255, 240, 200))
    for height, wave, shift, color in (
        (128, 150.0, 0.4, (124, 142, 160)),
        (160, 104.0, 2.0, (82, 118, 96)),
        (196, 71.0, 4.1, (46, 84, 52)),
    ):
        ridge = [(x, height + 22 * sin(x / wave * 2 + shift) + 7 * sin(x / wave * 7)) for x in range(0, 561, 4)]
        draw.polygon([*ridge, (560, 240), (0, 240)], fill=color)
    return _grain(image, 7)


def harvest() -> Image.Image:
    """A bar chart with a title, names and numbers."""
    image = Image.new("RGB", (400, 280), (255, 255, 255))
    draw = ImageDraw.Draw(image)
    draw.text((112, 10), "Harvest in tonnes", fill=(20, 20, 20), font=ImageFont.load_default(20))
    bars: tuple[tuple[str, int, Color], ...] = (
        ("apples", 64, (200, 60, 50)),
        ("pears", 38, (120, 170, 60)),
        ("plums", 91, (110, 70, 150)),
        ("quinces", 17, (225, 180, 60)),
    )
    for index, (name, tonnes, color) in enumerate(bars):
        left = 50 + index * 84
        draw.rectangle((left, 240 - 2 * tonnes, left + 52, 240), fill=color)
        draw.text((left + 16, 222 - 2 * tonnes), str(tonnes), fill=(20, 20, 20), font=ImageFont.load_default(15))
        draw.text((left, 248), name, fill=(20, 20, 20), font=ImageFont.load_default(15))
    draw.line((40, 44, 40, 240, 384, 240), fill=(20, 20, 20), width=2)
    return image.quantize(32)


def notice() -> Image.Image:
    """A tall page of text."""
    image = Image.new("L", (280, 392), 248)
    draw = ImageDraw.Draw(image)
    draw.rectangle((10, 10, 269, 381), outline=60, width=2)
    draw.text((28, 30), "FERRY TIMES", fill=10, font=ImageFont.load_default(30))
    rows = ("Monday     06:40  13:15", "Tuesday    06:40  17:30", "Friday     07:05  19:50", "Sunday     no ferry")
    for index, row in enumerate(rows):
        draw.text((28, 96 + 40 * index), row, fill=30, font=ImageFont.load_default(18))
    draw.text((28, 280), "Tickets are sold on board.\nBicycles travel free.", fill=30, font=ImageFont.load_default(16))
    return image


def shapes() -> Image.Image:
    """Plain shapes on a small square."""
    image = Image.new("RGB", (196, 196), (238, 236, 228))
    draw = ImageDraw.Draw(image)
    draw.ellipse((16, 18, 84, 86), fill=(206, 44, 44))
    draw.rectangle((108, 22, 172, 86), fill=(36, 84, 190))
    draw.polygon(((50, 112), (16, 176), (84, 176)), fill=(238, 186, 34))
    star = [
        (140 + radius * sin(pi * step / 5), 146 - radius * cos(pi * step / 5))
        for step, radius in enumerate((36, 15) * 5)
    ]
    draw.polygon(star, fill=(206, 44, 44))
    return image


def street() -> Image.Image:
    """A row of houses behind a road with one car."""
    image = _fade(448, 336, (150, 190, 226), (226, 234, 240))
    draw = ImageDraw.Draw(image)
    walls: tuple[Color, ...] = ((196, 120, 92), (222, 200, 150), (140, 160, 172), (206, 170, 170))
    for index, wall in enumerate(walls):
        left, top = 12 + index * 108, 96 - 22 * (index % 3)
        draw.rectangle((left, top, left + 98, 250), fill=wall)
        draw.polygon(((left - 6, top), (left + 49, top - 44), (left + 104, top)), fill=(96, 56, 48))
        for floor in range(2 + (index % 3 > 0)):
            for column in (12, 58):
                x, y = left + column, top + 14 + 44 * floor
                draw.rectangle((x, y, x + 28, y + 28), fill=(250, 236, 160), outline=(60, 60, 66), width=2)
        draw.rectangle((left + 36, 214, left + 62, 250), fill=(70, 48, 36))
    draw.rectangle((0, 250, 448, 336), fill=(84, 84, 88))
    for left in range(10, 448, 60):
        draw.rectangle((left, 290, left + 32, 295), fill=(230, 230, 224))
    draw.rounded_rectangle((150, 262, 262, 300), 10, fill=(30, 110, 90))
    draw.polygon(((170, 262), (188, 240), (232, 240), (248, 262)), fill=(180, 214, 224))
    for left in (164, 224):
        draw.ellipse((left, 288, left + 26, 314), fill=(24, 24, 26), outline=(170, 170, 174), width=4)
    return _grain(image, 11)


def bowl() -> Image.Image:
    """Three round fruits in a bowl, with soft light and shadow."""
    image = _fade(252, 308, (92, 80, 76), (188, 164, 138))
    shadow = Image.new("L", image.size, 0)
    ImageDraw.Draw(shadow).ellipse((30, 236, 232, 292), fill=150)
    image.paste((48, 36, 30), mask=shadow.filter(ImageFilter.GaussianBlur(9)))
    for x, y, radius, color in (
        (88, 146, 46, (226, 120, 34)),
        (164, 140, 50, (176, 34, 40)),
        (126, 98, 42, (122, 168, 52)),
    ):
        image.paste(_ball(radius, color), (x - radius, y - radius), _disc(radius))
    draw = ImageDraw.Draw(image)
    draw.chord((24, 60, 228, 272), 12, 168, fill=(226, 224, 216), outline=(120, 116, 110))
    return _grain(image, 5)


def _fade(width: int, height: int, top: Color, bottom: Color) -> Image.Image:
    share = np.linspace(0, 1, height)[:, None, None]
    rows = np.asarray(top) * (1 - share) + np.asarray(bottom) * share
    return Image.fromarray(np.broadcast_to(rows, (height, width, 3)).astype(np.uint8))


def _ball(radius: int, color: Color) -> Image.Image:
    """A square with a ball that is lit from the upper left."""
    y, x = np.mgrid[-1 : 1 : 2j * radius, -1 : 1 : 2j * radius]
    light = np.clip(1.25 - 0.75 * np.hypot(x + 0.35, y + 0.4), 0.25, 1.25)[..., None]
    return Image.fromarray(np.clip(light * np.asarray(color), 0, 255).astype(np.uint8))


def _disc(radius: int) -> Image.Image:
    mask = Image.new("L", (2 * radius, 2 * radius), 0)
    ImageDraw.Draw(mask).ellipse((0, 0, 2 * radius - 1, 2 * radius - 1), fill=255)
    return mask


def _grain(image: Image.Image, seed: int) -> Image.Image:
    """Texture at two sizes, since flat areas alone would make a vision tower's activations too quiet."""
    rng = np.random.default_rng(seed)
    pixels = np.asarray(image, np.float64)
    for scale, strength in ((12, 9.0), (3, 6.0)):
        coarse = rng.normal(0, strength, (image.height // scale, image.width // scale)).astype(np.float32)
        fine = Image.fromarray(coarse).resize(image.size, Image.Resampling.BICUBIC)
        pixels = pixels + np.asarray(fine)[..., None]
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


if __name__ == "__main__":
    draw_all(Path(sys.argv[1]))
