"""Keeping what was computed: files written whole or not at all, and one record for each image.

Files go to a temporary name in the same folder and are then renamed: a killed run leaves no half file. Two
runs may keep their records in one file at once: each adds its own under a lock.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import platform
import re
import shutil
import time
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from PIL import Image

from analysis.records.saved import BreaksOff, row_of, scan
from h2cache import MethodConfig

try:
    import fcntl
except ImportError:  # Windows has none
    fcntl = None  # type: ignore[assignment]

CHECKOUT = Path(__file__).resolve().parents[2]
PATIENCE = 60  # seconds to wait for another process that writes


class BrokenLine(UserWarning):
    """A line of records that cannot be read."""


def temporary(path: Path, process: int | None = None) -> Path:
    """Where `process` (default: this one) of this machine writes what is to become `path`."""
    return path.with_name(f".{path.name}.{HOST}.{process or os.getpid()}.tmp")


HOST = re.sub(r"[^A-Za-z0-9-]", "_", platform.node()) or "local"  # folders may be shared between machines
TEMPORARY = re.compile(rf"\..+\.{HOST}\.(\d+)\.tmp")


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file whole or not at all."""
    half = temporary(path)
    try:
        with open(half, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(half, path)
    except OSError as error:  # a full disk names no file
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        with suppress(OSError):
            half.unlink(missing_ok=True)


@contextmanager
def locked(path: Path, patience: float = PATIENCE) -> Iterator[None]:
    """Keep other processes from `path` until the end; one that was killed holds nothing.

    Raises TimeoutError that names who holds it, when that takes longer than `patience` seconds.
    """
    lock, until = path.with_name(f".{path.name}.lock"), time.monotonic() + patience
    while (file := _take(lock)) is None:
        if time.monotonic() > until:
            holder = "another process"
            with suppress(OSError):  # which may let go of it just now
                holder = lock.read_text(encoding="utf-8") or holder
            raise TimeoutError(f"{path.parent}: {holder} writes there: end it or wait, or give another --out")
        time.sleep(0.02)
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)  # while it is held: who waits for it sees that it is another file
        file.close()


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Make `folder`, and refuse it to others that would hold it, until the end."""
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / "run", patience=0):
        yield


def _take(lock: Path) -> TextIO | None:
    """The lock file, held; None while another process holds it."""
    file = open(lock, "a+", encoding="utf-8")  # noqa: SIM115  held by the caller
    try:
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        mine = os.fstat(file.fileno()).st_ino == os.stat(lock).st_ino
    except OSError as error:
        # a file system without locks is used without
        mine = error.errno in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
    if not mine:
        file.close()
        return None
    file.truncate(0)
    file.write(f"process {os.getpid()} on {HOST}")
    file.flush()
    return file


def sweep(folder: Path) -> None:
    """Remove the temporary files of processes of this machine that were killed while they wrote."""
    for path in folder.rglob(".*.tmp"):
        match = TEMPORARY.fullmatch(path.name)
        if match and not _runs(int(match[1])):
            path.unlink(missing_ok=True)


def _runs(process: int) -> bool:
    """Whether a process of this number may be running on this machine."""
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # another user's
        return True
    return True


def save_png(path: Path, image: Image.Image) -> None:
    """Save an image atomically."""
    buffer = BytesIO()
    image.save(buffer, "PNG")
    write_atomically(path, buffer.getvalue())


def run_key(**settings: Any) -> str:
    """A short hash of everything that decides how an image looks and what it costs."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:16]


PNG_END = b"\0\0\0\0IEND\xaeB`\x82"


def has_end(path: Path) -> bool:
    """Whether a PNG has its last bytes; quick, where `whole_picture` reads all of it."""
    try:
        with open(path, "rb") as file:
            file.seek(-len(PNG_END), os.SEEK_END)
            return file.read() == PNG_END
    except OSError:
        return False


def read_new(path: Path, known: tuple[int, int]) -> tuple[dict[str, dict], tuple[int, int]]:
    """The rows added to a file of records since it was read up to `known`, and up to where it is now.

    known: which file it was (another one is read from its beginning), and how many bytes; (0, 0): none.
    """
    rows: dict[str, dict] = {}
    try:
        with open(path, "rb") as file:
            number = os.fstat(file.fileno()).st_ino
            begin = known[1] if number == known[0] else 0
            file.seek(begin)
            new = file.read()
    except FileNotFoundError:
        return {}, (0, 0)
    end = new.rfind(b"\n") + 1  # another process may be in the middle of a line
    for line in new[:end].splitlines():
        with suppress(ValueError):
            row = row_of(line, {"key": str})
            rows[row["key"]] = row
    return rows, (number, begin + end)


def whole_picture(path: Path) -> Image.Image | None:
    """The picture in a file; None where there is none, or a file cut short."""
    try:
        with Image.open(path) as image:
            image.load()
            return image
    except Exception:  # Pillow has a dozen for a broken file
        return None


# Records.


def read_records(path: Path) -> dict[str, dict]:
    """The rows of a `records.jsonl` (or .jsonl.gz) by key.

    Of one key, the last line counts. A broken line is left out with a warning that names it, and kept in
    `NAME.broken` beside the file, since the next `write_records` leaves it out too; half a line at the end,
    which a killed process left, is left out for good.
    """
    if not path.is_file():
        return {}
    rows, broken = {}, []
    for number, line, row in scan(path, {"key": str}):
        if isinstance(row, dict):
            rows[row["key"]] = row
        elif isinstance(row, BreaksOff):
            warnings.warn(f"{path} breaks off in line {number}", BrokenLine, stacklevel=2)
        else:
            warnings.warn(f"{path} line {number} is left out: {row}", BrokenLine, stacklevel=2)
            broken.append(line)
    if broken:
        _keep_broken(path.with_name(f"{path.name}.broken"), broken)
    return rows


