"""Pictures side by side, with labels."""

from __future__ import annotations

from pathlib import Path

import matplotlib
from PIL import Image, ImageDraw, ImageFont


def font(size: int) -> ImageFont.FreeTypeFont:
    """The font that comes with matplotlib: no machine lacks it."""
    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf", size)


def side_by_side(images: list[Image.Image], labels: list[str]) -> Image.Image:
    """The images in a row, small ones enlarged, each with its label below."""
    factor = max(1, 384 // images[0].height)
    images = [i.resize((i.width * factor, i.height * factor), Image.Resampling.BICUBIC) for i in images]
    lines = max(label.count("\n") + 1 for label in labels)
    width, height = images[0].size
    sheet = Image.new("RGB", ((width + 12) * len(images) + 12, height + 24 + 20 * lines), "white")
    pen = ImageDraw.Draw(sheet)
    for n, (image, label) in enumerate(zip(images, labels, strict=True)):
        left = 12 + n * (width + 12)
        sheet.paste(image, (left, 12))
        pen.multiline_text((left, height + 16), label, font=font(15), fill="black", spacing=4)
    return sheet


def grid(
    rows: list[list[Image.Image]], columns: list[str], captions: list[list[str]], side: int = 192
) -> Image.Image:
    """A table of pictures: a heading over each column, a caption under each picture.

    side: pixels of the longer side of each picture in the sheet.
    """
    width = side + 8
    height = side + 24
    sheet = Image.new("RGB", (8 + width * len(columns), 32 + height * len(rows)), "white")
    pen = ImageDraw.Draw(sheet)
    for x, heading in enumerate(columns):
        pen.text((8 + x * width, 8), heading, font=font(14), fill="black")
    for y, row in enumerate(rows):
        for x, image in enumerate(row):
            scale = side / max(image.size)
            size = (round(image.width * scale), round(image.height * scale))
            corner = (8 + x * width, 32 + y * height)
            sheet.paste(image.resize(size, Image.Resampling.BICUBIC), corner)
            pen.text((corner[0], corner[1] + side + 3), captions[y][x], font=font(12), fill="black")
    return sheet
