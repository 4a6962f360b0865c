"""What is said where nunchaku is missing, wrong, or cannot run."""

import sys
from dataclasses import replace

import pytest

from h2cache import nunchaku_install
from h2cache.nunchaku_install import Place, gpu_problem, install_problem, require_gpu, require_nunchaku

HERE = Place(python="3.11", torch="2.9", platform="linux_x86_64", cuda="12.8")
WHEEL = "v1.2.1/nunchaku-1.2.1+cu12.8torch2.9-cp311-cp311-linux_x86_64.whl"


@pytest.fixture
def package(tmp_path):
    """A folder that looks like an installed nunchaku for Python 3.11."""
    (tmp_path / "models" / "transformers").mkdir(parents=True)
    (tmp_path / "_C.cpython-311-x86_64-linux-gnu.so").touch()
    return tmp_path


def test_a_fitting_wheel_is_no_problem(package):
    for version in ("1.1.0+torch2.9", "1.2.1+cu12.8torch2.9", "1.2.0.dev20251231+torch2.9", None):
        assert install_problem(replace(HERE, package=package, version=version)) is None
    windows = Place("3.12", "2.8", "win_amd64", "12.8", package, "1.1.0+torch2.8")
    (package / "_C.cpython-311-x86_64-linux-gnu.so").rename(package / "_C.cp312-win_amd64.pyd")
    assert install_problem(windows) is None


def test_a_missing_wheel_is_named():
    problem = install_problem(HERE)
    assert problem.startswith("nunchaku is not installed: `pip install https://github.com/nunchaku-ai/")
    assert f"{WHEEL}`" in problem
    assert "--engine diffusers" in problem
    windows = install_problem(Place("3.13", "2.10", "win_amd64", "13.0"))
    assert "nunchaku-1.2.1+cu13.0torch2.10-cp313-cp313-win_amd64.whl" in windows
    without_cuda = install_problem(Place("3.13", "2.9", "win_amd64"))  # PyTorch for CPUs
    assert "nunchaku-1.2.1+cu12.8torch2.9-cp313-cp313-win_amd64.whl" in without_cuda


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"python": "3.14"}, "Python 3.10 to 3.13 (this is 3.14)"),
        ({"torch": "2.13"}, "PyTorch 2.8, 2.9, 2.10 (this is 2.13)"),
        ({"cuda": "12.6"}, "a PyTorch for CUDA 12.8 or 13.0 (this is for 12.6)"),
        ({"platform": "Darwin_arm64"}, "Linux or Windows on x86-64 (this is Darwin_arm64)"),
    ],
)
def test_where_there_is_no_wheel_it_says_what_must_change(changed, says):
    problem = install_problem(replace(HERE, **changed))
    assert says in problem
    assert ".whl" not in problem


def test_the_unrelated_package_of_pypi_is_told_apart(tmp_path):
    (tmp_path / "__init__.py").touch()
    problem = install_problem(replace(HERE, package=tmp_path, version="0.16.1"))
    assert "nunchaku` 0.16.1 is another project" in problem
    assert "`pip uninstall nunchaku`, then `pip install" in problem
    assert WHEEL in problem


@pytest.mark.parametrize("version", ["1.1.0+torch2.8", "1.2.1+cu12.8torch2.10"])
def test_a_wheel_for_another_torch(package, version):
    problem = install_problem(replace(HERE, package=package, version=version))
    assert f"{version} is built for PyTorch {version.rpartition('torch')[2]}, this is 2.9" in problem
    assert WHEEL in problem


def test_a_wheel_for_another_python(package):
    problem = install_problem(replace(HERE, python="3.12", package=package, version="1.1.0+torch2.9"))
    assert "built for another Python (_C.cpython-311-x86_64-linux-gnu.so), this is 3.12" in problem
    assert "cp312-cp312" in problem


def test_a_checkout_without_its_compiled_part(package):
    (package / "_C.cpython-311-x86_64-linux-gnu.so").unlink()
    problem = install_problem(replace(HERE, package=package))
    assert "sources without their compiled part" in problem
    assert str(package) in problem


@pytest.mark.parametrize("capability", [(7, 5), (8, 0), (8, 6), (8, 9), (12, 0), (12, 1)])
def test_supported_gpus(capability):
    assert gpu_problem(capability) is None


@pytest.mark.parametrize("capability", [(6, 1), (7, 0), (9, 0), (10, 0)])
def test_unsupported_gpus(capability):
    problem = gpu_problem(capability)
    assert f"(sm {capability[0]}{capability[1]})" in problem
    assert problem.endswith("run without nunchaku, with --engine diffusers")


def test_no_gpu(monkeypatch):
    monkeypatch.setattr(nunchaku_install.torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="needs an NVIDIA GPU, and PyTorch finds none"):
        require_gpu()


def test_what_cannot_be_loaded_is_reported_with_its_reason(package, monkeypatch):
    monkeypatch.setattr(Place, "here", lambda: replace(HERE, package=package, version="1.1.0+torch2.9"))
    monkeypatch.delitem(sys.modules, "nunchaku._C", raising=False)

    def fails(name):
        raise ImportError("_C.so: undefined symbol: _ZN3c106detail\nmore")

    monkeypatch.setattr(nunchaku_install.importlib, "import_module", fails)
    with pytest.raises(ImportError, match=r"cannot be loaded \(_C.so: undefined symbol: _ZN3c106detail\)"):
        require_nunchaku()


def test_this_place():
    place = Place.here()
    assert place.python == f"{sys.version_info[0]}.{sys.version_info[1]}"
    assert place.torch.count(".") == 1
