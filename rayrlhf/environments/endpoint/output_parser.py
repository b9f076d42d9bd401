"""Reasoning, text and tool calls of completions, by vLLM's parsers.

The parsers are chosen by the chat template, or by name (`rollout.tool_parser`, `rollout.reasoning_parser`). A tool parser is
checked at the start: it must find a call that the template has rendered.
"""

import difflib
import json
import logging
import re
from collections.abc import Mapping, Sequence
from functools import cache, lru_cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any, NamedTuple

from rayrlhf.environments.chat_tokens import PROBE_TOOL, ChatTokens
from rayrlhf.environments.endpoint.call import Call, invalid
from rayrlhf.environments.environment_loop import error_line
from rayrlhf.errors import UserError
from rayrlhf.library_types import Tokenizer

_logger = logging.getLogger(__name__)

TOOL_PARSERS = (
    (r"<tool_call>.*<arg_key>", "glm45"),
    (r"<\|tool_calls_section_begin\|>", "kimi_k2"),
    (r"<function=", "qwen3_xml"),
    (r"<minimax:tool_call>", "minimax_m2"),
    (r"<seed:tool_call>", "seed_oss"),
    (r"<start_function_call>", "functiongemma"),
    (r"<\|tool_call>", "gemma4"),
    (r"<\|channel\|>.*<\|call\|>", "openai"),
    (r"<.tool▁calls▁begin.>.*```json", "deepseek_v3"),
    (r"<.tool▁calls▁begin.>", "deepseek_v31"),
    (r"<\|tool_call_start\|>", "lfm2"),
    (r"<\|action_start\|>", "internlm"),
    (r"<atem:function_calls>", "muse_glimmer"),
    (r"functools\[", "phi4_mini_json"),
    (r"\[TOOL_CALLS\]", "mistral"),
    (r"<tool_call>", "hermes"),
    (r"<\|tool_call\|>", "granite"),
    (r"<tool_calls>", "jamba"),
    (r"<\|start_header_id\|>.*\"parameters\"", "llama3_json"),
)
"""vLLM's tool parser by what the chat template contains; the first that fits counts."""
HARMONY = "openai_gptoss"
REASONING_PARSERS = (
    (r"<\|channel\|>.*analysis", HARMONY),
    (r"<seed:think>", "seed_oss"),
    (r"<minimax:tool_call>.*<think>", "minimax_m2"),
    (r"\[THINK\]", "mistral"),
    (r"<arg_key>.*<think>|<think>.*<arg_key>", "glm45"),
    (r"<think>", "deepseek_r1"),
)
"""vLLM's reasoning parser by what the chat template contains."""
OPEN_THINKING = "<think>"


class Parsed(NamedTuple):
    """Parts of a completion.

    Attributes:
        calls: tool calls in OpenAI's form, without ids where the parser gives none.
        raw: the completion with its tags, up to a stop string; empty if it has none.
    """

    text: str
    reasoning: str = ""
    calls: Sequence[dict[str, Any]] = ()
    raw: str = ""


