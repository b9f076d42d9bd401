"""Docstring first lines are short noun phrases or imperatives, and prose avoids words that have to be decoded."""

import ast
import re
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MODULES = sorted((ROOT / "rayrlhf").rglob("*.py"))
PAGES = sorted(path for path in ROOT.rglob("*.md") if not {".venv", "node_modules", "runs"} & set(path.parts))
OPENERS = ("what", "who", "whose", "whom", "whether", "where", "which", "how", "that", "those", "everything", "everybody")
BANNED = re.compile(
    r"\b(nobody|somebody|everybody|anybody|anew|by lot|of no use|befall\w*|owe[sd]?|owing|whatever|beside|wherever)\b", re.I
)
LONGEST, MOST_WORDS = 100, 15


def documented(tree: ast.Module) -> list[tuple[str, int, str]]:
    """(name, line, docstring) of a module, its classes and its public functions."""
    found = [("module", 1, ast.get_docstring(tree))]
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            found.append((node.name, node.lineno, ast.get_docstring(node)))
    return [(name, line, text) for name, line, text in found if text]


def first_line_faults(text: str) -> list[str]:
    """What is wrong with a docstring's first line."""
    first = text.splitlines()[0]
    words = re.findall(r"[^\s]+", first)
    faults = []
    if len(first) > LONGEST:
        faults.append(f"{len(first)} characters")
    if len(words) > MOST_WORDS:
        faults.append(f"{len(words)} words")
    if words and words[0].lower().strip("`,.:") in OPENERS:
        faults.append(f"begins with {words[0]!r}")
    return faults


def banned_in(path: Path) -> list[str]:
    """Banned words in a module's docstrings, comments and messages."""
    with path.open("rb") as file:
        tokens = [t for t in tokenize.tokenize(file.readline) if t.type in (tokenize.STRING, tokenize.COMMENT)]
    return [f"{path.relative_to(ROOT)}:{t.start[0]}: {m[0]!r}" for t in tokens for m in BANNED.finditer(t.string)]


@pytest.mark.parametrize("room", sorted({path.relative_to(ROOT).parts[1] for path in MODULES}))
def test_first_lines_of_docstrings_are_short_and_name_the_thing(room):
    faults = []
    for path in (path for path in MODULES if path.relative_to(ROOT).parts[1] == room):
        for name, line, text in documented(ast.parse(path.read_text(encoding="utf-8"))):
            faults += [f"{path.relative_to(ROOT)}:{line} {name}: {fault}" for fault in first_line_faults(text)]
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize("room", sorted({path.relative_to(ROOT).parts[1] for path in MODULES}))
def test_no_docstring_comment_or_message_uses_a_banned_word(room):
    found = [hit for path in MODULES if path.relative_to(ROOT).parts[1] == room for hit in banned_in(path)]
    assert not found, "\n".join(found)


def test_no_page_uses_a_banned_word():
    found = []
    for page in PAGES:
        for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
            found += [f"{page.relative_to(ROOT)}:{number}: {m[0]!r}" for m in BANNED.finditer(line)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("text", "faults"),
    [
        ("Whether it rains.", ["begins with 'Whether'"]),
        ("word " * 16, ["16 words"]),
        ("Dispatches rollout requests to the replicas.", []),
    ],
)
def test_the_check_finds_a_bad_first_line(text, faults):
    assert first_line_faults(text.strip()) == faults
