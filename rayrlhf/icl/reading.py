"""From the rows of an intake to examples."""

import json
from collections.abc import Iterator
from pathlib import Path

from rayrlhf.config.icl_build import ExamplesSection
from rayrlhf.demonstrations.example import Example
from rayrlhf.errors import UserError
from rayrlhf.presft.intake import take_in
from rayrlhf.presft.parts import PartFolder


def read_examples(section: ExamplesSection, rows: PartFolder) -> Iterator[list[Example]]:
    """Yield the examples of each part.

    Raises:
        UserError: a prompt that is a conversation, or a row without its task.
    """
    field = section.task_field
    for table in rows.tables(["source", "prompt", "messages", "response", "columns"]):
        part = []
        for row in table.to_pylist():
            place = f"{section.path}:{row['source']}"
            if row["messages"] is not None:
                raise UserError(f"{place}: {section.prompt_field}: expected text, found a conversation")
            columns = json.loads(row["columns"]) if field is not None else {}
            if field is not None and columns.get(field) is None:
                raise UserError(f"{place}: {field}: missing, expected the row's task; found {', '.join(columns) or 'none'}")
            part.append(Example(place, row["prompt"], row["response"], str(columns[field]) if field is not None else ""))
        yield part


def taken_in(section: ExamplesSection, folder: Path, rows_per_part: int, *, answered: bool = True) -> PartFolder:
    """Read a dataset into `rows/` of a folder, what is unusable into `rejected/`, unless that is done; errors as `take_in`."""
    rows = PartFolder(folder / "rows")
    rejected = PartFolder(folder / "rejected")
    take_in(section, rows, rejected, rows_per_part=rows_per_part, tokenizer=None, longest=None, answered=answered)
    return rows
