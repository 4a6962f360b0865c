"""Run a page's Python lines as a reader would who pastes them one after the other into one session.

    python .ci/readme_lines.py README.md ...    # in a folder that has assets/, with h2cache installed

Every ```python block runs, in order and in one namespace. One that cannot run here says why in a comment
above it that the page does not show, <!-- not run: needs a GPU -->: so a forgotten block runs or fails.
"""

import os
import re
import sys
from pathlib import Path

BLOCK = re.compile(r"(?:<!-- not run: (?P<why>[^\n]*?) -->\s*)?^```python\n(?P<code>.*?)^```", re.M | re.S)


def run(page: str) -> None:
    blocks = list(BLOCK.finditer(Path(page).read_text(encoding="utf-8")))
    names: dict = {"__name__": "__main__"}
    ran = 0
    for number, block in enumerate(blocks, 1):
        if block["why"]:
            print(f"block {number}: not run, {block['why']}")
            continue
        exec(compile(block["code"], f"{page}, Python block {number}", "exec"), names)
        ran += 1
    if not ran:
        sys.exit(f"{page} has no Python lines that run")
    print(f"{page}: {ran} of {len(blocks)} Python blocks ran")


if __name__ == "__main__":
    sys.path[0] = os.getcwd()  # as in a session of the reader's, not the folder of this file
    for page in sys.argv[1:]:
        run(page)
