"""The package: what is in it, and that it works from a wheel, an editable install and a bare checkout."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import h2cache

ROOT = Path(h2cache.__file__).resolve().parents[1]
PARTS = ("h2cache", "baselines", "pyproject.toml", "README.md", "LICENSE", *ROOT.glob("requirements*.txt"))
OPTIONAL = {"nunchaku", "PIL"}  # imported where they are used: an engine of its own; ComfyUI has Pillow

# What a user runs, from each place in turn: from a folder with a `baselines/` of their own, which comes first
# on their path. The packages below the library are loaded once.
CHILD = """
import json, os, site, sys
import diffusers, torch

def look(place):
    sys.path.insert(1, place)  # as PYTHONPATH would
    site.addsitedir(place)
    import baselines.mine
    import h2cache, h2cache.baselines.teacache
    from h2cache.registry import fitted_constants
    return {
        "file": h2cache.__file__, "version": h2cache.__version__, "methods": h2cache.method_names(),
        "there": [h2cache.find_method(name).__module__ for name in h2cache.method_names()],
        "constants": len(fitted_constants("teacache", "tiny_flux")), "below": h2cache.baselines.__name__,
        "mine": baselines.mine.__file__,
    }

assert not {"h2cache", "baselines"} & {*sys.modules}
for place in sys.argv[1:]:
    if not os.fork():
        print(json.dumps(look(place)), flush=True)
        os._exit(0)
    os.wait()
"""
BUILD = "import setuptools.build_meta as b, sys; b.build_{}(sys.argv[1])"


def in_child(*arguments: str, at: Path, **environment: str) -> str:
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | environment
    env["OMP_NUM_THREADS"] = "1"  # two threads starve each other on a busy machine
    done = subprocess.run([sys.executable, *arguments], cwd=at, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A copy to build in: a build leaves folders beside what it builds."""
    folder = tmp_path_factory.mktemp("source")
    for part in PARTS:
        copy = shutil.copytree if (ROOT / part).is_dir() else shutil.copy
        copy(ROOT / part, folder / Path(part).name)
    return folder


def built(form: str, source: Path, folder: Path) -> Path:
    """The file that pip would be given, as pip asks for it."""
    in_child("-c", BUILD.format(form), str(folder), at=source)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory) -> Path:
    return built("wheel", source, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def target(wheel, tmp_path_factory) -> Path:
    """Where the wheel is installed: pip does no more to a package without scripts (.ci/run has pip)."""
    folder = tmp_path_factory.mktemp("target")
    zipfile.ZipFile(wheel).extractall(folder)
    return folder


@pytest.fixture(scope="module")
def editable(source, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("editable")
    zipfile.ZipFile(built("editable", source, tmp_path_factory.mktemp("built"))).extractall(folder)
    return folder


@pytest.fixture(scope="module")
def seen(target, editable, tmp_path_factory) -> dict[str, dict]:
    """What a user sees of the library in each of its forms, and the user's own folder."""
    folder = tmp_path_factory.mktemp("user")
    (folder / "baselines").mkdir()
    for file in ("__init__.py", "mine.py"):
        (folder / "baselines" / file).write_text("")
    (folder / "child.py").write_text(CHILD)
    lines = in_child("child.py", *map(str, (target, editable, ROOT)), at=folder).splitlines()
    return dict(zip(("target", "editable", "checkout"), map(json.loads, lines), strict=True))


@pytest.mark.parametrize("form", ["target", "editable", "checkout"])
def test_every_method_is_found_beside_a_folder_of_the_users_own(form, seen, request):
    found = seen[form]
    home = ROOT if form == "checkout" else request.getfixturevalue({"editable": "source"}.get(form, form))
    assert Path(found["file"]).is_relative_to(home)
    assert Path(found["mine"]).parts[-2:] == ("baselines", "mine.py")
    assert not Path(found["mine"]).is_relative_to(home)
    assert found["version"] == h2cache.__version__
    assert found["methods"] == h2cache.method_names()
    assert {"h2cache", "none", "teacache"} <= set(found["methods"])
    assert all(module.startswith("h2cache.") for module in found["there"])
    assert found["constants"] > 0
    assert found["below"] == "h2cache.baselines"


def test_the_pages_python_lines_run(tmp_path, monkeypatch, capsys):
    """From the wheel, .ci/run runs them."""
    monkeypatch.syspath_prepend(str(ROOT / ".ci"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "assets").symlink_to(ROOT / "assets")
    import readme_lines

    for page in ("README.md", "assets/tiny_flux/README.md"):
        readme_lines.run(str(ROOT / page))
        assert re.search(r"[1-9]\d* of \d+ Python blocks ran", capsys.readouterr().out)


def test_the_wheel_has_every_file_of_the_library_and_no_other(wheel):
    there = {
        name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name and name[-1] != "/"
    }
    wanted = [
        file
        for folder in ("h2cache", "baselines")
        for file in (ROOT / folder).rglob("*")
        if file.suffix in (".py", ".json", ".typed")
    ]
    names = {file.relative_to(ROOT).as_posix() for file in wanted}
    assert there == {re.sub("^baselines/", "h2cache/baselines/", name) for name in names}


def requirements(file: str) -> dict[str, Requirement]:
    lines = [re.sub(r"\s*#.*", "", line) for line in (ROOT / file).read_text().splitlines()]
    return {r.name: r for r in map(Requirement, filter(None, lines))}


def test_the_wheel_asks_for_what_the_library_imports_in_the_scripts_ranges(wheel):
    archive = zipfile.ZipFile(wheel)
    metadata = message_from_bytes(archive.read(next(n for n in archive.namelist() if n.endswith("METADATA"))))
    assert metadata["Version"] == h2cache.__version__
    asked = [Requirement(line) for line in metadata.get_all("Requires-Dist")]
    needed = {r.name: r.specifier for r in asked if not r.marker}
    extras = {
        name: [r for r in asked if r.marker and r.marker.evaluate({"extra": name})]
        for name in ("scripts", "tests")
    }

    modules = set()
    for file in [*(ROOT / "h2cache").rglob("*.py"), *(ROOT / "baselines").rglob("*.py")]:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                modules |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                modules.add(node.module.split(".")[0])
    assert set(needed) == modules - set(sys.stdlib_module_names) - OPTIONAL - {"h2cache"}

    scripts = requirements("requirements.txt")
    assert {name: scripts[name].specifier for name in needed} == needed
    assert len(extras["scripts"]) == len(scripts)
    assert len(extras["tests"]) == len(extras["scripts"]) + len(requirements("requirements-tests.txt"))


def test_the_changes_begin_with_this_version():
    headings = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.M)
    assert headings[0] == h2cache.__version__
