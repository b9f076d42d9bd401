"""lm-evaluation-harness on a run: log-likelihoods and responses of its model, on tasks of local files."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from rayrlhf.cli import app
from rayrlhf.config.loading.load import dump_config
from rayrlhf.config.model import ModelSection
from rayrlhf.errors import UserError
from rayrlhf.models.load import load_causal_model, load_tokenizer
from rayrlhf.pipelines.evaluation import harness
from rayrlhf.pipelines.evaluation.harness import RESULT, evaluate_on_tasks
from tests.ppo.runs import run_config

QUESTIONS, CHOICES = ["1+1=", "25+4=", "a b ", "c 7"], ["12", "345", " x"]
TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
target_delimiter: ""
"""
GENERATES = """
output_type: generate_until
generation_kwargs: {until: ["\\n"], max_gen_toks: 4}
metric_list: [{metric: exact_match}]
"""
CHOOSES = """
output_type: multiple_choice
doc_to_choice: choices
metric_list: [{metric: acc}]
"""


@pytest.fixture
def run(tmp_path):
    """A finished PPO run with a random model, whose prompts are plain text."""
    config = run_config(tmp_path, "model.dtype=float32", "data.chat=false", "rollout.stop=['5']")
    folder = config.run.folder
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(dump_config(config))
    section = ModelSection(path=config.model.path)
    load_causal_model(section).save_pretrained(folder / "export")
    load_tokenizer(section).save_pretrained(folder / "export")
    return folder


def write_task(folder, name, kind, rows):
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = folder / f"{name}.yaml"
    task.write_text(TASK.format(name=name, rows=path) + kind)
    return str(task)


@pytest.mark.slow
def test_scores_are_those_of_the_model_by_transformers(run, tmp_path):
    pytest.importorskip("lm_eval", reason="needs the packages of requirements/harness.txt")
    model = AutoModelForCausalLM.from_pretrained(run / "export", dtype=torch.float32)
    tokenizer = load_tokenizer(ModelSection(path=str(run / "export")))

    def likelihood(question, choice):
        start, whole = tokenizer(question)["input_ids"], tokenizer(question + choice)["input_ids"]
        with torch.no_grad():
            logprobs = model(torch.tensor([whole])).logits[0].double().log_softmax(-1)
        return sum(float(logprobs[place - 1, whole[place]]) for place in range(len(start), len(whole)))

    def response(question):
        ids = torch.tensor([tokenizer(question)["input_ids"]])
        out = model.generate(ids, max_new_tokens=4, do_sample=False)[0, ids.shape[1] :]
        return tokenizer.decode(out, skip_special_tokens=True).split("\n")[0]

    best = [max(range(3), key=lambda index, text=text: likelihood(text, CHOICES[index])) for text in QUESTIONS]
    best[0] = (best[0] + 1) % 3
    chosen = [{"question": text, "choices": CHOICES, "answer": answer} for text, answer in zip(QUESTIONS, best, strict=True)]
    written = [{"question": text, "answer": response(text)} for text in QUESTIONS]
    written[0]["answer"] += "!"
    tasks = [write_task(tmp_path, "chosen", CHOOSES, chosen), write_task(tmp_path, "written", GENERATES, written)]
    done = CliRunner().invoke(app, ["evaluate", str(run), *tasks, "--harness", "lm-eval"], catch_exceptions=False)
    assert done.exit_code == 0
    assert "|chosen" in done.output
    results = json.loads((run / RESULT).read_text())["results"]
    assert results["chosen"]["acc,none"] == 0.75
    assert results["written"]["exact_match,none"] == 0.75
    broken = write_task(tmp_path, "broken", CHOOSES.replace("multiple_choice", "choice"), chosen)
    for task, message in (("arc_esy", "no task 'arc_esy'; did you mean 'arc_easy'"), (broken, "a task cannot be loaded")):
        with pytest.raises(UserError, match=message):
            evaluate_on_tasks("lm-eval", run, [task], check_only=True)


def test_mistakes_are_one_line_before_a_model_loads(run, monkeypatch):
    monkeypatch.setattr(harness, "find_spec", lambda name: None)
    for name, tasks, message in (
        ("helm", ["arc_easy"], "evaluate --harness helm: unknown; expected lm-eval"),
        ("lm-eval", [], "no task; expected RUN and names of tasks or YAML files"),
        ("lm-eval", ["arc_easy"], r"lm_eval is not installed; pip install 'rayrlhf\[harness\]'"),
    ):
        with pytest.raises(UserError, match=message):
            evaluate_on_tasks(name, run, tasks)


def test_prompts_are_those_of_the_run_without_its_stop_strings(run):
    model, rollout, chat, system = harness._sections(run)
    assert (model.path, model.dtype, chat, system) == (str(run / "export"), "float32", False, None)
    assert (rollout.max_model_length, rollout.stop) == (64, [])
    (run / "config.yaml").write_text(json.dumps({"data": {"system_prompt": "Be brief."}}))
    assert harness._sections(run)[2:] == (True, "Be brief.")
    assert harness._sections(run / "export")[2:] == (False, None)
