"""Writes the reference pages: `python docs/generate.py`; `--check` compares them with the code and writes nothing.

Configuration pages come from the pydantic sections, the command line page from typer, the findings from the diagnostics.
"""

import contextlib
import inspect
import json
import re
import sys
import tempfile
import types
import typing
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import typer
import yaml
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined
from typer.cli import get_docs_for_click

from rayrlhf.cli import app
from rayrlhf.config.loading import presets
from rayrlhf.config.loading.kinds import ROOTS
from rayrlhf.config.loading.presets import PRESETS
from rayrlhf.config.section import Section
from rayrlhf.observe.diagnostics import CHECKS
from rayrlhf.tools.data_view import data_lines
from rayrlhf.tools.starters.trl_fields import GRPO, KEYS, REASONS

DOCS = Path(__file__).parent
PAGES = {
    **ROOTS,
    "chain": "rayrlhf.config.pipelines:ChainConfig",
    "cluster": "rayrlhf.config.launch:ClusterConfig",
    "simulation": "rayrlhf.config.launch:SimulationConfig",
}
COMMANDS = {
    "chain": "rayrlhf run CHAIN",
    "cluster": "rayrlhf plan CONFIG --cluster FILE",
    "simulation": "rayrlhf plan CONFIG --simulate FILE",
}
PPO_ONLY = {"reward_model", "local_rollout_forward_batch_size", "num_sample_generations", "stop_token", "stop_token_id"}
"""Fields that `GRPOConfig` does not have."""
BOUNDS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<", "min_length": "at least", "max_length": "at most"}
NAMES: dict[Any, str] = {int: "int", float: "float", str: "text", bool: "bool", Path: "path", type(None): "null", Any: "any"}


def sections_in(annotation: Any) -> Iterator[type[Section]]:
    """Section classes inside a field's annotation."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        yield annotation
    for argument in typing.get_args(annotation):
        yield from sections_in(argument)


def type_text(annotation: Any) -> str:
    """Readable form of a field's type."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return " \\| ".join(f"`{value}`" for value in arguments)
    if origin is typing.Annotated:
        return type_text(arguments[0])
    if origin in (typing.Union, types.UnionType):
        return " \\| ".join(dict.fromkeys(type_text(argument) for argument in arguments if argument is not type(None)))
    if origin in (list, tuple):
        return f"list of {type_text(arguments[0])}"
    if origin is dict:
        return f"map of {type_text(arguments[1])}"
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return "section"
    return NAMES.get(annotation, getattr(annotation, "__name__", str(annotation)))


def bounds_text(field: FieldInfo) -> str:
    """Bounds of a number or a length, such as `>= 0`."""
    found = [f"{sign} {getattr(part, name)}" for part in field.metadata for name, sign in BOUNDS.items() if hasattr(part, name)]
    return f", {', '.join(found)}" if found else ""


def default_text(field: FieldInfo) -> str:
    """A field's default as YAML would show it, or `required`."""
    if field.is_required():
        return "**required**"
    value = field.get_default(call_default_factory=True)
    if value is PydanticUndefined or isinstance(value, Section):
        return ""
    if isinstance(value, Path):
        value = str(value)
    return f"`{json.dumps(value, default=str, ensure_ascii=False)}`"


def one_line(text: str) -> str:
    """Text that fits a table cell."""
    return re.sub(r"\s+", " ", text.strip()).replace("|", "\\|").replace("{", "&#123;")


def section_rows(cls: type[Section], prefix: str) -> Iterator[str]:
    """One table row per key of a section."""
    for attribute, field in cls.model_fields.items():
        key = field.alias or attribute
        inner = list(sections_in(field.annotation))
        meaning = one_line(field.description or (inner[0].__doc__ or "").splitlines()[0] if inner else field.description or "")
        name = f"[`{key}`](#{anchor(prefix + key)})" if inner else f"`{key}`"
        yield f"| {name} | {type_text(field.annotation)}{bounds_text(field)} | {default_text(field)} | {meaning} |"


def anchor(dotted: str) -> str:
    """Anchor of a section's heading."""
    return dotted.replace("_", "-") or "keys"


