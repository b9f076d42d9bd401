"""Is a response the asked-for JSON? A JSON Schema (draft 2020-12) decides.

JSON is read as its standard says (RFC 8259): `NaN` and `Infinity`, which Python lets pass, are none. References of a schema to
other documents are not fetched.
"""

import json
from typing import Any

from rayrlhf.errors import UserError
from rayrlhf.rewards.fenced import Where, check_where, last_block


def matches_json_schema(responses: list[str], json_schema: dict[str, Any], where: Where = "whole") -> list[float]:
    """Return 1.0 for each response that is JSON and fits the schema, else 0.0.

    Args:
        responses: [B].
        json_schema: the schema.
        where: `whole` takes the response less surrounding space, `fenced` what stands in its last block of three backticks.

    Raises:
        UserError: the schema is not valid or refers to what it does not contain, or `where` is something else.
    """
    # Imported by those who use it only.
    from jsonschema import Draft202012Validator, SchemaError
    from referencing import Registry
    from referencing.exceptions import Unresolvable

    check_where("json_schema", where)
    try:
        Draft202012Validator.check_schema(json_schema)
    except SchemaError as error:
        raise UserError(f"reward function 'json_schema': json_schema{error.json_path[1:]}: {error.message}") from error
    validator = Draft202012Validator(json_schema, registry=Registry())
    try:
        return [
            float(_fits(validator, response if where == "whole" else last_block(response, ("json",)))) for response in responses
        ]
    except Unresolvable as error:
        raise UserError(f"reward function 'json_schema': a reference leads out of the schema: {error}") from error


def _fits(validator: Any, text: str) -> bool:
    try:
        return bool(validator.is_valid(json.loads(text, parse_constant=_refuse)))
    except (ValueError, RecursionError):  # no JSON, or nested deeper than anybody asked for
        return False


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")
