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

# What a user runs: from a folder with a `baselines/` of their own, which comes first on their path.
CHILD = """
import json, site, sys
site.addsitedir(sys.argv[1])
import baselines.mine
import h2cache, h2cache.baselines.teacache
from h2cache.registry import fitted_constants
print(json.dumps({
    "file": h2cache.__file__, "version": h2cache.__version__, "methods": h2cache.method_names(),
    "there": [h2cache.find_method(name).__module__ for name in h2cache.method_names()],
    "constants": len(fitted_constants("teacache", "tiny_flux")), "below": h2cache.baselines.__name__,
    "mine": baselines.mine.__file__,
}))
"""
BUILD_EDITABLE = "import setuptools.build_meta as b, sys; b.build_editable(sys.argv[1])"


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


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    quick = ["--no-deps", "--no-index", "--no-build-isolation", "-qqw", str(folder)]
    in_child("-m", "pip", "wheel", *quick, str(source), at=folder)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def target(wheel, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("target")
    quick = ["--no-deps", "--no-index", "--no-compile", "-qq", "--target", str(folder)]
    in_child("-m", "pip", "install", *quick, str(wheel), at=folder)
    return folder


@pytest.fixture(scope="module")
def editable(source, tmp_path_factory) -> Path:
    built, folder = tmp_path_factory.mktemp("built"), tmp_path_factory.mktemp("editable")
    in_child("-c", BUILD_EDITABLE, str(built), at=source)
    zipfile.ZipFile(next(built.glob("*.whl"))).extractall(folder)
    return folder


@pytest.mark.parametrize("form", ["target", "editable", "checkout"])
def test_every_method_is_found_beside_a_folder_of_the_users_own(form, request, tmp_path):
    place = ROOT if form == "checkout" else request.getfixturevalue(form)
    (tmp_path / "baselines").mkdir()
    for file in ("__init__.py", "mine.py"):
        (tmp_path / "baselines" / file).write_text("")
    (tmp_path / "child.py").write_text(CHILD)
    found = json.loads(in_child("child.py", str(place), at=tmp_path, PYTHONPATH=str(place)))
    home = request.getfixturevalue("source") if form == "editable" else place
    assert Path(found["file"]).is_relative_to(home)
    assert Path(found["mine"]).is_relative_to(tmp_path)
    assert found["version"] == h2cache.__version__
    assert found["methods"] == h2cache.method_names()
    assert {"h2cache", "none", "teacache"} <= set(found["methods"])
    assert all(module.startswith("h2cache.") for module in found["there"])
    assert found["constants"] > 0
    assert found["below"] == "h2cache.baselines"


def test_the_pages_python_lines_run_from_the_wheel(target, tmp_path):
    (tmp_path / "assets").symlink_to(ROOT / "assets")
    pages = [str(ROOT / "README.md"), str(ROOT / "assets/tiny_flux/README.md")]
    out = in_child(str(ROOT / ".ci/readme_lines.py"), *pages, at=tmp_path, PYTHONPATH=str(target))
    assert len(re.findall(r"[1-9]\d* of \d+ Python blocks ran", out)) == len(pages)


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