def section_text(
    cls: type[Section], dotted: str, seen: dict[type[Section], str], choice: str = "", suffix: str = ""
) -> Iterator[str]:
    """Heading, description and keys of a section, and of the sections in it."""
    chosen = {"": "", "plugin": " with a function of your own"}.get(choice, f" with `name: {choice}`")
    yield f"## {f'`{dotted}`' if dotted else 'Top level'}{chosen} {{ #{anchor(dotted)}{suffix} }}\n"
    if cls in seen:
        yield f"Keys as in [`{seen[cls]}`](#{anchor(seen[cls])}).\n"
        return
    seen[cls] = dotted
    if cls.__doc__:
        yield re.sub(r"\n\s+", "\n", cls.__doc__.strip()) + "\n"
    prefix = f"{dotted}." if dotted else ""
    yield "| key | type | default | meaning |\n|---|---|---|---|"
    yield "\n".join(section_rows(cls, prefix)) + "\n"
    old = [f"`{old}` (now `{new}`)" for old, new in cls.renamed_keys.items()]
    if old:
        yield f"Old spellings that still work: {', '.join(old)}.\n"
    for attribute, field in cls.model_fields.items():
        inner = list(dict.fromkeys(sections_in(field.annotation)))
        for number, section in enumerate(inner):
            choice = choice_of(section) if inner[1:] else ""
            suffix = f"-{choice}" if number else ""  # links to the section lead to its first form
            yield from section_text(section, prefix + (field.alias or attribute), seen, choice, suffix)


def choice_of(section: type[Section]) -> str:
    """Kind that selects one section of a union."""
    return str(getattr(section, "kind", section.__name__))


def configuration_page(task: str) -> str:
    """The reference page of one kind of configuration file."""
    module, name = PAGES[task].split(":")
    cls: type[Section] = getattr(import_module(module), name)
    command = COMMANDS.get(task, f"rayrlhf {task.replace('-', ' ', 1)} CONFIG")
    head = f"# {task} configuration\n\nRead by `{command}`. Class: `{PAGES[task].replace(':', '.')}`.\n"
    return "\n".join([head, *section_text(cls, "", {})]).rstrip() + "\n"


def cli_page() -> str:
    """The reference page of all commands."""
    command = typer.main.get_command(app)
    text = get_docs_for_click(obj=command, ctx=command.context_class(command, info_name="rayrlhf"), name="rayrlhf")
    text = re.sub(r"\*\*Commands\*\*:\n\n(\* .*\n)+\n?", "", text)  # shortened help, repeated in full below
    text = re.sub(r"(?m)^\* `--help`: .*\n", "", text)
    text = re.sub(r"\*\*Options\*\*:\n\n(?=#|\Z|\n)", "", text)
    text = text[text.index("## `") :].replace("```console\n$ ", "```text\n")
    head = "# Commands\n\nAll commands of `rayrlhf`, generated from the code. `rayrlhf COMMAND --help` prints the same.\n\n"
    head += "`rayrlhf --verbose COMMAND` also shows warnings of libraries, which are in `warnings.log` of the run folder.\n\n"
    head += (
        "Exit codes: 0 success, 1 a run that stopped itself, 2 a mistake in the input, 75 stopped on request and resumable.\n\n"
    )
    return head + re.sub(r"\n{3,}", "\n\n", text).rstrip() + "\n"


def condition(text: str) -> str:
    """A check's docstring as a condition: without its verb."""
    found = one_line(text).removeprefix("Detect ")
    return found[:1].upper() + found[1:]


def findings_page() -> str:
    """The reference page of the checks of running runs."""
    head = (
        "# Findings\n\nThis page lists the problems that checks find in the metrics of a run, after each step.\n"
        "A finding has evidence and a remedy. It is printed, written as the metric `alarm/NAME`, and shown by\n"
        "`rayrlhf report` and `rayrlhf watch`. `observe.on_alarm` sets the reaction to alarms.\n\n"
        "| finding | severity | condition | remedy |\n|---|---|---|---|\n"
    )
    return head + "".join(
        f"| `{c.name}` | {c.severity} | {condition(c.look.__doc__ or '')} | {one_line(c.remedy)} |\n" for c in CHECKS
    )


def preset_source(name: str) -> str:
    """The comment with the sources of a recipe."""
    variable = next((key for key, value in vars(presets).items() if value is PRESETS[name]), "")
    found = re.search(rf"((?:^#.*\n)+){variable}: Tree = ", inspect.getsource(presets), re.MULTILINE) if variable else None
    return re.sub(r"\n?# ", " ", found[1]).strip() if found else "Values of TRL, see [From TRL](../from-trl.md)."


def preset_row(name: str) -> str:
    """The row of a preset in the table of all."""
    tree = PRESETS[name]
    algorithm = tree["algorithm"]
    kl, pairs = algorithm["kl"], algorithm.get("online_dpo")
    loss = {"name": pairs.get("loss", pairs.get("variant")), "loss_aggregation": "pair"} if pairs else algorithm["policy_loss"]
    clip = ", ".join(f"{loss[key]:g}" for key in ("clip_low", "clip_high") if key in loss)
    penalty = f"{kl['estimator']} in the {kl['placement']}, {kl['coefficient']:g}" if kl["coefficient"] else "none"
    cells = [
        f"[`{name}`](#{anchor_of(name)})",
        f"`{algorithm['advantage']['estimator']}`",
        tree["critic"]["kind"],
        str(tree["rollout"].get("samples_per_prompt", 1)),
        f"`{loss['name']}`",
        clip,
        loss.get("loss_aggregation", "token"),
        penalty,
    ]
    return f"| {' | '.join(cells)} |\n"


