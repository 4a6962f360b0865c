"""Prompt files, good and wild."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from analysis.drawing.prompts import Prompt, read_prompts


def write(tmp_path, name: str, text: str):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


def test_text_files_hold_one_prompt_a_line(tmp_path):
    path = write(tmp_path, "p.txt", "a red sign\n\n  a blue sign \n")
    assert read_prompts(path) == [Prompt("0001", "a red sign"), Prompt("0003", "a blue sign")]


def test_json_lines_and_the_papers_file(tmp_path):
    rows = [
        {"prompt": "one", "id": "x", "words": ["A"], "seed": 3},
        {"file_path": "CUTE80/image007.jpg", "image_caption": ["a shirt", "another"]},
        {"prompt": "three"},
        {"prompt": "four", "id": "../../etc/passwd"},
    ]
    path = write(tmp_path, "p.jsonl", "\n".join(map(json.dumps, rows)))
    assert read_prompts(path) == [
        Prompt("x", "one", ("A",), 3),
        Prompt("image007", "a shirt"),
        Prompt("0003", "three"),
        Prompt("_.._etc_passwd", "four"),
    ]


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("{", "broken JSON"),
        ("[1]", "expected a JSON object"),
        ('{"text": "x"}', 'neither "prompt" nor "image_caption"'),
        ('{"prompt": "  "}', "the prompt is empty"),
        ('{"prompt": 3}', "the prompt is empty"),
        ('{"prompt": "x", "words": "A"}', "not a list of words"),
        ('{"prompt": "x", "seed": 1.5}', "not a whole number"),
        ('{"prompt": "x", "id": "first"}', "stands already in line 1"),
        ('{"image_caption": []}', "the prompt is empty"),
    ],
)
def test_a_broken_line_is_named(tmp_path, line, why):
    path = write(tmp_path, "p.jsonl", '{"prompt": "ok", "id": "first"}\n' + line + "\n")
    with pytest.raises(ValueError, match=r"p\.jsonl line 2: ") as error:
        read_prompts(path)
    assert why in str(error.value)


def test_other_broken_files(tmp_path):
    with pytest.raises(ValueError, match="holds no prompt"):
        read_prompts(write(tmp_path, "empty.txt", "\n \n"))
    with pytest.raises(ValueError, match=r"\.txt .* or \.jsonl"):
        read_prompts(write(tmp_path, "p.csv", "x"))
    binary = tmp_path / "b.txt"
    binary.write_bytes(b"ok\n\xff\xfe")
    with pytest.raises(ValueError, match="line 2: not UTF-8"):
        read_prompts(binary)
    with pytest.raises(OSError, match="nothing"):
        read_prompts(tmp_path / "nothing.txt")


@given(st.text())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_any_text_gives_prompts_or_a_named_line(tmp_path, text):
    for name in ("wild.txt", "wild.jsonl"):
        path = write(tmp_path, name, text.encode("utf-8", "ignore").decode())
        try:
            prompts = read_prompts(path)
        except ValueError as error:
            named = name in str(error)
            prompts = [] if named else None
        assert prompts is not None, "an error that does not name the file"
        assert len({p.id for p in prompts}) == len(prompts)
        assert all(p.text.strip() for p in prompts)
