"""The table of the seeds says what its commands find."""

import re
import shlex
from pathlib import Path

import pytest

from analysis.measures.families import trial

TABLE = Path("baselines/SEEDS.md").read_text(encoding="utf-8")
ROWS = [line.strip("| ").split(" | ") for line in TABLE.splitlines() if line.startswith("| ")][1:]
TRIED: dict[str, dict[str, str]] = {}  # result by family and method
for _, _, command, result in ROWS:
    if "family_table" in command:
        words = shlex.split(command.strip("`"))
        family, method = (words[words.index(name) + 1] for name in ("--families", "--methods"))
        TRIED.setdefault(family, {})[method] = result.partition(",")[0]


@pytest.mark.parametrize("family", TRIED)
def test_a_pair_ends_as_the_table_says(family):
    cells = trial([family], list(TRIED[family]))[family]["methods"]
    found = {method: cell["outcome"].replace("measured", "runs") for method, cell in cells.items()}
    assert found == TRIED[family]


def test_the_tests_that_it_names_are_there():
    named = re.findall(r"pytest (\S+\.py)", TABLE)
    assert len(named) == 3
    assert all(Path(name).is_file() for name in named)
