"""The pages hold: functions, tests, keys, links, commands and code blocks exist and run, and the site builds."""

import importlib
import importlib.util
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest
import typer
import yaml
from pydantic import BaseModel
from typer.testing import CliRunner

from rayrlhf import errors
from rayrlhf.cli import app
from rayrlhf.config.launch import ClusterConfig
from rayrlhf.config.loading.kinds import ROOTS, config_class
from rayrlhf.config.loading.load import load_config
from rayrlhf.config.loading.presets import PRESETS
from rayrlhf.config.loading.problems import sections_in
from rayrlhf.config.pipelines import ChainConfig
from rayrlhf.config.ppo import PPOConfig
from rayrlhf.tools.starters import starter

ROOT = Path(__file__).parents[1]
MATHS = ROOT / "rayrlhf/algorithms/README.md"
MIGRATION = ROOT / "examples/from_trl/README.md"
PAGES = sorted(path for path in ROOT.rglob("*.md") if not {".venv", "node_modules", "site", "runs"} & set(path.parts))
SITE = [ROOT / "README.md", *(path for path in PAGES if path.is_relative_to(ROOT / "docs"))]
TUTORIAL = ROOT / "docs/tutorial.md"
HOSTED = re.compile(r"https://github\.com/rayrlhf/rayrlhf/(?:blob|tree)/main/([\w./-]+)")


def rows(path: Path, columns: int) -> Iterator[list[str]]:
    """Cells of all tables of so many columns, without their heads; `\\|` is no border."""
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
    from rayrlhf.algorithms.policy_loss_registry import POLICY_LOSSES

    text = MATHS.read_text(encoding="utf-8").lower().replace(". ", "_")
    named = {"ppo": "policy loss", "reinforce++-baseline": "group baseline"}
    for name in (*ADVANTAGE_ESTIMATORS, *POLICY_LOSSES):
        assert named.get(name, name) in text, name