def _keep_broken(path: Path, broken: list[bytes]) -> None:
    kept = path.read_bytes().split(b"\n") if path.is_file() else []
    new = [line for line in broken if line not in kept]
    try:
        if new:
            write_atomically(path, b"".join(line + b"\n" for line in [*filter(None, kept), *new]))
    except OSError as error:  # such as a folder that may only be read: nothing will delete the line either
        warnings.warn(f"{path}: {error}", BrokenLine, stacklevel=3)


def add_records(path: Path, rows: dict[str, dict]) -> None:
    """Add a line for each of `rows`, which other processes may do too: of one key, the last line counts.

    Half a line that a killed process left at the end is taken away. See `tidy` for lines that do not count.
    """
    with locked(path), open(path, "a+b") as file:
        end = file.seek(0, os.SEEK_END)
        try:
            end = _whole_lines(file, end)
            file.write(_lines(rows))
            file.flush()
            os.fsync(file.fileno())
        except OSError as error:  # a full disk: no half line stays
            with suppress(OSError):
                os.truncate(path, end)
            raise OSError(error.errno, error.strerror, str(path)) from None


def _whole_lines(file: BinaryIO, end: int) -> int:
    """Make `file` end with a whole line; its new length."""
    file.seek(max(0, end - 1))
    if file.read() in (b"", b"\n"):
        return end
    file.seek(0)
    data = file.read()
    start = data.rfind(b"\n") + 1
    try:
        row_of(data[start:], {})
    except ValueError:
        file.truncate(start)
        return start
    file.write(b"\n")  # an editor left it out
    return end + 1


def tidy(path: Path) -> dict[str, dict]:
    """The rows of a file of records, once lines that do not count any more are taken out of it."""
    if not path.is_file():
        return {}
    with locked(path):
        rows = read_records(path)
        if path.read_bytes().count(b"\n") != len(rows):
            write_records(path, rows)
    return rows


def write_records(path: Path, rows: dict[str, dict]) -> None:
    """Write all rows, one JSON object a line, atomically."""
    write_atomically(path, _lines(rows))


def _lines(rows: dict[str, dict]) -> bytes:
    return "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows.values()).encode()


def write_json(path: Path, row: dict) -> None:
    """Write one JSON object, atomically."""
    write_atomically(path, (json.dumps(row, allow_nan=False) + "\n").encode())


def read_json(path: Path) -> dict | None:
    """The object in a file of `write_json`; None if there is none, or none that can be read."""
    try:
        row = json.loads(path.read_text(encoding="utf-8-sig"))
    except (FileNotFoundError, ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


# Names of folders in records.


def place(path: str) -> str:
    """One name for a file or folder, however it is written: in the checkout relative to that, else absolute.

    What is not there, such as a hub id, stays as it is.
    """
    for there in (os.path.expanduser(path), os.path.join(CHECKOUT, path)):
        if path and os.path.exists(there):
            full = Path(there).resolve()
            return full.relative_to(CHECKOUT).as_posix() if full.is_relative_to(CHECKOUT) else str(full)
    return path


def as_before(settings: dict[str, Any], earlier: Iterable[dict | None]) -> dict[str, Any]:
    """`settings` with folders spelled as in `earlier` records of the same ones, which keeps their keys."""
    changed = {}
    rows = [row for row in earlier if row]
    for name in ("model", "input_image", "clip"):
        spellings = dict.fromkeys(row[name] for row in rows if isinstance(row.get(name), str))
        value = settings.get(name)
        if isinstance(value, str) and value not in spellings:
            same = (old for old in spellings if _places(old) == _places(value))
            changed[name] = next(same, value)
    return settings | changed


def _places(name: str) -> str:
    """A model's name with its checkpoint and LoRA, see `loading.load`."""
    return "".join(map(place, re.split(r"( \(| \+ | at )", name)))


def compact(trace: list[dict]) -> list[dict]:
    """Step records by branch and stage, short: one line for all steps.

    outcomes: H hit, F forced hit, M miss. measures, thresholds: null where nothing was compared or finite;
    one threshold for all steps stands alone.
    """
    lines: dict[tuple[str, str], dict] = {}
    for record in trace:
        line = lines.setdefault(
            (record["branch"], record["stage"]),
            {"branch": record["branch"], "stage": record["stage"], "blocks": record["blocks"], "outcomes": ""}
            | {"blocks_run": [], "measures": [], "thresholds": []},
        )
        line["outcomes"] += record["outcome"][0].upper()
        line["blocks_run"].append(record["blocks_run"])
        for many, one in (("measures", "measure"), ("thresholds", "threshold")):
            value = record[one]
            line[many].append(float(f"{value:.4g}") if isinstance(value, float) else None)
    for line in lines.values():
        values = {value for value in line["thresholds"] if value is not None}
        if len(values) < 2:
            line["thresholds"] = values.pop() if values else None
    return list(lines.values())


def require_space(folder: Path, megabytes: int) -> None:
    """OSError unless the disk of `folder` has this much left."""
    free = shutil.disk_usage(folder).free // 2**20
    if free < megabytes:
        raise OSError(f"{folder}: {free} MiB are free on its disk, the run needs about {megabytes} MiB")


def settings_of(config: MethodConfig) -> dict[str, Any]:
    """The settings as JSON values: infinity, which JSON does not know, as the text "inf"."""
    return {k: str(v) if v == float("inf") else v for k, v in asdict(config).items()}
