"""Which words can be read in a picture: RapidOCR (PP-OCR models inside the wheel, CPU, one thread).

    python -m analysis.measures.words picture.png CAFE   # prints what is read, and the share of "CAFE" found

A word counts as read only when it stands alone or as a whole line: the detector also finds "text" in
pictures that hold none, so any reading that merely contains the word says little.
"""

import importlib.util
import re
import sys
import unicodedata
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from PIL import Image

from analysis.cli import guarded
from analysis.options import Parser

SMALLEST, LARGEST = 256, 512  # long side in pixels: 128 px enlarged reads better, 1024 px far worse than 512


def normalise(word: str) -> str:
    """Capitals and digits only, accents removed: BALLY'S, À and 10,000 compare too."""
    return re.sub(r"[^A-Z0-9]", "", unicodedata.normalize("NFKD", word).upper())


def problem() -> str | None:
    """Why no word can be read here, with what to install; None if they can. Loads nothing."""
    needed = ("rapidocr", "onnxruntime")  # rapidocr does not install its own engine
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    return f"reading words needs {' and '.join(missing)}: pip install {' '.join(needed)}" if missing else None


@lru_cache
def engine():
    """The reader, made once."""
    if reason := problem():
        raise ImportError(reason)
    from rapidocr import RapidOCR

    params = {"Global.log_level": "critical", "EngineConfig.onnxruntime.intra_op_num_threads": 1}
    return RapidOCR(params=params)


def read_words(image: Image.Image) -> list[str]:
    """Every line read, and every part of it between spaces, normalised."""
    side = max(image.size)
    wanted = min(max(side, SMALLEST), LARGEST)
    if wanted != side:
        size = (round(image.width * wanted / side), round(image.height * wanted / side))
        image = image.resize(size, Image.Resampling.LANCZOS)
    pixels = np.asarray(image.convert("RGB"))[:, :, ::-1]  # the models want BGR
    # All three flags every time: a flag left out keeps the value of the call before.
    lines = engine()(pixels, use_det=True, use_cls=True, use_rec=True).txts or ()
    return [normalise(part) for line in lines for part in (line.replace(" ", ""), *line.split())]


def word_recall(wanted: Sequence[str], image: Image.Image) -> float | None:
    """The share of the wanted words that is read; None when nothing is wanted."""
    words = [word for word in map(normalise, wanted) if word]
    if not words:
        return None
    found = read_words(image)
    return sum(word in found for word in words) / len(words)


def main(argv: list[str] | None = None) -> int:
    parser = Parser(__doc__)
    parser.add_argument("image")
    parser.add_argument("words", nargs="*")
    args = parser.parse_args(argv)

    def work() -> None:
        image = Image.open(args.image)
        print(read_words(image), word_recall(args.words, image))

    return guarded(work, "nothing is read")


if __name__ == "__main__":
    sys.exit(main())
