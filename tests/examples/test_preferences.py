"""The road on human preferences: rows in HH's format, accuracy against the length rule, and where to stop."""

import gzip
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from examples.preferences.curve import Pairs, Scores, choose_stop, measure_accuracy, point, report, table, verdict
from examples.preferences.make_rows import SHARES, convert, generate, make_rows, read_source, split
from rayrlhf.config.reward import RewardModelSection
from rayrlhf.engines.scoring.reward_model import RewardModelEngine
from rayrlhf.errors import UserError
from rayrlhf.observe.samples import read_samples
from rayrlhf.pipelines.chain.run_chain import load_chain, run_chain

ROOT = Path(__file__).parents[2]
START = "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: Why?\n\nAssistant:"


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def test_a_transcript_and_messages_become_the_same_row():
    row = convert({"chosen": f"{START} Because.", "rejected": f"{START} No."}, "here")
    turns = [user("Hi"), assistant("Hello."), user("Why?")]
    assert row == {"prompt": turns, "chosen": [assistant("Because.")], "rejected": [assistant("No.")]}
    assert convert({"chosen": [*turns, *row["chosen"]], "rejected": [*turns, *row["rejected"]]}, "here") == row


@pytest.mark.parametrize(
    ("chosen", "rejected", "reason"),
    [
        (f"{START} a", f"{START.replace('Hello', 'Bye')} b", "differ before the last answer"),
        (f"{START} a", f"{START} b\n\nHuman: more", "differ before the last answer"),
        (f"{START} a\n\nHuman: x", f"{START} a\n\nHuman: y", "no answer at the end"),
        (f"{START} a", f"{START} ", "an empty turn"),
        (f"{START} a", f"{START} a ", "equal answers"),
    ],
)
def test_a_row_that_teaches_no_preference_is_left_out_with_its_reason(chosen, rejected, reason):
    assert convert({"chosen": chosen, "rejected": rejected}, "here") == reason


def test_a_compressed_file_is_read_up_to_the_count_and_the_rest_is_counted(tmp_path):
    path = tmp_path / "train.jsonl.gz"
    answers = [(" a", " b"), (" a", " a"), (" a", " b" * 50), (" c", " d"), (" e", " f")]
    with gzip.open(path, "wt") as file:
        file.writelines(json.dumps({"chosen": START + one, "rejected": START + other}) + "\n" for one, other in answers)
    rows, others = read_source(path, 2, 60)
    assert [row["chosen"][0]["content"] for row in rows] == ["a", "c"]
    assert others == Counter({"equal answers": 1, "more than 60 characters": 1})


@pytest.mark.parametrize("row", [{"chosen": "text", "rejected": "text"}, {"chosen": f"{START} a"}])
def test_a_row_without_conversations_is_named(tmp_path, row):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"chosen": f"{START} a", "rejected": f"{START} b"}) + "\n" + json.dumps(row) + "\n")
    with pytest.raises(UserError, match=r"rows\.jsonl: row 2: (chosen|rejected): expected a transcript") as caught:
        read_source(path, 10, 100)
    assert "\n" not in str(caught.value)


def test_generated_rows_are_divided_by_their_first_turns(tmp_path):
    lines = make_rows(tmp_path, None, 0, 0, 0)
    files = {name: [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()] for name in SHARES}
    assert sum(map(len, files.values())) == len(list(generate(0))) == 203
    assert [f"{len(files[name])} rows" in line for name, line in zip(SHARES, lines, strict=True)] == [True] * 4
    for name, rows in files.items():
        assert len(rows) == pytest.approx(203 * SHARES[name], abs=7)
    firsts = [{row["prompt"][0]["content"] for row in rows} for rows in files.values()]
    assert sum(map(len, firsts)) == len(set.union(*firsts))
    assert any(len(row["prompt"]) == 3 for row in files["held_out"])
    with pytest.raises(UserError, match="3 different first turns"):
        split(files["gold"][:3], 0)


def test_accuracy_has_an_interval_and_the_training_pairs_choose_the_length_rule():
    ones, zeros = np.ones(100), np.zeros(100)
    proxy = Pairs(np.repeat([1.0, 0.0], [80, 20]), np.full(100, 0.5))
    gold = Pairs(np.repeat([1.0, 0.5], [90, 10]), np.full(100, 0.5))
    held_out = Pairs(np.repeat([3.0, 2.0, 1.0], [50, 20, 30]), np.full(100, 2.0))
    found = measure_accuracy(proxy, gold, Pairs(ones, zeros), held_out)
    assert (found.pairs, found.proxy.mean, found.gold.mean) == (100, 0.8, 0.9)
    assert 0.7 < found.proxy.low < 0.75
    assert 0.85 < found.proxy.high < 0.9
    assert (found.prefers, found.rule.mean) == ("longer", 0.6)
    assert found.above_rule.mean == pytest.approx(0.2)
    assert measure_accuracy(proxy, gold, Pairs(zeros, ones), held_out).rule.mean == pytest.approx(0.4)


