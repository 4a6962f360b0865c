"""What each method will keep in memory, calculated before anything runs.

    python -m analysis.cache_memory                                     # FLUX.1-dev at 1024x1024, bfloat16
    python -m analysis.cache_memory --double 20 --single 40 --img 118800 --txt 256   # HunyuanVideo, 720p
    python -m analysis.cache_memory --set taylorseer:order=2 --free-gib 24
    python -m analysis.cache_memory --models        # a table of all families at their usual sizes
    python -m analysis.cache_memory --check         # small models run: calculated, counted, and in memory

Bytes for each guidance branch beside the model and its activations, with the default settings or --set. With
--free-gib, what cannot fit is marked. --check compares them with the storages of all tensors that are alive
after each step, less those without a cache; exit code 1 where more is kept than is counted.
"""

from __future__ import annotations

from analysis.measures.held import check, table_of_models
from analysis.options import Parser, not_negative, whole
from analysis.settings import config_of
from analysis.tiny_families import FAMILIES
from h2cache import method_names
from h2cache.method import Shape

VARIANTS = (
    "taylorseer:order=2",
    "taylorseer:granularity=stage",
    "hicache:granularity=stage",
    "speca:granularity=stage",
    "taylorseer_lite:lite_at=hidden",
    "h2cache:predictor=taylor",
    "h2cache:predictor=dmd",
)
BIG = 2**40  # of numbers that are only multiplied


def main(argv: list[str] | None = None) -> int:
    parser = Parser(__doc__)
    parser.add_argument(
        "--double", type=whole(0, BIG), default=19, help="blocks with attention and mlp apart"
    )
    parser.add_argument("--single", type=whole(0, BIG), default=38, help="blocks with both in one")
    parser.add_argument("--img", type=whole(1, BIG), default=4096, help="image tokens")
    parser.add_argument("--txt", type=whole(0, BIG), default=512, help="text tokens")
    parser.add_argument("--width", type=whole(1, BIG), default=3072)
    parser.add_argument("--out-channels", type=whole(1, BIG), default=64)
    parser.add_argument("--itemsize", type=whole(1, BIG), default=2, help="bytes of a number")
    parser.add_argument("--batch", type=whole(1, BIG), default=1)
    parser.add_argument("--set", nargs="+", default=VARIANTS, metavar="METHOD:KEY=VALUE[:KEY=VALUE...]")
    parser.add_argument("--free-gib", type=not_negative)
    parser.add_argument("--models", action="store_true", help="all families at their usual sizes")
    parser.add_argument(
        "--check", nargs="*", choices=[*FAMILIES, []], metavar="FAMILY", help="by running small models"
    )
    args = parser.parse_args(argv)
    if args.double + args.single == 0:
        parser.error("--double 0 --single 0: one block at least is needed")
    shape = Shape(
        (args.double, args.single),
        args.img,
        args.txt,
        args.width,
        args.out_channels,
        args.itemsize,
        args.batch,
    )
    methods = [*method_names(), *args.set]
    try:
        [config_of(text) for text in methods]
    except ValueError as error:
        parser.error(str(error))
    if args.models:
        print(table_of_models(methods))
        return 0
    if args.check is not None:
        found, wrong = check(methods, args.check or list(FAMILIES))
        print(found)
        return int(wrong > 0)
    for text in methods:
        needed = config_of(text).bytes_needed(shape)
        fits = args.free_gib is None or needed <= args.free_gib * 2**30
        print(f"{text:<50}{needed / 2**20:>10.1f} MiB{'' if fits else '  does not fit'}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
