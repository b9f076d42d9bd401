"""Chat templates of model families, each with a tokenizer of bytes and the family's special tokens.

Most come from the package trl, which ships those of the models' authors. Mistral's and SmolLM3's are written after theirs.
"""

import re
from importlib.util import find_spec
from pathlib import Path

from tokenizers import AddedToken

from rayrlhf.models.tiny import byte_tokenizer

BAR = "\uff5c"
"""The bar of DeepSeek's special tokens."""
SPECIAL = re.compile(
    rf"<\|[a-z_]+\|?>|<[a-z_]+\|>|<{BAR}[^{BAR}]+{BAR}>|</?s>|<(?:start|end)_of_turn>"
    r"|\[/?(?:INST|ARGS|TOOL_CALLS|TOOL_RESULTS|AVAILABLE_TOOLS)\]"
)
PLAIN = ("<think>", "</think>", "<tool_call>", "</tool_call>", "th", "ee", '"}', "  ", "an")
"""Added tokens that are not special: an encoder writes them, a sampler may write their bytes."""
STOPS = {
    "deepseek": f"<{BAR}end\u2581of\u2581sentence{BAR}>",
    "gemma4": "<turn|>",
    "gemma": "<end_of_turn>",
    "gptoss": "<|return|>",
    "llama": "<|eot_id|>",
    "mistral": "</s>",
    "phi3": "<|end|>",
    "glm": "<|user|>",
}
"""Token that ends an answer, by the start of a family's name; others end with <|im_end|>."""

MISTRAL = """{{- '<s>' }}
{%- if tools %}{{- '[AVAILABLE_TOOLS]' + tools | tojson + '[/AVAILABLE_TOOLS]' }}{%- endif %}
{%- for message in messages %}
  {%- if message.role == 'system' %}{{- '[INST]' + message.content + '[/INST]' }}
  {%- elif message.role == 'user' %}{{- '[INST]' + message.content + '[/INST]' }}
  {%- elif message.role == 'tool' %}{{- '[TOOL_RESULTS]' + message.content + '[/TOOL_RESULTS]' }}
  {%- elif message.tool_calls %}
    {{- message.content }}
    {%- for call in message.tool_calls %}
      {{- '[TOOL_CALLS]' + call.function.name + '[ARGS]' + call.function.arguments | tojson }}
    {%- endfor %}{{- '</s>' }}
  {%- else %}{{- message.content + '</s>' }}
  {%- endif %}
{%- endfor %}"""
SMOLLM3 = """{%- if tools %}{{- '<|im_start|>system\\n### Tools\\n' }}
{%- for tool in tools %}{{- tool | tojson + '\\n' }}{%- endfor %}{{- '<|im_end|>\\n' }}{%- endif %}
{%- for message in messages %}
  {%- if message.role == 'assistant' %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if message.reasoning_content %}{{- '<think>\\n' + message.reasoning_content + '\\n</think>\\n' }}{%- endif %}
    {{- message.content.lstrip('\\n') }}
    {%- for call in message.tool_calls or [] %}
      {{- '<tool_call>{"name": "' + call.function.name + '", "arguments": ' }}
      {{- call.function.arguments | tojson + '}</tool_call>' }}
    {%- endfor %}{{- '<|im_end|>\\n' }}
  {%- else %}
    {{- '<|im_start|>' + ('user' if message.role == 'tool' else message.role) + '\\n' + message.content + '<|im_end|>\\n' }}
  {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""
WRITTEN = {"mistral": MISTRAL, "smollm3": SMOLLM3}
VISION = ("vl", "llava", "idefics", "smolvlm", "diffusion", "training")


def families():
    """Return the chat template of each family by name."""
    spec = find_spec("trl")
    folder = Path(spec.submodule_search_locations[0]) / "chat_templates"
    shipped = {path.stem: path.read_text() for path in sorted(folder.glob("*.jinja"))}
    return WRITTEN | {name: text for name, text in shipped.items() if not any(word in name for word in VISION)}


def tokenizer_of(name, template):
    """Return a tokenizer of bytes with a family's special tokens and chat template, and the text that ends an answer."""
    end = next((stop for start, stop in STOPS.items() if name.startswith(start)), "<|im_end|>")
    tokenizer = byte_tokenizer()
    more = {"<|python_tag|>"} if name.startswith("llama3_") else set()
    found = {*SPECIAL.findall(template), *more, end, "<|im_end|>"} - {"<|im_start|>", "<|im_end|>"}
    tokenizer.add_special_tokens({"bos_token": "<s>", "eos_token": end})
    tokenizer.add_tokens([AddedToken(text, special=True, normalized=False) for text in sorted(found)], special_tokens=True)
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in PLAIN])
    tokenizer.chat_template = template
    return tokenizer, end