class OutputParser:
    """Parser of completions with one tokenizer.

    Attributes:
        tools: name of the tool parser; None if agents cannot use tools.
        reasoning: name of the reasoning parser, or None.
        missing: reason why agents cannot use tools.

    Args:
        tool_parser: `auto`, or a name of vLLM's.
        reasoning_parser: `auto`, `none`, or a name of vLLM's.

    Raises:
        UserError: vLLM has no such parser, or a named one does not fit the chat template.
    """

    def __init__(self, tokenizer: Tokenizer, chat: ChatTokens, tool_parser: str, reasoning_parser: str) -> None:
        self._tokenizer, self._chat, self._failed = tokenizer, chat, False
        self.tools: str | None = None
        self.reasoning: str | None = None
        self.missing = "the chat template writes no tools; expected a model with a template that does (model.chat_template)"
        template = tokenizer.get_chat_template(tools=[PROBE_TOOL])
        tool = _choose(template, TOOL_PARSERS) if tool_parser == "auto" else tool_parser
        reasoning = _choose(template, REASONING_PARSERS) if reasoning_parser == "auto" else reasoning_parser
        reasoning = None if reasoning == "none" else reasoning
        if not chat.writes_tools:
            if tool_parser != "auto":
                raise UserError(f"rollout.tool_parser {tool_parser!r}: {self.missing}")
            tool = None
        elif tool is None:
            self.missing = "no parser is known for the tool calls of the chat template; expected one in rollout.tool_parser"
        named = tool_parser != "auto" or reasoning_parser not in ("auto", "none")
        if (tool or reasoning) and (fault := _import_fault()):
            self.missing = f"tool calls and reasoning are parsed by vLLM, which {fault}"
            if named:
                raise UserError(f"rollout.tool_parser and rollout.reasoning_parser: {self.missing}")
        else:
            if tool or reasoning:
                self._tokenizer = _with_known_vocabulary(tokenizer)
            self.reasoning = self._checked_reasoning(reasoning, named=reasoning_parser != "auto")
            self.tools = self._checked_tool(tool, named=tool_parser != "auto")
        if chat.writes_tools and self.tools is None:
            _logger.warning("agents cannot use tools: %s", self.missing)

    def check(self, call: Call) -> None:
        """Check that the tools of a request can be used.

        Raises:
            Refusal: they cannot.
        """
        if call.tools and self.tools is None:
            raise invalid("tools", f"tools are not supported: {self.missing}")

    def constraint(self, call: Call, opening: str) -> dict[str, Any] | None:
        """Return the constraint of a request; None without one.

        It has the arguments of vLLM's `StructuredOutputsParams`. A forced call has the form of the chat template's calls, by
        the grammar of vLLM's tool parser.

        Raises:
            Refusal: vLLM has no grammar for it.
        """
        if not call.constrained:
            return None
        field = "response_format" if call.forced is None else "tool_choice"
        if self.reasoning == HARMONY or opening.rstrip().endswith(OPEN_THINKING):
            hint = "expected chat_template_kwargs that end the reasoning, such as enable_thinking: false"
            raise invalid(field, f"{field}: the chat template begins with reasoning, which has no grammar; {hint}")
        try:
            return _constraint(self._tokenizer, self.tools if call.tools else None, call, single=not self._chat.parallel)
        except Exception as error:
            reason = " ".join(str(error).split())[:300]
            raise invalid(field, f"{field}: vLLM cannot constrain this: {reason}") from error

    def parse(self, token_ids: Sequence[int], text: str, call: Call, opening: str) -> Parsed:
        """Return the parts of a completion.

        A completion that a parser cannot read is text as a whole. The first one is logged.

        Args:
            token_ids: the sampled tokens, without the one that ended them.
            text: their text without special tokens.
            opening: text before the completion.
        """
        tools = self.tools if call.tools and call.use_tools else None
        raw, reasoning = "", None
        if tools or self.reasoning:
            raw = _cut(self._tokenizer.decode(list(token_ids), skip_special_tokens=False), call.stop)
            reasoning = self.reasoning if self._thinks(raw, opening) and not call.constrained else None
        if not tools and not reasoning:
            return Parsed(_cut(text, call.stop))
        try:
            parsed = _run(self._tokenizer, tools, reasoning, raw, token_ids, call)
        except Exception:  # a parser's own fault on unusual text
            if not self._failed:
                names = " and ".join(name for name in (tools, reasoning) if name)
                _logger.warning("vLLM's parser %s fails on a completion, which is returned as text", names, exc_info=True)
            self._failed = True
            return Parsed(_cut(text, call.stop))
        if not parsed.calls and not parsed.reasoning:
            return Parsed(_cut(text, call.stop))
        return parsed._replace(raw=raw)

    def _thinks(self, text: str, opening: str) -> bool:
        """Return True if the completion has reasoning.

        DeepSeek's parser takes text without tags for reasoning, which is right only after an open tag.
        """
        if self.reasoning != "deepseek_r1":
            return self.reasoning is not None
        opened = opening.rstrip().endswith(OPEN_THINKING)
        return opened or text.lstrip().startswith(OPEN_THINKING)

    def _checked_reasoning(self, name: str | None, *, named: bool) -> str | None:
        if name is None:
            return None
        try:
            _parser_class(None, name)(self._tokenizer)
        except Exception as error:
            if named:
                raise _unfit("reasoning_parser", name, error) from error
            return None
        return name

    def _checked_tool(self, name: str | None, *, named: bool) -> str | None:
        """Return the name of a parser that reads the template's calls."""
        if name is None:
            return None
        value = "a b"
        written = self._chat.probe(value) or ""
        call = Call("", [{"role": "user", "content": ""}], tools=[PROBE_TOOL])
        ids = self._chat.without_end(self._tokenizer.encode(written.rstrip(), add_special_tokens=False))
        raw = self._tokenizer.decode(ids, skip_special_tokens=False)
        function = PROBE_TOOL["function"]
        try:
            calls = _run(self._tokenizer, name, None, raw, ids, call).calls
            assert isinstance(function, dict)
            found = [(one["function"]["name"], json.loads(one["function"]["arguments"])) for one in calls]
            if found != [(function["name"], {"value": value})]:
                raise ValueError(f"it finds {found} in {raw!r:.200}")
        except Exception as error:
            unfit = _unfit("tool_parser", name, error)
            if named:
                raise unfit from error
            self.missing = str(unfit)
            return None
        return name


def _choose(template: str, table: Sequence[tuple[str, str]]) -> str | None:
    return next((name for pattern, name in table if re.search(pattern, template, re.DOTALL)), None)


