"""Every way of choosing a new response, on a real model where one is needed, without Ray."""

import json

import pyarrow as pa
import pytest

from rayrlhf.batch_inference.generation import BatchGenerator, GenerationPlan, Response
from rayrlhf.config.batch_inference import GenerateSection, PairsSection
from rayrlhf.config.model import ModelSection
from rayrlhf.config.pipelines import ProbeSection, RelabelSection
from rayrlhf.config.reward import RewardFunctionSection, RewardSection
from rayrlhf.pipelines.presft.probing import LikelihoodEngine, schemas
from rayrlhf.pipelines.presft.relabeling import PairDecider, ProbesAsCandidates, with_candidates
from rayrlhf.pipelines.presft.selection import Cut
from tests.pipelines.presft.runs import MODEL

DATA = PairsSection(path="pairs", chat=False)
VERIFIER = RewardSection(functions=[RewardFunctionSection(name="tests.pipelines.presft.runs:digit_share")])
CANDIDATES = [
    Response("a b c d", "stop", 4),
    Response("1 2 3 4", "stop", 4),
    Response("a b c e", "stop", 4),
    Response("a b c d", "length", 9),
]


def plan(**changes):
    generate = GenerateSection(backend="transformers", max_new_tokens=6, max_concurrent=4)
    model = ModelSection(path=MODEL, dtype="float32")
    fields = {"label": "tuned", "model": model, "generate": generate, "data": DATA, "seed": 0, "step": 2}
    return GenerationPlan(**(fields | {"samples": 2, "temperature": 1.0} | changes))


def pair(row, bleu):
    values = dict.fromkeys(schemas()["scores"].names) | {"row": row, "source": row + 1, "prompt": f"p{row}", "columns": "{}"}
    probes = {"probes": [f"probe {row}"], "probe_finish": ["stop"], "probe_tokens": [3], "probe_bleu": [bleu], "bleu": bleu}
    return values | {"response": f"original {row}", "model": "tuned", "sampling": "{}"} | probes


def scored(*bleu):
    return pa.Table.from_pylist([pair(row, score) for row, score in enumerate(bleu)], schema=schemas()["scores"])


def judged(relabel, candidates, **settings):
    table = with_candidates(scored(10.0, 90.0), {0: candidates})
    return PairDecider(relabel, ProbeSection(), DATA, settings.get("plan"), Cut(50.0))(table).to_pylist()


@pytest.mark.parametrize(
    ("settings", "chosen"),
    [
        ({"method": "mbr", "samples": 4}, "a b c d"),
        ({"method": "verifier", "samples": 4, "verifier": VERIFIER, "verifier_minimum": 0.0}, "1 2 3 4"),
        ({"method": "greedy"}, "a b c d"),
    ],
    ids=lambda value: value["method"] if isinstance(value, dict) else value,
)
def test_the_method_chooses_among_what_the_guard_allows(settings, chosen):
    struggling, learned = judged(RelabelSection(**settings), CANDIDATES)
    assert struggling["new_response"] == chosen
    assert (struggling["decision"], struggling["struggling"]) == ("replace", True)
    assert struggling["refusals"] == ["", "", "", "cut off"]
    assert struggling["new_tokens"] == 21
    assert struggling["response"] == "original 0"
    assert (learned["decision"], learned["candidates"], learned["new_response"]) == ("keep", [], None)


def test_a_verifier_also_guards_what_another_method_chose():
    struggling, _ = judged(RelabelSection(method="mbr", samples=4, verifier=VERIFIER), CANDIDATES)
    assert struggling["new_response"] == "1 2 3 4"
    assert struggling["refusals"] == ["fails the verifier", "", "fails the verifier", "cut off"]


def test_likelihood_chooses_what_the_model_itself_finds_likely():
    engine = LikelihoodEngine(plan(), DATA)
    texts = [response.text for response in CANDIDATES[:3]]
    rows = [pair(0, 10.0)] * 3
    expected = engine.mean_logprobs(rows, texts)
    struggling, _ = judged(RelabelSection(method="likelihood", samples=3), CANDIDATES[:3], plan=plan())
    assert struggling["candidate_scores"] == pytest.approx(expected, abs=1e-6)
    assert struggling["new_response"] == texts[expected.index(max(expected))]
    assert struggling["relabel_model"] == "tuned"
    assert json.loads(struggling["relabel_sampling"])["temperature"] == 1.0


def test_the_probe_serves_as_the_new_response_at_no_cost():
    table = ProbesAsCandidates(Cut(50.0))(scored(10.0, 90.0))
    struggling, learned = PairDecider(RelabelSection(), ProbeSection(), DATA, None, Cut(50.0))(table).to_pylist()
    assert (struggling["new_response"], struggling["new_tokens"]) == ("probe 0", 0)
    assert struggling["relabel_model"] == "tuned"
    assert learned["new_response"] is None


def test_a_sampler_answers_the_same_rows_alike_whatever_it_answered_before():
    sampler = BatchGenerator(plan())
    rows = [pair(row, 0.0) for row in range(5)]
    first = sampler.generate(rows)
    sampler.generate([pair(row, 0.0) for row in range(7, 9)])
    assert sampler.generate(rows) == first
    assert len({response.text for group in first for response in group}) > 5
    assert all(1 <= response.tokens <= 6 for group in first for response in group)
    assert sampler.generate([]) == []


def test_greedy_answers_do_not_depend_on_the_seed():
    rows = [pair(row, 0.0) for row in range(3)]
    one, other = (BatchGenerator(plan(samples=1, temperature=0.0, seed=seed)).generate(rows) for seed in (0, 1))
    assert one == other
