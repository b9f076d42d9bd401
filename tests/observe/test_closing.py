"""The last lines of a run."""

import json
from pathlib import Path

from rayrlhf.observe.closing import EVALUATIONS, closing_lines
from rayrlhf.observe.samples import Sample, SampleSink

CONFIG = "run:\n  name: a\nmodel:\n  path: m\n  lora:\n    rank: 4\n"


def run(folder: Path, rows, config=CONFIG):
    folder.mkdir()
    (folder / "config.yaml").write_text(config)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_a_ppo_run_shows_score_with_interval_folder_and_next_commands(tmp_path, monkeypatch):
    rows = [{"step": 0, "evaluation/score": 0.5}, {"step": 1}, {"step": 2, "evaluation/score": 1.0}]
    run(tmp_path / "run", rows)
    sink = SampleSink(tmp_path / "run" / EVALUATIONS)
    for step, scores in ((0, (0.0, 1.0)), (2, (1.0, 1.0))):
        sink.write(
            step,
            [
                Sample(
                    prompt_id=i,
                    sample=0,
                    prompt="p",
                    response="r",
                    score=score,
                    length=3,
                    finish_reason="stop",
                    version=1,
                    parts={},
                )
                for i, score in enumerate(scores)
            ],
        )
    monkeypatch.chdir(tmp_path)
    lines = list(closing_lines(Path("run"), 2, 65.0, merged=True))
    folder = tmp_path / "run"
    assert lines == [
        "finished: 2 steps, 1m05s in this command",
        "held-out score: 0.500 [0.000, 1.000] at step 0, 1.000 [1.000, 1.000] at step 2",
        f"run folder: {folder}",
        f"model: {folder / 'export'} (adapters merged into their base model)",
        f"next: rayrlhf report {folder}",
        f"      rayrlhf chat {folder}",
        f"      rayrlhf evaluate FILE model.path={folder}",
    ]


def test_a_reward_model_shows_accuracy_and_no_chat(tmp_path):
    rows = [{"step": step, "evaluation/accuracy": value, "evaluation/loss": 0.7} for step, value in ((0, 0.5), (9, 0.75))]
    lines = list(closing_lines(run(tmp_path / "run", rows, "model:\n  path: m\n  lora: null\n"), 9, 5.0, chat=False))
    assert "held-out accuracy: 0.500 at step 0, 0.750 at step 9" in lines
    assert not [line for line in lines if "chat" in line or "merged" in line]


def test_a_run_without_held_out_data_has_no_such_line(tmp_path):
    assert not [line for line in closing_lines(run(tmp_path / "run", [{"step": 1}]), 1, 5.0) if "held-out" in line]