def _import_fault() -> str:
    """Return the reason why vLLM's parsers cannot be used; empty if they can."""
    if find_spec("vllm") is None:
        return "is not installed"
    try:
        for module in ("parser", "reasoning", "tool_parsers", "entrypoints.openai.chat_completion.protocol"):
            import_module(f"vllm.{module}")
    except Exception as error:  # noqa: BLE001 - a broken installation fails in many ways
        return f"cannot be imported: {error_line(error)}"
    return ""


def _unfit(key: str, name: str, error: Exception) -> UserError:
    from vllm.reasoning import ReasoningParserManager
    from vllm.tool_parsers import ToolParserManager

    known = ToolParserManager.list_registered() if key == "tool_parser" else ReasoningParserManager.list_registered()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"expected one of {', '.join(known)}"
        return UserError(f"rollout.{key}: vLLM has no parser {name!r}; {hint}")
    reason = " ".join(str(error).split())
    return UserError(f"rollout.{key}: vLLM's parser {name!r} does not fit the chat template: {reason}; expected another name")


def _with_known_vocabulary(tokenizer: Tokenizer) -> Tokenizer:
    """Return a copy that keeps its vocabulary, which some parsers read for each completion.

    Transformers builds the dictionary at each call.
    """
    from vllm.tokenizers.hf import get_cached_tokenizer

    return get_cached_tokenizer(tokenizer)


@cache
def _parser_class(tools: str | None, reasoning: str | None) -> Any:
    from vllm.parser import ParserManager

    for name in ("vllm.tool_parsers", "vllm.reasoning", "vllm.parser"):  # they log tracebacks of malformed calls
        logging.getLogger(name).setLevel(logging.CRITICAL)
    return ParserManager.get_parser(
        tools, reasoning, enable_auto_tools=True, is_harmony=tools == "openai" or reasoning == HARMONY
    )


def _run(
    tokenizer: Tokenizer, tools: str | None, reasoning: str | None, raw: str, token_ids: Sequence[int], call: Call
) -> Parsed:
    request = _parsed_request(json.dumps(_functions(call)), "auto" if tools else None)
    parser = _parser_class(tools, reasoning)(tokenizer, request.tools)
    thought, content, calls = parser.parse(raw, request, enable_auto_tools=True, model_output_token_ids=list(token_ids))
    found = [
        {"id": one.id, "type": "function", "function": {"name": one.name, "arguments": one.arguments}} for one in calls or ()
    ]
    return Parsed(content or "", thought or "", found)


def _vllm_request(functions: Sequence[dict[str, Any]], fields: Mapping[str, Any], *, strict: bool | None = None) -> Any:
    """Return the functions of a request, with further fields, as vLLM's request."""
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest

    tools = [{"type": "function", "function": function | {"strict": strict}} for function in functions] or None
    plain: dict[str, Any] = {"messages": [{"role": "user", "content": ""}], "model": "policy", "tools": tools}
    return ChatCompletionRequest.model_validate({**plain, **fields})


def _functions(call: Call) -> list[dict[str, Any]]:
    keys = ("name", "description", "parameters")  # Of other keys vLLM may expect other types.
    return [{key: tool["function"].get(key) for key in keys} for tool in call.tools]


@lru_cache(maxsize=64)  # validation takes longer than all parsing
def _parsed_request(functions: str, choice: str | None) -> Any:
    return _vllm_request(json.loads(functions), {"tool_choice": choice} if choice else {})


def _constraint(tokenizer: Tokenizer, tools: str | None, call: Call, *, single: bool) -> dict[str, Any]:
    """Return vLLM's constraint of a request; errors are vLLM's.

    Args:
        single: the chat template writes one call per answer.
    """
    from vllm import SamplingParams
    from vllm.v1.structured_output.backend_xgrammar import validate_xgrammar_grammar

    fields: dict[str, Any] = {"parallel_tool_calls": call.parallel and not single}
    if tools and call.use_tools:
        named = {"type": "function", "function": {"name": call.forced}}
        fields["tool_choice"] = "auto" if call.forced is None else named if call.forced else "required"
    if call.form is not None:
        schema = {"name": "answer", "schema": dict(call.form)}
        fields["response_format"] = {"type": "json_schema", "json_schema": schema}
    request = _vllm_request(_functions(call), fields, strict=True)
    if tools and call.use_tools:
        request = _parser_class(tools, None)(tokenizer, request.tools).adjust_request(request)
    parameters = request.extract_structured_outputs()
    if parameters is None or (call.forced is not None and parameters.structural_tag is None):
        raise ValueError(f"its tool parser {tools!r} has no grammar of calls")
    validate_xgrammar_grammar(SamplingParams(structured_outputs=parameters))
    values = {key: getattr(parameters, key) for key in ("json", "json_object", "structural_tag")}
    return {key: value for key, value in values.items() if value is not None}


def _cut(text: str, stop: Sequence[str]) -> str:
    """Return the text before the first stop string."""
    return text[: min((at for word in stop if (at := text.find(word)) >= 0), default=len(text))]
