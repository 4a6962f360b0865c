"""What each method will keep in memory, reckoned before anything runs.

    python -m analysis.cache_memory                                     # FLUX.1-dev at 1024x1024, bfloat16
    python -m analysis.cache_memory --double 20 --single 40 --img 118800 --txt 256   # HunyuanVideo, 720p
    python -m analysis.cache_memory --set taylorseer:order=2 --free-gib 24

Bytes for each guidance branch beside the model and its activations, with the default settings or --set. With
--free-gib, what cannot fit is marked.
"""

from __future__ import annotations

from analysis.options import Parser, not_negative, whole
from analysis.settings import config_of
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
        "--double", type=whole(0, BIG), default=19, help="double blocks, or those of the structure stage"
    )
    parser.add_argument(
        "--single", type=whole(0, BIG), default=38, help="single blocks, or those of the detail stage"
    )
    parser.add_argument("--img", type=whole(1, BIG), default=4096, help="image tokens")
    parser.add_argument("--txt", type=whole(0, BIG), default=512, help="text tokens")
    parser.add_argument("--width", type=whole(1, BIG), default=3072)
    parser.add_argument("--out-channels", type=whole(1, BIG), default=64)
    parser.add_argument("--itemsize", type=whole(1, BIG), default=2, help="bytes of a number")
    parser.add_argument("--batch", type=whole(1, BIG), default=1)
    parser.add_argument("--set", nargs="+", default=VARIANTS, metavar="METHOD:KEY=VALUE[:KEY=VALUE...]")
    parser.add_argument("--free-gib", type=not_negative)
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
    for text in [*method_names(), *args.set]:
        try:
            needed = config_of(text).bytes_needed(shape)
        except ValueError as error:
            parser.error(str(error))
        fits = args.free_gib is None or needed <= args.free_gib * 2**30
        print(f"{text:<50}{needed / 2**20:>10.1f} MiB{'' if fits else '  does not fit'}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
