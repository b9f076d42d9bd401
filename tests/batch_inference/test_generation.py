"""Batch generation with a rollout engine from outside the package."""

import pytest
from pydantic import ValidationError

from rayrlhf.batch_inference.generation import BatchGenerator, GenerationPlan, check_generator
from rayrlhf.config.batch_inference import GenerateSection, PairsSection
from rayrlhf.config.model import ModelSection
from rayrlhf.errors import UserError

ENGINE = """
from rayrlhf.engines.rollout.hf import TransformersRolloutEngine

class Short(TransformersRolloutEngine):
    def __init__(self, spec, *, tokens):
        super().__init__(spec)
        self.tokens = tokens

    def submit(self, requests, *, temperature, max_new_tokens):
        super().submit(requests, temperature=temperature, max_new_tokens=self.tokens)
"""


def test_a_part_is_generated_by_an_engine_in_a_file(tmp_path):
    file = tmp_path / "engine.py"
    file.write_text(ENGINE)
    generate = GenerateSection(backend=f"{file}:Short", arguments={"tokens": 3}, max_new_tokens=24, max_model_length=64)
    check_generator(generate)
    plan = GenerationPlan("tiny", ModelSection(path="builtin:tiny"), generate, PairsSection(path="none"), 0, 0, 2, 1.0)
    rows = [{"row": row, "prompt": "One and one?", "messages": None, "source": row} for row in range(2)]
    responses = BatchGenerator(plan).generate(rows)
    assert [len(group) for group in responses] == [2, 2]
    assert max(response.tokens for group in responses for response in group) == 3


@pytest.mark.nightly
def test_a_generator_over_two_workers_responds_as_plain_transformers_does(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    model = ModelSection(path="builtin:tiny?layers=2&hidden=128&context=64", dtype="float32")
    rows = [{"row": row, "prompt": f"Say {row}", "messages": None, "source": row} for row in range(4)]
    texts = []
    for settings in ({"tensor_parallel_size": 2, "memory_gib": 0.0625}, {"backend": "transformers"}):
        generate = GenerateSection(max_new_tokens=16, max_model_length=64, max_concurrent=8, **settings)
        check_generator(generate)
        plan = GenerationPlan("tiny", model, generate, PairsSection(path="none", chat=False), 0, 0, 1, 0.0)
        generator = BatchGenerator(plan)
        texts.append([response.text for (response,) in generator.generate(rows)])
        generator._engine.close()
    assert texts[0] == texts[1]


def test_a_wrong_engine_is_refused_with_its_key():
    with pytest.raises(ValidationError, match=r"'transfomers' is no rollout engine; did you mean 'transformers'\?"):
        GenerateSection(backend="transfomers")
    with pytest.raises(UserError, match=r"^generate.backend 'nowhere.at_all:Engine': 'nowhere.at_all' cannot be imported"):
        check_generator(GenerateSection(backend="nowhere.at_all:Engine"))
    with pytest.raises(UserError, match="takes no argument 'tokens'; expected none"):
        check_generator(GenerateSection(backend="transformers", arguments={"tokens": 3}))
