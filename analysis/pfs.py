"""What pooled feature summaries (PFS) give, and what they do not: against full tensors and other summaries.

    python -m analysis.pfs                        # figure and answer from the shipped records
    python -m analysis.pfs --run --limit 20       # repeat all three measurements
    python -m analysis.pfs --run --device cuda    # the cost of a check on a GPU, too
    python -m analysis.pfs --run --parts decisions --out DIR    # one of them again, the others stay in DIR

1. Cost of a check on tensors of FLUX.1-dev's real shapes (1024x1024), and its share of a step. 2. Steadiness
of the measure over steps, and how often a decision flips when the latents get a little noise, at thresholds
that let half of the checks hit. 3. Quality at thresholds re-tuned until every summary hits equally often;
a forced hit is no check's decision and does not count, and a threshold without hits is not determined.
The embedded model has so few tokens that its own window is 1: there full tensors are the default.

Writes pfs.png/.pdf/.csv and the answer in pfs.md.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from analysis.ablations.pfs import PARTS, run
from analysis.cli import figure_script, shipped
from analysis.figures import style
from analysis.figures.pfs import answer, draw
from analysis.measuring import parser_of
from analysis.records.pfs import complete, read
from analysis.records.provenance import source_of

SHIPPED = Path(shipped("assets/results/tiny_flux_pfs"))


# Numbers from rows.


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = parser_of(__doc__, "pfs")
    parser.add_argument("--records", type=Path, default=SHIPPED, help="folder with the three record files")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="of the run")
    return parser.parse_args(argv)


@figure_script
def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    folder = run(args) if args.run else args.records
    saved = read(folder)
    names = complete(saved)
    draw(saved, names, args.out / "pfs")
    style.write_words(args.out / "pfs.md", answer(saved, names, source_of(folder)))
    return max([found.exit_code() for found in saved.values()])  # a list: all of them tell


if __name__ == "__main__":
    sys.exit(main())
