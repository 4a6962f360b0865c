"""Evaluation tools and experiments around h2cache; run as modules from the repository root."""

import os
import signal
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # no advice on torchvision, which nothing here needs


def stop(*_: Any) -> None:
    """Ctrl-C while modules load, where an exception could end up anywhere."""
    os.write(2, b"stopped: nothing has begun\n")
    os._exit(130)


# of a command, whose first import this is: `python -m analysis.X`, or run.py
_COMMAND = sys.argv[:1] == ["-m"] or (
    sys.argv[:1] != [""] and Path(sys.argv[0]).resolve() == Path(__file__).resolve().parents[1] / "run.py"
)
if _COMMAND and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, stop)
