"""Every method on a device that is neither a CPU nor a GPU: the tests of `tests/helpers/other_device.py`.

PyTorch does not take the name of a backend back, and from then on counts it as this machine's accelerator. So
they run in a process of their own.
"""

import pytest
from torch.utils import backend_registration

from tests.helpers.served import ended, started


@pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this PyTorch makes no device of Python alone",
)
def test_every_method_on_another_device(tmp_path):
    log = tmp_path / "log"
    asked = ["-q", "-n", "0", "-p", "no:cacheprovider", "tests/helpers/other_device.py"]
    codes = ended([started(pytest.main, asked, log=log)], 300)
    assert codes == [0], log.read_text()
    assert " passed" in log.read_text() or "[100%]" in log.read_text()
