"""`builtin:tiny`: a small random Llama with a byte tokenizer, for tests and first runs offline.

The tokenizer has one token for each of the 256 bytes and three special ones, so it encodes any text without loss and always
matches the model. The architecture is Llama, or Qwen3-MoE with experts, with heads of 64, which vLLM's CPU kernels support.
"""

import difflib
import math
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import parse_qsl

from rayrlhf.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

FORMAT = 1
"""Increased whenever the same options would give another folder, so that an old cache is not used."""
HEAD_SIZE = 64
USUAL_INIT, USUAL_THETA = 0.02, 10_000.0
PAD, START, END = "<|pad|>", "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@dataclass(frozen=True, slots=True)
class TinyOptions:
    """Options after `builtin:tiny?`, for example `builtin:tiny?seed=1&tie=false`.

    Attributes:
        seed: of the random weights.
        tie: the output layer is the embedding.
        hidden: width, a multiple of 64; the default of 256 with 4 layers has 3.2 M parameters.
        context: longest sequence in tokens (bytes).
        init: standard deviation of the random weights. With transformers' 0.02 the attention of a narrow model is so flat at
            first that it learns to look things up in its context hundreds of steps later than with 0.1, or not at all.
        rope_theta: base of the rotary positions; a larger one suits longer contexts.
        experts: of a layer, at least 2, two of which compute each token; 0 for one feed-forward network.
    """

    seed: int = 0
    tie: bool = True
    layers: int = 4
    hidden: int = 256
    context: int = 2048
    init: float = USUAL_INIT
    rope_theta: float = USUAL_THETA
    experts: int = 0

    @classmethod
    def parse(cls, query: str, path: str) -> Self:
        """Parse a query string.

        Args:
            query: `name=value` pairs joined by `&`; may be empty.

        Raises:
            UserError: an unknown option, a value of the wrong type or out of range.
        """
        known = {field.name: field for field in fields(cls)}
        values: dict[str, Any] = {}
        for name, text in parse_qsl(query, keep_blank_values=True):
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                hint = f"did you mean {near[0]}?" if near else f"expected one of {', '.join(known)}"
                raise UserError(f"{path}: unknown option {name}; {hint}")
            if known[name].type is bool:
                if text not in ("true", "false"):
                    raise UserError(f"{path}: {name}: expected true or false, found {text!r}")
                values[name] = text == "true"
            elif known[name].type is float:
                values[name] = _positive(text, f"{path}: {name}")
            else:
                if not text.isdecimal():
                    raise UserError(f"{path}: {name}: expected a whole number, found {text!r}")
                values[name] = int(text)
        options = cls(**values)
        if options.hidden < HEAD_SIZE or options.hidden % HEAD_SIZE:
            raise UserError(f"{path}: hidden: expected a multiple of {HEAD_SIZE}, found {options.hidden}")
        if options.layers < 1 or options.context < 2:
            raise UserError(f"{path}: expected layers >= 1 and context >= 2")
        if options.experts == 1:
            raise UserError(f"{path}: experts: expected 0 or at least 2, found 1")
        return options

    @property
    def folder_name(self) -> str:
        """Folder name, different for each variant."""
        tie = "tied" if self.tie else "untied"
        init = "" if self.init == USUAL_INIT else f"-init{self.init!r}"
        experts = f"-experts{self.experts}" if self.experts else ""
        theta = "" if self.rope_theta == USUAL_THETA else f"-theta{self.rope_theta!r}"
        shape = f"layers{self.layers}-hidden{self.hidden}-context{self.context}"
        return f"tiny-v{FORMAT}-{shape}-{tie}-seed{self.seed}{init}{theta}{experts}"


def _positive(text: str, where: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise UserError(f"{where}: expected a positive number, found {text!r}")
    return value


def write_tiny(options: TinyOptions, folder: Path) -> None:
    """Write the model (float32), its tokenizer and its chat template into a folder.

    torch's global generator is not changed.
    """
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3MoeConfig

    tokenizer = byte_tokenizer()
    tokenizer.model_max_length = options.context
    heads = options.hidden // HEAD_SIZE
    experts = {"num_experts": options.experts, "num_experts_per_tok": 2, "moe_intermediate_size": options.hidden}
    make: Any = partial(Qwen3MoeConfig, **experts, norm_topk_prob=True) if options.experts else LlamaConfig
    config = make(
        vocab_size=len(tokenizer),
        hidden_size=options.hidden,
        intermediate_size=3 * options.hidden,
        num_hidden_layers=options.layers,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 2),
        head_dim=HEAD_SIZE,
        max_position_embeddings=options.context,
        tie_word_embeddings=options.tie,
        initializer_range=options.init,
        rope_parameters={"rope_type": "default", "rope_theta": options.rope_theta},
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def byte_tokenizer() -> "PreTrainedTokenizerFast":
    """Return a tokenizer of bytes.

    Ids are 0 `<|pad|>`, 1 `<|im_start|>`, 2 `<|im_end|>` (end of sequence), and 3 + b for byte b. It adds no special tokens by
    itself. Bytes that are not valid UTF-8 decode to U+FFFD, as in a response cut at any position.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {PAD: 0, START: 1, END: 2} | {character: 3 + byte for byte, character in enumerate(_byte_alphabet())}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in (PAD, START, END)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=[START],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def _byte_alphabet() -> list[str]:
    """Return the character of each byte in byte-level tokenizers (GPT-2's table).

    It is the byte itself, or a character from 256 on.
    """
    printable = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]
