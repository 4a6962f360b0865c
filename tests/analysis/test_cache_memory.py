"""What each method will keep is told before anything runs."""

import pytest

from analysis import cache_memory


def test_memory_is_told_before_the_run(capsys):
    assert cache_memory.main(["--set", "taylorseer:order=2", "--free-gib", "5"]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert "3648.0 MiB" in lines["taylorseer"]
    assert "does not fit" not in lines["taylorseer"]
    assert "5472.0 MiB  does not fit" in lines["taylorseer:order=2"]
    with pytest.raises(SystemExit):
        cache_memory.main(["--set", "taylorseer:order=9"])


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (["--width", "0"], "--width: 0: a whole number from 1"),
        (["--out-channels", "0"], "--out-channels: 0: a whole"),
        (["--double", "0", "--single", "0"], "one block at least"),
        (["--free-gib", "-1"], "--free-gib: -1"),
    ],
)
def test_sizes_that_cannot_be_are_refused(capsys, broken, message):
    with pytest.raises(SystemExit):
        cache_memory.main(broken)
    assert message in capsys.readouterr().err
