"""How much more several processes draw than one: pictures a second for each core, and what loading takes.

    python -m analysis.efficiency                                       # 1 and 2 processes, 16 prompts
    python -m analysis.efficiency --processes 1 2 --limit 32 -- --method plan --speedup 5
    python -m analysis.efficiency --processes 1 8 -- --model black-forest-labs/FLUX.1-dev    # on 8 GPUs

Runs `run.py --prompts FILE --processes N` with what follows `--`, on N cores with one thread each (with GPUs:
without such limits). Loading ends as the first picture begins. `efficiency` is pictures a second and process
after loading, over those of the first N; `with loading` is of the whole command. Give enough prompts: at the
end processes wait for the last picture.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from analysis.cli import TINY_PROMPTS, guarded
from analysis.drawing.draw import default_device
from analysis.measures.processes import timed
from analysis.options import Parser, at_least_one
from analysis.records.provenance import machine


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--processes", type=at_least_one, nargs="+", default=[1, 2])
    parser.add_argument("--prompts", type=Path, default=TINY_PROMPTS, help="default: %(default)s")
    parser.add_argument("--limit", type=at_least_one, default=16, help="prompts (default: %(default)s)")
    parser.add_argument("further", nargs="*", metavar="-- OPTION", help="of run.py")
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> None:
    if own := {"--out", "--prompts", "--processes"} & {text.partition("=")[0] for text in args.further}:
        raise ValueError(f"-- {min(own)}: that is set here, and cannot be an option of run.py")
    lines = args.prompts.read_text(encoding="utf-8").splitlines()[: args.limit]
    with tempfile.TemporaryDirectory() as folder:
        prompts = Path(folder) / args.prompts.name
        prompts.write_text("\n".join(lines), encoding="utf-8")
        found = []
        for processes in args.processes:
            found.append(timed(processes, prompts, args.further))
            row = found[-1].row(found[0])
            if processes == args.processes[0]:
                print("| " + " | ".join(row) + " |\n" + "|---" * len(row) + "|")
            print("| " + " | ".join(f"{value:.4g}" for value in row.values()) + " |", flush=True)
    here = machine(default_device())
    print(f"\n{here['device_name']}, {len(lines)} prompts, run.py {' '.join(args.further)}")


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    return guarded(lambda: run(args), "nothing is kept")


if __name__ == "__main__":
    sys.exit(main())
