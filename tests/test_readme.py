"""README.md is the front page: its parts in their order, and the sentences of its troubleshooting are
those that the code says."""

import ast
import re

from conftest import ROOT

TEXT = (ROOT / "README.md").read_text()
PARTS = (
    "Three commands",
    "What it can do",
    "Results",
    "Data",
    "Train",
    "Evaluate",
    "Export",
    "Speed",
    "Several machines",
    "Troubleshooting",
    "More",
    "Licence and citation",
)


def said():
    """Every text in the package, with ... for what is filled in."""
    for path in (ROOT / "fastdisco").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = [v.value if isinstance(v, ast.Constant) else "..." for v in node.values]
                yield "".join(parts)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


def test_the_parts_are_in_their_order():
    assert tuple(re.findall(r"^## (.+)$", TEXT, re.MULTILINE)) == PARTS


def test_each_sentence_of_the_troubleshooting_is_one_that_the_code_says():
    section = TEXT.partition("## Troubleshooting")[2].partition("\n## ")[0]
    sentences = re.findall(r"^\| `([^`]+)` \|", section, re.MULTILINE)
    texts = list(said())
    for sentence in sentences:
        pieces = [piece.strip(" ;:,") for piece in re.split(r"\.\.\.(?:/<class>)?", sentence)]
        # What is filled in may be a sentence's end, which another text has.
        absent = [p for p in pieces if len(p) > 3 and not any(p in t for t in texts)]
        assert not absent and max(map(len, pieces)) >= 12, sentence
    assert len(sentences) == 10


def test_the_tables_are_short():
    rows = re.findall(r"(?:^\|.*\n)+", TEXT, re.MULTILINE)
    assert rows and max(table.count("\n") - 2 for table in rows) <= 10


def test_the_commands_are_the_ten_most_used_and_all_are_on_their_page():
    section = TEXT.partition("### Commands")[2].partition("\n## ")[0]
    page = (ROOT / "docs/commands.md").read_text()
    rows = [line for line in section.splitlines() if line.startswith("| ")][1:]
    assert len(rows) == 10
    for command in re.findall(r"`((?:fastdisco|deepspeed)[^`]*)`", "\n".join(rows)):
        assert command in page, command
