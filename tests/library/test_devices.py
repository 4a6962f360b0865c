"""Every method on a device that is neither a CPU nor a GPU: the tests of `tests/helpers/other_device.py`.

PyTorch does not take the name of a backend back, and from then on counts it as this machine's accelerator. So
they run in a process of their own.
"""

import subprocess
import sys

import pytest
from torch.utils import backend_registration


@pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this PyTorch makes no device of Python alone",
)
def test_every_method_on_another_device():
    asked = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider"]
    ended = subprocess.run([*asked, "tests/helpers/other_device.py"], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert " passed" in ended.stdout or "[100%]" in ended.stdout
