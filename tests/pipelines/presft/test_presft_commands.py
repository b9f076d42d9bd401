"""`rayrlhf presft CONFIG` is the whole run, its steps are commands, and every mistake is one line."""

import pytest
from typer.testing import CliRunner

from rayrlhf.config.loading.load import load_config
from rayrlhf.config.pipelines import PreSFTConfig
from rayrlhf.errors import UserError
from rayrlhf.pipelines.presft.dry_run import describe
from rayrlhf.pipelines.presft.presft_commands import app
from tests.pipelines.presft.runs import presft_config

BASE = ["model.path=builtin:tiny", "data.path=pairs.jsonl"]


def write_config(folder, *lines):
    path = folder / "presft.yaml"
    path.write_text("\n".join(["model: {path: builtin:tiny}", "data: {path: pairs.jsonl}", *lines]))
    return str(path)


@pytest.mark.parametrize("command", [[], ["run"]])
def test_the_whole_run_is_the_default_command(tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "a", "completion": "b", "id": 1}\n')
    shown = CliRunner().invoke(app, [*command, write_config(tmp_path), "probe.samples=4", "probe.temperature=0.7", "--dry-run"])
    assert shown.exit_code == 0, shown.output
    assert "4 samples at temperature 0.7" in shown.output
    assert "pairs.jsonl: 1 of 1 rows, read as prompts with answers: prompt, completion; not used: id" in shown.output


def test_a_step_without_the_one_before_says_which_to_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["report", write_config(tmp_path)])
    assert isinstance(result.exception, UserError)
    assert "run `rayrlhf presft score` first" in str(result.exception)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["probe.samples=2"], "set temperature"),
        (["select.rule=threshold"], "needs a value"),
        (["select.value=3.0"], "takes no value"),
        (["select.rule=quantile", "select.value=20.0"], "out of range"),
        (["relabel.method=mbr", "relabel.samples=2"], "3 or more"),
        (["relabel.samples=2"], "takes one sample"),
        (["relabel.method=verifier"], "needs relabel.verifier"),
        (["relabel.method=reward_model"], "needs relabel.reward_model"),
        (["probe.response_field=answer", "run.rounds=2"], "set run.rounds to 1"),
        (["probe.response_field=answer", "relabel.method=mbr", "relabel.samples=4"], "set probe.model"),
        (["probe.response_field=answer", "probe.likelihood=true"], "needs no model"),
        (["probe.tokenize=14a"], "probe.tokenize"),
        (["relabel.verifier={functions: [{name: gsm8k}], model: {model: {path: m}}}"], "consists of functions"),
    ],
)
def test_a_wrong_setting_is_named(overrides, message):
    with pytest.raises(UserError, match=message):
        load_config(PreSFTConfig, None, [*BASE, *overrides])


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        ([], "no more samples"),
        (["probe.temperature=1.0"], "one greedy response"),
        (["relabel.method=mbr", "relabel.samples=4"], "the best of 4 by mbr"),
        (["relabel.struggling=drop"], "4. drop them"),
        (["select.rule=quantile", "select.value=0.2"], "lowest 20.0%"),
        (["probe.response_field=completion"], "no probe"),
        (["probe.model.path=m"], "probe m, tuned already"),
        (["quality.data.path=held.jsonl"], "held-out rows of held.jsonl"),
        (["run.rounds=3"], "3 rounds"),
    ],
)
def test_the_plan_says_what_will_be_done(tmp_path, overrides, line):
    assert line in describe(presft_config(tmp_path, *overrides))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["relabel.verifier.functions=[{name: gsm8q}]"], "did you mean 'gsm8k'"),
        (["generate.tensor_parallel_size=3"], "generate.tensor_parallel_size 3: builtin:tiny has"),
        (["probe.model.path=builtin:tiny?hidden=64", "generate.tensor_parallel_size=2"], "hidden=64 has 1 attention heads"),
        (["quality.data.path=h.jsonl", "quality.verifier.functions=[{name: no.module:f}]"], "no.module"),
    ],
)
def test_what_would_fail_in_another_process_fails_before_one_is_started(tmp_path, overrides, message):
    shown = CliRunner().invoke(app, [write_config(tmp_path), "--dry-run", *overrides])
    assert isinstance(shown.exception, UserError)
    assert message in str(shown.exception)
