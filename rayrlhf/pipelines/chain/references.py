"""References such as `${stage.output}` in a stage's settings, and their replacement.

Pure: outputs are texts by stage and name, and settings are trees of plain values.
"""

import difflib
import re
from collections.abc import Mapping
from typing import Any

from rayrlhf.errors import UserError

_REFERENCE = re.compile(r"\$\{([^{}]*)\}")
Outputs = Mapping[str, Mapping[str, str]]
"""Stage name -> output name -> value, of the stages before the current one."""


def fill_in(settings: object, outputs: Outputs, place: str) -> Any:
    """Return settings with every reference replaced.

    Args:
        outputs: of the stages before this one.

    Raises:
        UserError: a reference to an unknown or later stage, or to an unknown output.
    """
    if isinstance(settings, Mapping):
        return {key: fill_in(value, outputs, f"{place}.{key}") for key, value in settings.items()}
    if isinstance(settings, list):
        return [fill_in(value, outputs, f"{place}.{index}") for index, value in enumerate(settings)]
    if isinstance(settings, str):
        return _REFERENCE.sub(lambda match: _value(match[1], outputs, place), settings)
    return settings


def _value(reference: str, outputs: Outputs, place: str) -> str:
    stage, _, output = reference.partition(".")
    if stage not in outputs:
        raise UserError(f"{place}: ${{{reference}}}: no stage {stage!r} before this one{_hint(stage, outputs)}")
    if output not in outputs[stage]:
        raise UserError(f"{place}: ${{{reference}}}: stage {stage!r} has no output {output!r}{_hint(output, outputs[stage])}")
    return outputs[stage][output]


def _hint(wrong: str, known: Mapping[str, Any]) -> str:
    near = difflib.get_close_matches(wrong, known, n=1, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else f"; expected one of {', '.join(known) or 'none'}"
