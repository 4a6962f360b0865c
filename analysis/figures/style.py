"""How all figures look: one size, one type face, one colour and one mark for each method.

Colours are those of Okabe and Ito, which the colour-blind can tell apart, with three dark ones of Paul Tol's
for the methods beyond; marks tell the methods apart in grey print. A figure is saved as PNG and PDF with its
data as CSV beside it, without dates, so that a rerun on the same records gives the same bytes.
"""

from __future__ import annotations

import csv
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from analysis.records.store import write_atomically

PAGE = 7.0  # width in inches of every figure: both columns of a page
STYLE = {
    "font.family": "DejaVu Sans",  # comes with matplotlib
    "font.size": 8,
    "axes.labelsize": 8,
    "axes.titlesize": 8,
    "legend.fontsize": 7,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.5,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "lines.linewidth": 1.2,
    "lines.markersize": 4.5,
    "hatch.linewidth": 0.5,
    "pdf.fonttype": 42,
    "savefig.dpi": 300,
}


@dataclass(frozen=True)
class Look:
    """How a method is drawn."""

    name: str
    colour: str
    marker: str

    @property
    def points(self) -> dict:
        """Keyword arguments of `plot` for its marks."""
        edge = {"markeredgecolor": "black", "markeredgewidth": 0.4}
        return {"color": self.colour, "marker": self.marker, **edge}


LOOKS = {
    "none": Look("uncached", "#000000", "s"),
    "h2cache": Look("H2-Cache", "#D55E00", "o"),
    "h2cache predictor=taylor": Look("H2-Cache, Taylor", "#8C3D00", "o"),
    "h2cache predictor=dmd": Look("H2-Cache, DMD", "#FDB863", "o"),
    "plan": Look("plan, tuned", "#B2182B", "s"),
    "plan file=none": Look("plan, default grid", "#F4A582", "s"),
    "block_cache": Look("Block Cache", "#E69F00", "^"),
    "teacache": Look("TeaCache", "#0072B2", "D"),
    "fewer_steps": Look("fewer steps (control)", "#999999", "X"),
    "taylorseer": Look("TaylorSeer", "#009E73", "v"),
    "taylorseer_lite": Look("TaylorSeer-Lite", "#56B4E9", "P"),
    "hicache": Look("HiCache", "#CC79A7", "<"),
    "speca": Look("SpeCa", "#F0E442", ">"),
    "clusca": Look("ClusCa", "#332288", "h"),
    "magcache": Look("MagCache", "#882255", "*"),
    "seacache": Look("SeaCache", "#0072B2", "p"),
    "easycache": Look("EasyCache", "#E69F00", "d"),
    "meancache": Look("MeanCache", "#117733", "8"),
    "spectrum": Look("Spectrum", "#44AA99", "H"),
    "budcache": Look("BudCache", "#882255", "X"),
    "dicache": Look("DiCache", "#332288", "d"),
    "sencache": Look("SenCache", "#AA4499", "p"),
}
OTHERS = ("#117733", "#44AA99", "#AA4499", "#661100")  # for methods not listed, by the sum of their name
STRUCTURE, DETAIL, BOTH = "#0072B2", "#E69F00", "#666666"  # the two stages, wherever stages are compared


def look(method: str) -> Look:
    """How `method` is drawn: always the same, for a method nobody listed too."""
    if method in LOOKS:
        return LOOKS[method]
    number = zlib.crc32(method.encode())
    return Look(method, OTHERS[number % len(OTHERS)], "dpH8"[number // 7 % 4])


@contextmanager
def figure(width: float, height: float) -> Iterator[Figure]:
    """An empty figure of this size in inches, drawn and saved in the common style."""
    with matplotlib.rc_context(STYLE):
        yield Figure(figsize=(width, height), layout="constrained")


def letter(axes, text: str) -> None:
    """Head a panel of several with its letter and subject."""
    axes.set_title(text, loc="left", fontweight="bold")


def logarithmic(axis) -> None:
    """A logarithmic axis (`axes.xaxis` or `.yaxis`) with plain numbers at 1, 2 and 5 of each decade."""
    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_formatter(NullFormatter())


def save(drawn: Figure, path: Path, data: list[dict]) -> None:
    """Write `path`.png, `path`.pdf and the numbers in it as `path`.csv; call inside `figure`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for suffix, metadata in ((".png", {"Software": None}), (".pdf", {"CreationDate": None})):
        file = io.BytesIO()
        drawn.savefig(file, format=suffix[1:], metadata=metadata)
        write_atomically(path.with_name(path.name + suffix), file.getvalue())
    text = io.StringIO()
    writer = csv.DictWriter(
        text, list(dict.fromkeys(name for row in data for name in row)), lineterminator="\n"
    )
    writer.writeheader()
    writer.writerows({k: round(v, 6) if isinstance(v, float) else v for k, v in row.items()} for row in data)
    write_atomically(path.with_name(path.name + ".csv"), text.getvalue().encode())


def write_words(path: Path, text: str) -> None:
    """Write an answer in words beside its figure, and print it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, (text.rstrip() + "\n").encode())
    print(text.rstrip())
