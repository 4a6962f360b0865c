"""Imports point one way: read from the sources, nothing is imported."""

import ast
from pathlib import Path

import pytest

LAYERS = (  # each may use those before it, and its own
    "similarity weights policies schedule grid machine expected tuned records offload nunchaku_install",
    "program predictors",  # what a method says and sees
    "engines.forms engines.base parallel memory",  # what an engine tells; the state of a request
    "method",  # the contract
    "forecasting registry room outputs h2 plan engines engines.* baselines baselines.*",  # methods, models
    "modules drive requests attachment gate",  # a method carried out inside a model
    "presets api studio thresholds tuning drop_in sparse models models.* __init__",  # what a user calls
    "comfyui comfyui.*",  # what a user of ComfyUI calls
)


def sources() -> dict[str, Path]:
    """Every module of the package, without its first name, and its file."""
    found = {}
    for folder, prefix in (("h2cache", ""), ("baselines", "baselines.")):
        for path in Path(folder).rglob("*.py"):
            name = prefix + ".".join(path.relative_to(folder).with_suffix("").parts)
            found[name.removesuffix(".__init__").removesuffix("__init__") or "__init__"] = path
    return {name.removesuffix(".") or "__init__": path for name, path in found.items()}


def imports(path: Path, known: set[str]) -> set[str]:
    """The modules of the package that a file imports, wherever in the file it does."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: an import that is relative"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        for name in names:
            if name.split(".")[0] != "h2cache":
                continue
            inner = name.removeprefix("h2cache").removeprefix(".")
            found.add(inner if inner in known else inner.rpartition(".")[0] or "__init__")
    return found


@pytest.fixture(scope="module")
def graph() -> dict[str, set[str]]:
    files = sources()
    return {name: imports(path, set(files)) - {name} for name, path in files.items()}


def layer(name: str) -> int:
    """The number of a module's layer; its own name counts before that of its folder."""
    for wanted in (name, f"{name.rpartition('.')[0]}.*"):
        for number, names in enumerate(LAYERS):
            if wanted in names.split():
                return number
    pytest.fail(f"{name} is in no layer: say in LAYERS where it belongs")


def test_no_arrow_points_upwards(graph):
    upwards = [(name, other) for name, used in graph.items() for other in used if layer(other) > layer(name)]
    assert not upwards


def test_there_is_no_circle(graph):
    left = {name: set(used) for name, used in graph.items()}
    while free := {name for name, used in left.items() if not used}:
        left = {name: used - free for name, used in left.items() if name not in free}
    assert not left, f"these import each other, or what does: {sorted(left)}"


def test_methods_and_engines_never_meet(graph):
    for name, used in graph.items():
        if name.startswith("engines"):
            assert not {
                u for u in used if u.startswith("baselines") or u in ("h2", "plan", "method", "memory")
            }
        if name.startswith("baselines") or name in ("h2", "plan"):
            assert not {u for u in used if u.startswith("engines")}


def test_nothing_is_imported_for_types_alone():
    assert not [name for name, path in sources().items() if "TYPE_CHECKING" in path.read_text()]
