"""The records as Markdown."""

from __future__ import annotations

from typing import Any


def markdown(about: dict, sections: dict[str, tuple[list[dict], dict]]) -> str:
    """Machine, goals and sections first, then the rows of every section."""
    versions = ", ".join(f"{k} {v}" for k, v in about["versions"].items())
    lines = [f"# {about['device_name']}, {about['date']}", "", f"`{about['command']}`: {versions}", ""]
    goals = [{"section": n} | r for n, (rows, _) in sections.items() for r in rows if "goal" in r]
    lines += table([g | {"reached": "yes" if g["reached"] else "NO"} for g in goals])
    lines += [
        "",
        *table([{"section": n} | told for n, (_, told) in sections.items()], without=("traceback",)),
    ]
    for name, (rows, told) in sections.items():
        lines += ["", f"## {name}", "", *table([row for row in rows if "goal" not in row])]
        if "traceback" in told:
            lines += ["", "```", told["traceback"].strip(), "```"]
    return "\n".join(lines) + "\n"


def table(rows: list[dict], without: tuple[str, ...] = ()) -> list[str]:
    """Lines of a table whose columns are the keys of the rows, in the order in which they first appear."""
    if not rows:
        return ["Nothing."]
    columns = [c for c in dict.fromkeys(k for row in rows for k in row) if c not in without]
    body = ["| " + " | ".join(cell(row.get(c, "")) for c in columns) + " |" for row in rows]
    return ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|", *body]


def cell(value: Any) -> str:
    words = {True: "yes", False: "NO", None: "-"}
    text = words[value] if value is None or isinstance(value, bool) else str(value)
    return text.replace("|", "/").replace("\n", " ")
