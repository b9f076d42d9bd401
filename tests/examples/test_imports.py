"""The scripts of `examples/` import names that the package has, also those that no test runs."""

import ast
import importlib
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


def imported(script: Path) -> list[tuple[str, str]]:
    """Return (module, name) of each import from the package."""
    imports = [node for node in ast.walk(ast.parse(script.read_text())) if isinstance(node, ast.ImportFrom)]
    return [(node.module, alias.name) for node in imports if (node.module or "").startswith("rayrlhf") for alias in node.names]


@pytest.mark.parametrize("script", sorted(EXAMPLES.rglob("*.py")), ids=lambda path: str(path.relative_to(EXAMPLES)))
def test_every_name_that_an_example_imports_exists(script):
    missing = [f"{module}.{name}" for module, name in imported(script) if not hasattr(importlib.import_module(module), name)]
    assert missing == []
