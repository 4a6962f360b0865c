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


def fitted(text: str, width: int, size: int = 14, least: int = 8) -> tuple[str, ImageFont.FreeTypeFont]:
    """`text` broken at spaces into lines of at most `width` pixels, and its font.

    A word that is too long makes the font smaller, down to `least`; one too long even so is cut with dots.
    """
    words = text.split()
    while size > least and any(font(size).getlength(word) > width for word in words):
        size -= 1
    pen, lines = font(size), [""]
    for word in words:
        while pen.getlength(word) > width:
            word = word.removesuffix("…")[:-1] + "…"
        longer = f"{lines[-1]} {word}".strip()
        if pen.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return "\n".join(lines), pen


def grid(
    rows: list[list[Image.Image]], columns: list[str], captions: list[list[str]], side: int = 192
) -> Image.Image:
    """A table of pictures: a heading over each column, a caption under each picture.

    side: pixels of the longer side of each picture in the sheet.
    """
    width = side + 8
    height = side + 24
    headings = [fitted(heading, side) for heading in columns]
    top = 14 + 18 * max(text.count("\n") + 1 for text, _ in headings)
    sheet = Image.new("RGB", (8 + width * len(columns), top + height * len(rows)), "white")
    pen = ImageDraw.Draw(sheet)
    for x, (heading, face) in enumerate(headings):
        pen.multiline_text((8 + x * width, 8), heading, font=face, fill="black", spacing=4)
    for y, row in enumerate(rows):
        for x, image in enumerate(row):
            scale = side / max(image.size)
            size = (round(image.width * scale), round(image.height * scale))
            corner = (8 + x * width, top + y * height)
            sheet.paste(image.resize(size, Image.Resampling.BICUBIC), corner)
            pen.text((corner[0], corner[1] + side + 3), captions[y][x], font=font(12), fill="black")
    return sheet


SHOWN = 4  # prompts from the start in compare.png, and as many of the worst


def compare(rows: list[dict], images: Path) -> Image.Image:
    """Prompts in rows, contestants in columns: the first prompts, then those with the lowest PSNR of all."""
    by_id: dict[str, dict[str, dict]] = {}
    for row in rows:
        by_id.setdefault(row["id"], {})[row["label"]] = row
    labels = list(dict.fromkeys(row["label"] for row in rows))
    whole = [identity for identity, found in by_id.items() if len(found) == len(labels)]

    def lowest(identity: str) -> float:
        return min(
            (r["psnr"] for r in by_id[identity].values() if r["psnr"] is not None), default=float("inf")
        )

    chosen = dict.fromkeys([*whole[:SHOWN], *sorted(whole, key=lowest)[:SHOWN]])
    pictures, captions = [], []
    for identity in chosen:
        found = [by_id[identity][label] for label in labels]
        pictures.append([Image.open(images / f"{row['key']}.png").convert("RGB") for row in found])
        captions.append([identity if n == 0 else _caption(row) for n, row in enumerate(found)])
    return grid(pictures, labels, captions)


def _caption(row: dict) -> str:
    return "identical" if row["psnr"] is None else f"{row['psnr']:.1f} dB, {row['seconds']:.2f} s"
