"""What the documents promise is there: functions, tests, configuration keys, files that links lead to."""

import importlib
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
from pydantic import BaseModel
from typer.testing import CliRunner

from rayrlhf.cli import app
from rayrlhf.config.ppo import PPOConfig

ROOT = Path(__file__).parents[1]
MATHS = ROOT / "rayrlhf/algorithms/README.md"
MIGRATION = ROOT / "examples/from_trl/README.md"
PAGES = sorted(path for path in ROOT.rglob("*.md") if not {".venv", "node_modules"} & set(path.parts))


def rows(path: Path, columns: int) -> Iterator[list[str]]:
    """Cells of the rows of all tables of so many columns, their heads left out; `\\|` is no border."""
    lines = path.read_text(encoding="utf-8").splitlines()
    for line, below in zip(lines, [*lines[1:], ""], strict=True):
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        if len(cells) == columns and not set(line) <= set("|-: ") and not (below and set(below) <= set("|-")):
            yield cells


def test_every_formula_has_a_function_and_a_test():
    found = list(rows(MATHS, 3))
    functions = [name for row in found for name in re.findall(r"`(rayrlhf[\w.]+:\w+)`", row[1])]
    tests = [name for row in found for name in re.findall(r"`(tests/[\w/.]+)`", row[2])]
    assert len(functions) > 20
    for name in functions:
        module, function = name.split(":")
        assert callable(getattr(importlib.import_module(module), function)), name
    for name in tests:
        assert "\ndef test_" in (ROOT / name).read_text(encoding="utf-8"), name


def test_every_loss_and_estimator_of_the_registries_is_on_the_page():
    from rayrlhf.algorithms.advantages import ADVANTAGE_ESTIMATORS
    from rayrlhf.algorithms.policy_losses import POLICY_LOSSES

    text = MATHS.read_text(encoding="utf-8").lower().replace(". ", "_")
    named = {"ppo": "policy loss", "reinforce++-baseline": "group baseline"}
    for name in (*ADVANTAGE_ESTIMATORS, *POLICY_LOSSES):
        assert named.get(name, name) in text, name


def keys(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in section.model_fields.items():
        yield prefix + name
        for kind in (field.annotation, *getattr(field.annotation, "__args__", ())):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                yield from keys(kind, f"{prefix}{name}.")


@pytest.mark.parametrize("path", [MATHS, MIGRATION], ids=["maths", "migration"])
def test_every_key_that_a_table_names_is_one(path):
    known = set(keys(PPOConfig))
    sections = set(PPOConfig.model_fields)
    named = re.findall(r"`([a-z]+(?:\.[a-z_]+)+)(?:: ?\w+|\.\*)?`", path.read_text(encoding="utf-8"))
    checked = [key for key in named if key.split(".")[0] in sections]
    assert len(checked) > (20 if path == MIGRATION else 2)
    assert [key for key in checked if key not in known] == []


CLASSIC = """steps learning_rate adap_kl_ctrl init_kl_coef kl_penalty target horizon gamma lam cliprange cliprange_value
vf_coef batch_size mini_batch_size gradient_accumulation_steps ppo_epochs max_grad_norm early_stopping target_kl ratio_threshold
use_score_scaling use_score_norm score_clip whiten_rewards gradient_checkpointing seed log_with model_name reward_model"""
MODERN = """num_mini_batches total_episodes local_rollout_forward_batch_size num_sample_generations response_length stop_token
stop_token_id temperature missing_eos_penalty sft_model_path reward_model_path model_adapter_name ref_adapter_name
num_ppo_epochs whiten_rewards kl_coef kl_estimator cliprange vf_coef cliprange_value gamma lam"""


@pytest.mark.parametrize(("title", "fields"), [("## Classic", CLASSIC), ("## Modern", MODERN)])
def test_every_field_of_trls_configuration_has_a_row(title, fields):
    text = MIGRATION.read_text(encoding="utf-8").split(title)[1].split("\n## ")[0]
    named = set(re.findall(r"`(\w+)`", "\n".join(line.split("|")[1] for line in text.splitlines() if line.startswith("|"))))
    assert set(fields.split()) <= named


@pytest.mark.parametrize("path", PAGES, ids=[str(path.relative_to(ROOT)) for path in PAGES])
def test_every_link_of_a_page_leads_to_a_file(path):
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", path.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (path.parent / target).exists(), target


def commands(path: Path) -> Iterator[list[str]]:
    """The `rayrlhf` commands in a page's shell blocks, without their comments."""
    for block in re.findall(r"```bash\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            starts = [place for place, word in enumerate(words) if Path(word).name == "rayrlhf"]
            if starts:
                yield words[starts[0] + 1 :]


COMMANDS = [(path, words) for path in PAGES for words in commands(path)]


@pytest.mark.parametrize(
    ("path", "words"), COMMANDS, ids=[f"{path.relative_to(ROOT)}:{' '.join(words)[:50]}" for path, words in COMMANDS]
)
def test_every_command_of_a_page_is_understood_and_its_files_are_there(path, words):
    command, name, rest = typer.main.get_command(app), "rayrlhf", list(words)
    while hasattr(command, "commands"):
        name = rest.pop(0) if rest[0] in command.commands or "run" not in command.commands else "run"  # presft CONFIG
        assert name in command.commands, f"rayrlhf {' '.join(words)}"
        command = command.commands[name]
    command.make_context(name, rest)  # raises where an argument or option is unknown
    for word in words:
        if word.startswith(("examples/", "rayrlhf/", "cluster/")):
            assert (ROOT / word).exists(), word


def test_pages_have_commands():
    assert len(COMMANDS) > 15


HUB = "openai/gsm8k"
DRY = [(path, words) for path, words in COMMANDS if words[0] in {"ppo", "sft", "reward", "dpo", "presft", "evaluate", "run"}]


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """The examples as in a clone, with files where their pages make or fetch them."""
    folder = tmp_path_factory.mktemp("clone")
    (folder / "examples").symlink_to(ROOT / "examples")
    (folder / "data/gsm8k").mkdir(parents=True)
    solved = [{"question": f"What is {n}+1?", "answer": f"{n}+1=<<{n}+1={n + 1}>>{n + 1}\n#### {n + 1}"} for n in range(256)]
    pairs = [{"prompt": f"What is {n}+1?", "chosen": f"{n + 1}", "rejected": "0"} for n in range(256)]
    for name, rows in {"train.jsonl": solved, "test.jsonl": solved, "gsm8k/pairs.jsonl": pairs}.items():
        (folder / "data" / name).write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    ("path", "words"), DRY, ids=[f"{path.relative_to(ROOT)}:{' '.join(words)[:50]}" for path, words in DRY]
)
def test_a_command_of_a_page_gets_as_far_as_its_plan(path, words, clone, monkeypatch):
    monkeypatch.chdir(clone)
    words = [word for word in words if word != "--dry-run"]
    given = [word.replace("PATH/", "data/") for word in words]
    if HUB in (ROOT / given[1]).read_text(encoding="utf-8") and given == words:  # there is no network in a test
        field = "{path: data/train.jsonl, prompt_field: question%s}"
        sft, ppo = f"data.train={field % ', completion_field: answer'}", f"data.train={field % ''}"
        given += [sft] if words[0] == "sft" else [ppo, f"data.evaluation={field % ''}"]
    result = CliRunner().invoke(app, [*given, "--dry-run"])
    assert result.exit_code == 0, result.exception
    assert len(result.output.splitlines()) > 3
