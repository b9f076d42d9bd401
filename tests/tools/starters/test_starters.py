"""A first configuration loads as it is, and the schema that editors get accepts what we accept."""

import json

import jsonschema
import pytest
import yaml
from typer.testing import CliRunner

from rayrlhf.cli import app
from rayrlhf.config.loading.kinds import ROOTS, config_class
from rayrlhf.config.loading.load import load_config
from rayrlhf.config.loading.presets import PRESETS
from rayrlhf.config.loading.yaml_text import parse
from rayrlhf.errors import UserError
from rayrlhf.tools.starters import json_schema, starter, write_starter
from tests.test_examples import OTHER_FILES, PPO_FILES, ROOT


@pytest.mark.parametrize("task", ROOTS)
@pytest.mark.parametrize("gpus", [0, 8])
def test_a_starter_is_a_valid_configuration_with_comments(task, gpus, tmp_path):
    path = tmp_path / "new" / "file.yaml"
    write_starter(task, path, "some/model: with odd 'name'", gpus=gpus)
    text = path.read_text()
    assert text.startswith("# ")
    config = load_config(config_class(task), path, [])
    model = next(iter(config.models.values())) if task == "icl-evaluate" else config.model
    assert model.path == "some/model: with odd 'name'"


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("gpus", [0, 8])
def test_a_starter_with_a_preset_loads_with_the_values_of_the_preset(preset, gpus, tmp_path):
    path = tmp_path / "file.yaml"
    write_starter("ppo", path, gpus=gpus, preset=preset)
    config = load_config(config_class("ppo"), path)
    algorithm = PRESETS[preset]["algorithm"]
    assert config.algorithm.advantage.estimator == algorithm["advantage"]["estimator"]
    assert config.algorithm.policy_loss.name == algorithm.get("policy_loss", {"name": "ppo"})["name"]
    assert config.run.name == "my-" + preset.replace("+", "-")


def test_only_ppo_has_presets_and_an_unknown_one_is_named(tmp_path):
    with pytest.raises(UserError, match="only the task ppo has presets"):
        starter("sft", preset="grpo")
    with pytest.raises(UserError, match=r"--preset: unknown preset grop; did you mean grpo\?"):
        starter("ppo", preset="grop")


@pytest.mark.parametrize("task", ROOTS)
def test_the_schema_accepts_the_starter_and_refuses_a_misspelled_key(task):
    schema = json_schema(task)
    tree = yaml.safe_load(starter(task))
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(tree, schema)
    with pytest.raises(jsonschema.ValidationError, match="modle"):
        jsonschema.validate(tree | {"modle": {}}, schema)


@pytest.mark.parametrize("path", [path for path in PPO_FILES if "from_trl" not in path] + list(OTHER_FILES))
def test_the_schema_accepts_the_examples(path):
    kinds = {f"{kind.__module__}:{kind.__name__}": task for task, kind in ((task, config_class(task)) for task in ROOTS)}
    wanted = OTHER_FILES.get(path)
    task = "ppo" if wanted is None else kinds[f"{wanted.__module__}:{wanted.__name__}"]
    jsonschema.validate(parse((ROOT / path).read_text()), json_schema(task))


@pytest.mark.parametrize("task", ROOTS)
def test_every_section_and_every_key_says_what_it_means(task):
    for name, section in json_schema(task)["$defs"].items():
        assert section.get("description"), name
        for key, value in section.get("properties", {}).items():
            is_section = "$ref" in value or any("$ref" in part for part in value.get("anyOf", ()))
            assert is_section or value.get("description"), f"{name}.{key}"


def test_a_file_that_is_there_is_never_replaced(tmp_path):
    path = tmp_path / "ppo.yaml"
    path.write_text("mine")
    with pytest.raises(UserError, match=r"ppo\.yaml: exists already"):
        write_starter("ppo", path)
    assert path.read_text() == "mine"


def test_unknown_tasks_are_one_line():
    for call in (starter, json_schema):
        with pytest.raises(UserError, match="dpp: expected one of ppo, sft"):
            call("dpp")


def test_the_commands_write_and_print(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["init", "sft", "--model", "builtin:tiny"], catch_exceptions=False)
    assert "rayrlhf sft sft.yaml --dry-run" in result.output
    assert yaml.safe_load((tmp_path / "sft.yaml").read_text())["model"]["path"] == "builtin:tiny"
    checked = CliRunner().invoke(app, ["sft", "sft.yaml", "--dry-run"], catch_exceptions=False)
    assert checked.exit_code == 0
    printed = CliRunner().invoke(app, ["schema", "ppo"], catch_exceptions=False)
    assert json.loads(printed.output)["title"] == "rayrlhf ppo"