def keys(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in section.model_fields.items():
        yield prefix + name
        for kind, _ in sections_in(field.annotation):
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
    text = path.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
        if "://" not in target:
            assert (path.parent / target).exists(), target
    for target in HOSTED.findall(text):
        assert (ROOT / target).exists(), target


@pytest.mark.parametrize("path", PAGES, ids=[str(path.relative_to(ROOT)) for path in PAGES])
def test_every_test_that_a_page_names_exists(path):
    for name in re.findall(r"\btests/[\w/.]+\w", path.read_text(encoding="utf-8")):
        assert (ROOT / name).exists(), name


def test_every_path_on_the_map_exists():
    page = ROOT / "rayrlhf/README.md"
    text = page.read_text(encoding="utf-8")
    names = [name for name in re.findall(r"`([\w/]+(?:/|\.py))`", text) if not name.startswith("path/")]
    assert [name for name in names if not (page.parent / name).exists() and not (ROOT / name).exists()] == []
    packages = {path.parent.name for path in (ROOT / "rayrlhf").glob("*/__init__.py")} - {"pipelines", "tools"}
    assert [name for name in packages if f"`{name}/`" not in text] == []


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
DRY = [
    (path, words)
    for path, words in COMMANDS
    if path != TUTORIAL and words[0] in {"ppo", "sft", "reward", "dpo", "presft", "evaluate", "run"}
]


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """The examples as in a clone, with files where their pages make or fetch them."""
    folder = tmp_path_factory.mktemp("clone")
    (folder / "examples").symlink_to(ROOT / "examples")
    (folder / "data/gsm8k").mkdir(parents=True)
    (folder / "my-run.yaml").write_text(starter("ppo"), encoding="utf-8")
    solved = [{"question": f"What is {n}+1?", "answer": f"{n}+1=<<{n}+1={n + 1}>>{n + 1}\n#### {n + 1}"} for n in range(256)]
    pairs = [{"prompt": f"What is {n}+1?", "chosen": f"{n + 1}", "rejected": "0"} for n in range(256)]
    for name, rows in {"train.jsonl": solved, "test.jsonl": solved, "gsm8k/pairs.jsonl": pairs}.items():
        (folder / "data" / name).write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    runpy.run_path(str(ROOT / "examples/presft/make_data.py"))["make"](folder / "data/presft", 64, 0)
    return folder


@pytest.mark.parametrize(
    ("path", "words"), DRY, ids=[f"{path.relative_to(ROOT)}:{' '.join(words)[:50]}" for path, words in DRY]
)
def test_a_command_of_a_page_gets_as_far_as_its_plan(path, words, clone, monkeypatch):
    monkeypatch.chdir(clone)
    words = [word for word in words if word != "--dry-run"]
    given = [word.replace("PATH/", "data/") for word in words]
    if HUB in Path(given[1]).read_text(encoding="utf-8") and given == words:  # there is no network in a test
        field = "{path: data/train.jsonl, prompt_field: question%s}"
        sft, ppo = f"data.train={field % ', completion_field: answer'}", f"data.train={field % ''}"
        given += [sft] if words[0] == "sft" else [ppo, f"data.evaluation={field % ''}"]
    result = CliRunner().invoke(app, [*given, "--dry-run"])
    assert result.exit_code == 0, result.exception
    assert len(result.output.splitlines()) > 3


class Block(NamedTuple):
    """A fenced block of a page."""

    path: Path
    line: int
    language: str
    title: str
    text: str

    def __str__(self) -> str:
        return f"{self.path.relative_to(ROOT)}:{self.line}"


def blocks(path: Path) -> Iterator[Block]:
    """All fenced blocks of a page, in order."""
    text = path.read_text(encoding="utf-8")
    for found in re.finditer(r"^```(\w*)[ ]?(?:title=\"([^\"]*)\")?[^\n]*\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        language, title, body = found.groups()
        yield Block(path, text.count("\n", 0, found.start()) + 1, language, title or "", body)


BLOCKS = [block for path in SITE for block in blocks(path)]
CHECKED = {"bash", "python", "yaml", "json", "jsonl"}
PROGRAMS = {"rayrlhf", "python", "python3", "pytest", "ray", "pip"}
COMPLETE = {"chain": ChainConfig, "cluster": ClusterConfig}
PPO_BASE = {
    "model": {"path": "builtin:tiny"},
    "data": {
        "train": {"path": "builtin:word-problems"},
        "evaluation": {"path": "builtin:word-problems", "split": "evaluation"},
    },
    "reward": {"functions": [{"name": "word_problems"}]},
}
"""The least that a fragment of a PPO configuration is laid over."""


def test_every_block_is_in_a_language_that_a_test_checks():
    output = {block.path.name for block in BLOCKS if block.language == "text"}
    assert {block.language for block in BLOCKS} <= CHECKED | {"text"}
    assert output <= {"cli.md", "formats.md", "replay.md", "tutorial.md"}


@pytest.mark.parametrize("block", [block for block in BLOCKS if block.language == "bash"], ids=str)
def test_every_line_of_a_shell_block_calls_a_known_program_on_files_that_exist(block):
    for line in block.text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if not words:
            continue
        assert words[0].removeprefix(".venv/bin/") in PROGRAMS, line
        if words[0] in {"python", "pytest"}:
            paths = [word for word in words[1:] if word.startswith(("examples/", "tests/", "cluster/", "docs/"))]
            assert all((ROOT / path).exists() for path in paths), line


def merged(under: dict, over: dict) -> dict:
    result = dict(under)
    for key, value in over.items():
        below = result.get(key)
        result[key] = merged(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return result


@pytest.mark.parametrize("block", [block for block in BLOCKS if block.language == "yaml"], ids=str)
def test_every_yaml_block_is_a_valid_configuration_or_a_part_of_one(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in re.findall(r"\bmy_\w+\.py", block.text):  # a plugin: the Python of the same page
        text = "\n".join(other.text for other in BLOCKS if other.path == block.path and other.language == "python")
        (tmp_path / name).write_text(text, encoding="utf-8")
    task = next((name for name in (*COMPLETE, *ROOTS) if Path(block.title).stem.startswith(name)), "ppo")
    tree = yaml.safe_load(block.text)
    if task not in COMPLETE:
        base = PPO_BASE if task == "ppo" else yaml.safe_load(starter(task))
        tree = merged(base if task == "ppo" else {key: base[key] for key in base if key not in tree}, tree)
    if "teacher" in tree:  # a preset names no model
        tree["teacher"].setdefault("model", {"path": "builtin:tiny"})
    path = tmp_path / "block.yaml"
    path.write_text(yaml.safe_dump(tree, sort_keys=False), encoding="utf-8")
    load_config(COMPLETE[task] if task in COMPLETE else config_class(task), path)


@pytest.mark.parametrize("block", [block for block in BLOCKS if block.language in {"json", "jsonl"}], ids=str)
def test_every_json_block_is_json(block):
    for text in block.text.splitlines() if block.language == "jsonl" else [block.text]:
        json.loads(text)


STARTS_RAY = {ROOT / "README.md", ROOT / "docs/guides/custom-loop.md"}
"""Pages whose Python runs a training step."""
PYTHON = list(dict.fromkeys(block.path for block in BLOCKS if block.language == "python" and block.path != TUTORIAL))


@pytest.mark.parametrize(
    "path", [pytest.param(path, marks=[pytest.mark.nightly] if path in STARTS_RAY else [], id=path.name) for path in PYTHON]
)
def test_the_python_of_a_page_runs_as_printed(path, clone):
    text = "\n".join(block.text for block in BLOCKS if block.path == path and block.language == "python")
    done = run([sys.executable, "-c", text], clone)
    assert done.returncode == 0, done.stderr[-3000:]


def run(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a program of this environment in a folder."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), "NO_MKDOCS_2_WARNING": "1"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.nightly
def test_the_tutorial_runs_as_printed(tmp_path):
    for block in blocks(TUTORIAL):
        if block.title:
            (tmp_path / block.title).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / block.title).write_text(block.text, encoding="utf-8")
        elif block.language in {"bash", "python"}:
            command = ["bash", "-ec", block.text] if block.language == "bash" else [sys.executable, "-c", block.text]
            done = run(command, tmp_path)
            assert done.returncode == 0, f"{block}: {done.stdout[-1500:]}{done.stderr[-1500:]}"


def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate_docs", ROOT / "docs/generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_preset_of_the_readme_and_of_the_choice_is_one():
    named = re.findall(r"`preset: ([\w+-]+)`", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert len(named) > 8
    assert set(named) <= set(PRESETS)
    choice = {name for row in rows(ROOT / "docs/choosing.md", 3) for name in re.findall(r"`([\w+-]+)`", row[1])}
    assert choice == set(PRESETS)


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= 900


def test_the_generated_pages_are_current():
    stale = [str(path.relative_to(ROOT)) for path in generator().stale_pages()]
    assert stale == [], "run `python docs/generate.py`"


def test_every_task_has_a_configuration_page_and_every_command_a_section():
    assert set(ROOTS) <= set(generator().PAGES)
    text = (ROOT / "docs/reference/cli.md").read_text(encoding="utf-8")
    for name in typer.main.get_command(app).commands:
        assert f"## `rayrlhf {name}`" in text, name


def test_the_site_builds_strictly(tmp_path):
    done = run([sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")], ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "WARNING" not in done.stderr
    assert "site/" in (ROOT / ".gitignore").read_text(encoding="utf-8").splitlines()
    for page in (tmp_path / "site").rglob("*.html"):
        loaded = re.findall(r"<(?:script|link|img)[^>]+(?:src|href)=\"?(https?://[^\s\">]+)", page.read_text(encoding="utf-8"))
        assert [url for url in loaded if not url.startswith("https://rayrlhf.github.io/")] == [], page


def test_the_troubleshooting_page_quotes_messages_that_the_code_prints():
    source = "".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "rayrlhf").rglob("*.py")))
    source = re.sub(r"\"\s*\n\s*f?\"", "", source)
    page = ROOT / "docs/troubleshooting.md"
    text = page.read_text(encoding="utf-8")
    quoted = [row[0] for row in rows(page, 2) if "`" in row[0]]
    assert len(quoted) > 20
    machine = text.split("## The machine")[1]
    parts = [part.strip(" ;") for message in re.findall(r"`([^`]+)`", "\n".join(quoted)) for part in message.split("...")]
    assert [part for part in parts if part not in source and part not in machine] == []
    for name, value in vars(errors).items():
        if isinstance(value, type) and issubclass(value, Exception):
            assert f"`{name}`" in text, name