def anchor_of(preset: str) -> str:
    """Anchor of a preset's heading."""
    return f"preset-{preset.replace('+', 'p')}"


def presets_page() -> str:
    """The reference page of all presets."""
    head = (
        "# Presets\n\nA preset sets the keys of an algorithm, with the values of its paper or of a named implementation.\n"
        "Your own keys override it. Models, data, lengths and batch sizes are set by the run. Generated from\n"
        "the code; [`presets.py`](https://github.com/rayrlhf/rayrlhf/blob/main/rayrlhf/config/loading/presets.py) has the\n"
        "source of each value.\n\n| preset | estimator | critic | samples per prompt | loss | clip | aggregation | KL |\n"
        "|---|---|---|---|---|---|---|---|\n"
    )
    text = head + "".join(preset_row(name) for name in PRESETS)
    for name, tree in PRESETS.items():
        shown = yaml.safe_dump(tree, sort_keys=False, default_flow_style=False)
        text += f"\n## `{name}` {{ #{anchor_of(name)} }}\n\n{preset_source(name)}\n\n```yaml\n{shown}```\n"
    return text


def grpo_page() -> str:
    """The reference page of TRL's `GRPOConfig`, field by field."""
    rows = {field: (f"`{key}`", "") for field, key in KEYS["GRPOConfig"].items()}
    rows |= {field: (f"`{key}`", note) for field, (key, note) in GRPO.items()}
    rows |= {field: ("", REASONS[field]) for field in REASONS if field not in rows and field not in PPO_ONLY}
    table = "".join(f"| `{field}` | {key} | {note} |\n" for field, (key, note) in rows.items())
    return (
        "# From TRL's GRPOTrainer\n\nThis page maps TRL's GRPO to rayrlhf. `preset: grpo`, `dr-grpo`, `dapo` and others set\n"
        "the algorithm. `rayrlhf init --from-trl` writes the file with the table below. Reward functions of TRL run\n"
        "unchanged: `completions`, `completion_ids`, `trainer_state` and columns have TRL's form; None means that a function\n"
        "does not apply.\n\n"
        "```bash\nrayrlhf init --from-trl \"GRPOConfig(num_generations=16, beta=0.04, loss_type='dr_grpo')\"\n```\n\n"
        "| TRL | here |\n|---|---|\n"
        "| `reward_funcs` | `reward.functions`, each with its `weight`; a reward model is `reward.model` |\n"
        "| `train_dataset` with `prompt` | `data.train`, text or messages; the chat template is applied for you |\n"
        "| `trainer.train()` | `rayrlhf ppo FILE`, or a loop of your own over `rayrlhf.open_trainer` |\n"
        "| `accelerate launch`, `trl vllm-serve` | one command; policy and replicas are actors on Ray |\n\n"
        "## `GRPOConfig`, field by field\n\nFields of TRL 1.16. A field without a key has no equivalent, or needs none.\n\n"
        f"| field | key | note |\n|---|---|---|\n{table}"
    )


def families_page() -> str:
    """The reference page of tried model families."""
    rows = json.loads((DOCS.parent / "tests/models/families.json").read_text(encoding="utf-8"))
    head = (
        "# Model families\n\nThis page lists the tested model families. Every model, listed or not, is also checked on\n"
        "load with 32 random tokens: its own forward pass is compared with trunk and output layer, and single samples\n"
        "with padded and packed ones. A scale or a soft cap behind the output layer is applied. If packed samples would\n"
        "influence each other, they are padded or computed one by one. Any other difference is an error before anything\n"
        "runs. `--dry-run`, `rayrlhf plan` and the run's `environment.json` show the result. Multimodal and quantized\n"
        "checkpoints, encoder-decoder models and others with non-causal attention are refused.\n\n"
        "`python -m tests.models.test_families` made this table with tiny random checkpoints in float32 on a CPU:\n"
        "attention (`model.attention`), logits, samples per row, SFT with `gradient_checkpointing`, `model.lora` and its\n"
        "merge, the rollout backends `transformers` and `vllm` before and after a weight sync, reward models, and\n"
        "reloaded exports. `yes` means equal log-probs, gradients or scores; an empty cell was not tested.\n\n"
    )
    columns = ("load", "logits", "rows", "training", "lora", "sampling", "vllm", "reward", "export")
    names = ("family", "attention", "logits", "rows", "SFT", "LoRA", "transformers", "vLLM", "reward model", "export")
    head += f"| {' | '.join(names)} |\n|{'---|' * len(names)}\n"
    return head + "".join(
        f"| {' | '.join([f'`{name}`', *(one_line(row.get(column, '')) for column in columns)])} |\n"
        for name, row in rows.items()
    )


