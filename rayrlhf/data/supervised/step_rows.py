"""Validated rows of responses whose steps have labels (TRL's stepwise supervision)."""

from collections.abc import Sequence

from rayrlhf.config.data import RewardDatasetSection, TuningDataSection
from rayrlhf.data.messages import short
from rayrlhf.data.row_columns import label_value
from rayrlhf.data.row_files import place_of
from rayrlhf.data.supervised.row_formats import Row, RowShape, check_columns, used_columns
from rayrlhf.data.supervised.supervised_rows import EMPTY, InvalidRowError, WrittenRow, write_prompt
from rayrlhf.errors import UserError

NO_STEPS, WITHIN = "no steps", "step separator within a step"


def write_steps(
    row: Row, number: int, shape: RowShape, section: RewardDatasetSection, data: TuningDataSection, separator: str
) -> WrittenRow:
    """Validate a row with a prompt, steps and their labels.

    Args:
        row: its fields.
        number: its number in error messages.
        shape: of the first row.
        section: names the columns.
        data: chat template for text prompts, and the system prompt.
        separator: text after each step.

    Raises:
        InvalidRowError: no steps, an empty step, or one that contains the separator, at which scoring would split it.
        UserError: another format than the first row's, a wrong type, or more or fewer labels than steps.
    """
    place = place_of(section.path, number)
    columns = used_columns(shape, section)
    check_columns(row, shape, columns, place)
    prompt, options = write_prompt(row, columns, shape, section, data, place)
    labels = _labels(row[section.step_labels_field], f"{place}: {section.step_labels_field}")
    steps = _steps(row[section.steps_field], len(labels), separator, f"{place}: {section.steps_field}")
    if len(steps) != len(labels):
        raise UserError(
            f"{place}: {section.step_labels_field}: {len(labels)} labels of {len(steps)} steps, expected one label per step"
        )
    return WrittenRow(prompt, (), None, number, place, options=options, steps=steps, right=labels)


def _steps(value: object, labels: int, separator: str, where: str) -> tuple[str, ...]:
    if isinstance(value, str):
        if separator not in value and labels > 1:
            raise UserError(f"{where}: no separator {separator!r} in the text, expected {labels} steps (data.step_separator)")
        value = value.removesuffix(separator).split(separator)
    if not isinstance(value, list) or not all(isinstance(step, str) for step in value):
        raise UserError(f"{where}: expected a list of steps as text, found {short(value)}")
    if not value:
        raise InvalidRowError(NO_STEPS, f"{where}: no steps, expected at least one")
    for number, step in enumerate(value, start=1):
        if not step.strip():
            raise InvalidRowError(EMPTY, f"{where}: step {number} is empty")
        if separator in step:
            raise InvalidRowError(
                WITHIN,
                f"{where}: step {number} contains the separator {separator!r} (data.step_separator), expected it between steps",
            )
    return tuple(value)


def _labels(value: object, where: str) -> tuple[bool, ...]:
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise UserError(f"{where}: expected a list of true and false, one per step, found {short(value)}")
    found = [bool(label) if label in (0, 1) else label_value(label) for label in value]
    for number, (label, given) in enumerate(zip(found, value, strict=True), start=1):
        if label is None:
            raise UserError(f"{where}: step {number}: expected true or false, found {given!r}")
    return tuple(label is True for label in found)