def rewards(mean, seed):
    return mean + 0.3 * np.random.default_rng(seed).standard_normal(128)


def test_the_curve_stops_where_the_gold_reward_peaks_though_the_proxy_rises():
    means = {0: (0.0, 0.0), 4: (0.5, 0.6), 8: (1.0, 0.9), 12: (1.5, 0.5), 16: (2.0, -0.2)}
    curve = {step: Scores(rewards(proxy, step), rewards(gold, step + 1)) for step, (proxy, gold) in means.items()}
    stop = choose_stop(curve)
    assert (stop.step, stop.last, stop.overoptimized) == (8, 16, True)
    assert stop.win_rate.low > 0.9
    assert stop.last_win_rate.high < 0.5
    assert verdict(stop).startswith("stop at step 8: over-optimization from there to step 16")
    points = [point(step, scores, curve[0], 20.0, step or None) for step, scores in curve.items()]
    assert points[0].win_rate.mean == 0.5
    assert points[2].gold.mean == pytest.approx(0.9, abs=0.1)
    assert [line.split()[0] for line in table(points)] == ["step", "0", "4", "8", "12", "16"]


def test_a_last_step_that_is_best_is_the_stop():
    curve = {step: Scores(rewards(step / 4, step), rewards(step / 4, step + 1)) for step in (0, 4, 8)}
    assert verdict(choose_stop(curve)).startswith("stop at step 8, the last one")


def test_a_fall_within_its_interval_is_not_called_over_optimized():
    start = Scores(rewards(0.0, 0), rewards(0.0, 1))
    best = Scores(rewards(0.5, 2), rewards(0.6, 3))
    odd = np.resize([0.3, -0.34], 64)
    stop = choose_stop({0: start, 4: best, 8: Scores(rewards(1.5, 4), best.gold + np.stack([odd * 0 - 0.1, odd], 1).ravel())})
    assert (stop.gold_change.mean, stop.overoptimized) == (pytest.approx(-0.02), False)
    assert verdict(stop).startswith("stop at step 4: no over-optimization beyond the intervals")


def test_the_step_is_measured_on_prompts_that_did_not_choose_it():
    lucky = np.zeros(128)
    lucky[::2] = 1.0
    stop = choose_stop({0: Scores(np.zeros(128), np.zeros(128)), 4: Scores(np.zeros(128), lucky)})
    assert (stop.step, stop.win_rate.mean) == (4, 0.5)


def test_a_folder_without_a_chain_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"ppo/config\.yaml"):
        report(tmp_path)


@pytest.mark.nightly
def test_the_chain_ends_with_a_curve_on_whole_conversations(tmp_path, monkeypatch):
    make_rows(tmp_path / "data" / "preferences-tiny", None, 0, 0, 0)
    monkeypatch.chdir(tmp_path)
    run_chain(load_chain(ROOT / "examples" / "preferences" / "tiny.yaml"), tmp_path)
    folder = tmp_path / "runs" / "preferences-tiny"
    lines = report(folder)
    found = json.loads((folder / "curve.json").read_text())
    assert [one["step"] for one in found["curve"]] == [0, 2, 4, 6, 8]
    assert found["curve"][0]["win_rate"]["mean"] == 0.5
    assert found["accuracy"]["gold"]["mean"] > 0.6
    assert found["curve"][-1]["proxy"]["mean"] > found["curve"][0]["proxy"]["mean"]
    assert (folder / "curve.html").is_file()
    assert any(line.startswith(f"stop at step {found['stop']['step']}") for line in lines)
    # PPO's own rewards are those of the proxy on the whole conversations.
    rows = [json.loads(line) for line in Path("data/preferences-tiny/held_out.jsonl").read_text().splitlines()]
    answers = [one for one in read_samples(folder / "ppo" / "evaluation") if one["step"] == 8]
    model = {"path": str(folder / "proxy" / "export"), "dtype": "float32"}
    engine = RewardModelEngine(RewardModelSection.model_validate({"model": model, "normalize": True}))
    expected = engine.score([rows[one["prompt_id"]]["prompt"] for one in answers], [one["response"] for one in answers])
    np.testing.assert_allclose([one["reward/reward_model"] for one in answers], expected, atol=1e-4)