def turns(question: str, answer: str, role: str = "role", text: str = "content") -> list[dict[str, str]]:
    """A conversation of two turns under a format's key names."""
    names = ("human", "gpt") if role == "from" else ("user", "assistant")
    return [{role: names[0], text: question}, {role: names[1], text: answer}]


ASKED = "What is 2 + 3?"
FORMATS: list[tuple[str, str, str, dict[str, Any]]] = [
    ("Prompt and completion", "sft", "qa.jsonl", {"prompt": ASKED, "completion": "5"}),
    ("Messages", "sft", "chats.jsonl", {"messages": turns(ASKED, "5")}),
    ("Alpaca", "sft", "alpaca.json", {"instruction": "Add the numbers.", "input": "2, 3", "output": "5"}),
    ("ShareGPT", "sft", "sharegpt.json", {"conversations": turns(ASKED, "5", "from", "value")}),
    ("KTO", "sft", "kto.jsonl", {"prompt": ASKED, "completion": "5", "label": True}),
    (
        "Anthropic HH",
        "dpo",
        "hh.jsonl",
        {"chosen": f"\n\nHuman: {ASKED}\n\nAssistant: 5", "rejected": f"\n\nHuman: {ASKED}\n\nAssistant: No idea."},
    ),
    (
        "Better answers of Anthropic HH (`messages_field: chosen`)",
        "sft",
        "better.jsonl",
        {"chosen": f"\n\nHuman: {ASKED}\n\nAssistant: 5", "rejected": f"\n\nHuman: {ASKED}\n\nAssistant: No idea."},
    ),
    ("UltraFeedback", "dpo", "ultra.jsonl", {"prompt": ASKED, "chosen": turns(ASKED, "5"), "rejected": turns(ASKED, "6")}),
    ("Orca pairs", "dpo", "orca.jsonl", {"system": "Be brief.", "question": ASKED, "chosen": "5", "rejected": "6"}),
]
"""Title, task, file name and row of each common format."""
SHOWN_CONFIG = """run: {name: shown}
model: {path: "builtin:tiny?context=256", dtype: float32}
data: {train: {path: none}, evaluation: {path: none}, max_length: 256}
"""


def formats_page() -> str:
    """The reference page of common formats, as `rayrlhf data` reads them."""
    text = (
        "# Formats by example\n\nOne row of each common format, and the output of `rayrlhf data CONFIG`. Tokens of the\n"
        "loss are in brackets; a terminal shows them in green. Generated with the small built-in model's chat template.\n"
    )
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        Path("config.yaml").write_text(SHOWN_CONFIG, encoding="utf-8")
        for title, task, name, row in FORMATS:
            stored = json.dumps([row] if name.endswith(".json") else row)
            Path(name).write_text(stored + "\n", encoding="utf-8")
            named = re.findall(r"`(\w+): (\w+)`", title)
            paths = [
                f"data.{part}.{key}={value}" for part in ("train", "evaluation") for key, value in [("path", name), *named]
            ]
            lines = data_lines(Path("config.yaml"), paths, task, 1, color=False)
            # The held-out rows are the same file: their lines are, too.
            shown = "\n".join(dict.fromkeys(line.plain for line in lines)).rstrip()
            text += f'\n## {title}\n\n```json title="{name}"\n{stored}\n```\n\n```text\n{shown}\n```\n'
    return text


def pages() -> dict[Path, str]:
    """All generated pages by path."""
    found = {DOCS / f"reference/configuration/{task}.md": configuration_page(task) for task in PAGES}
    others = {"cli": cli_page(), "findings": findings_page(), "presets": presets_page(), "families": families_page()}
    others["from-grpo"] = grpo_page()
    others["formats"] = formats_page()
    return {**found, **{DOCS / f"reference/{name}.md": text for name, text in others.items()}}


def stale_pages() -> list[Path]:
    """Generated pages that do not match the code."""
    return [path for path, text in pages().items() if not path.is_file() or path.read_text(encoding="utf-8") != text]


def main() -> None:
    """Write the pages, or check them."""
    if "--check" in sys.argv:
        if found := stale_pages():
            sys.exit(f"not current, run `python docs/generate.py`: {', '.join(str(path) for path in found)}")
        return
    for path, text in pages().items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
