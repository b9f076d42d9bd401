"""Generative judge on a rollout engine: label log-probs or completions become rewards.

Completions are seeded by question and vote, so verdicts are cached, and a lost call can be repeated on any replica.
Rounding in another batch may still change a token.
"""

import hashlib
import logging
import math
from collections.abc import Sequence
from typing import cast

import numpy as np

from rayrlhf.config.judge import LETTERS, JudgeSection
from rayrlhf.data.records import Float32, Int32, RolloutRequest, SampleKey
from rayrlhf.data.templates import render
from rayrlhf.engines.rollout.base import LabelEngine
from rayrlhf.engines.rollout.common import RolloutSpec, context_length
from rayrlhf.engines.rollout.factory import build_rollout_engine, check_rollout_backend
from rayrlhf.errors import UserError
from rayrlhf.library_types import Tokenizer
from rayrlhf.models.load import load_architecture, load_tokenizer
from rayrlhf.models.start_check import check_generating_model
from rayrlhf.observe.cuda import check_vllm_device
from rayrlhf.rewards.cache import MAX_VALUES
from rayrlhf.rewards.functions import ScoringBatch
from rayrlhf.rewards.judgments import (
    REFERENCE,
    SILENT,
    Question,
    Verdict,
    combine,
    label_texts,
    label_verdict,
    made_up_batch,
    questions,
    text_verdict,
)

_logger = logging.getLogger(__name__)


class JudgeEngine:
    """Scores responses by the verdicts of one model.

    Args:
        section: the judge.
        seed: of completions.
        engine: a started engine; None starts the configured one.
    """

    def __init__(self, section: JudgeSection, seed: int, engine: LabelEngine | None = None) -> None:
        """Load tokenizer and model.

        Raises:
            UserError: see `check_judge`; or the model cannot be served.
        """
        self._section = section
        self._seed = seed
        self._tokenizer = load_tokenizer(section.model)
        self._labels = check_labels(section, self._tokenizer)
        self._longest = _longest_question(section)
        self._known: dict[bytes, Verdict] = {}
        self._said = ""
        spec = RolloutSpec(section.model, section.engine, seed, logprobs=False, section="reward.judge")
        self._engine = engine or cast("LabelEngine", build_rollout_engine(spec))

    def parts(self, batch: ScoringBatch, groups: Sequence[int]) -> dict[str, Float32]:
        """Return the parts of the reward, see `combine`.

        A question beyond the context is not asked and has no value; a warning counts them.

        Args:
            groups: [B], equal for responses to one prompt.

        Raises:
            UserError: a group has no two responses, or no new question about at least `SILENT` responses has a score.
        """
        asked = questions(self._section, batch, groups)
        return combine(self._section, asked, self._verdicts(asked, SILENT), len(batch))

    def try_out(self) -> None:
        """Judge two made-up responses.

        Raises:
            UserError: neither gets a score.
        """
        batch = made_up_batch(self._section)
        self._verdicts(questions(self._section, batch, [0] * len(batch)), 1)

    def close(self) -> None:
        """Free the engine."""
        self._engine.close()

    def _verdicts(self, asked: Sequence[Question], silent: int) -> list[Verdict]:
        """Return a verdict for each question; equal ones are asked once."""
        keys = [_key(question) for question in asked]
        new = {key: question for key, question in zip(keys, asked, strict=True) if key not in self._known}
        answers = dict(zip(new, self._answers(list(new.values())), strict=True))
        said = [(question, answer) for question, answer in zip(new.values(), answers.values(), strict=True) if answer.asked]
        heard = {subject for question, _ in said for subject in question.subjects if subject != REFERENCE}
        if len(heard) >= silent and all(math.isnan(value) for _, answer in said for value in answer.values):
            raise UserError(self._silence([answer for _, answer in said]))
        verdicts = []
        for key in keys:
            verdict = answers.pop(key, None)
            if verdict is None:
                verdict = self._known.pop(key)._replace(cached=True)
            self._known[key] = verdict  # used ones move to the end
            verdicts.append(verdict)
        while len(self._known) > MAX_VALUES:
            del self._known[next(iter(self._known))]
        return verdicts

    def _answers(self, asked: Sequence[Question]) -> list[Verdict]:
        """Return a verdict for each question; those beyond the context are not asked."""
        prompts = [np.asarray(_encode(self._section, self._tokenizer, one.text), dtype=np.int32) for one in asked]
        fitting = [index for index, prompt in enumerate(prompts) if len(prompt) <= self._longest]
        if len(fitting) < len(asked):
            _logger.warning(
                "reward.judge: %d of %d questions have no score, because they have more than %d tokens "
                "(reward.judge.max_model_length, or the model's context)",
                len(asked) - len(fitting),
                len(asked),
                self._longest,
            )
        answers = self._ask([asked[index] for index in fitting], [prompts[index] for index in fitting])
        verdicts = [Verdict((math.nan,) * len(one.subjects), math.nan, asked=False) for one in asked]
        for index, answer in zip(fitting, answers, strict=True):
            verdicts[index] = answer
        return verdicts

    def _ask(self, asked: Sequence[Question], prompts: Sequence[Int32]) -> list[Verdict]:
        """Return the verdicts of the model."""
        section = self._section
        if not asked:
            return []
        if section.score == "logprobs":
            tokens = self._labels[: max(len(label_texts(section, len(question.subjects))) for question in asked)]
            rows = self._engine.next_logprobs(prompts, tokens)
            return [
                label_verdict(section, question, row[: len(label_texts(section, len(question.subjects)))])
                for question, row in zip(asked, rows, strict=True)
            ]
        requests = [
            RolloutRequest(SampleKey(0, index, 0), prompt, _seed(self._seed, question))
            for index, (prompt, question) in enumerate(zip(prompts, asked, strict=True))
        ]
        self._engine.submit(requests, temperature=section.temperature, max_new_tokens=section.max_new_tokens)
        texts: dict[int, str] = {}
        while len(texts) < len(requests):
            texts |= {rollout.key.prompt: rollout.text for rollout in self._engine.poll(len(requests) - len(texts))}
        self._said = texts[len(requests) - 1]
        return [text_verdict(section, question, texts[index]) for index, question in enumerate(asked)]

    def _silence(self, answers: Sequence[Verdict]) -> str:
        """Return the reason why no question has a score, in one line."""
        section, count = self._section, len(answers)
        if section.score == "text":
            return (
                f"reward.judge: no score in {count} completions of {section.model.path}; expected a match of "
                f"reward.judge.verdict in each, the last one ends with {self._said[-60:]!r}"
            )
        mass = max(answer.mass for answer in answers)
        return (
            f"reward.judge: no score for {count} questions to {section.model.path}: the labels have a probability of at most "
            f"{mass:.2g} together, expected {section.min_mass:g} (reward.judge.min_mass), and a template that asks for one"
        )


def check_judge(section: JudgeSection | None) -> None:
    """Check backend, model files, chat template and labels before anything starts.

    Raises:
        UserError: the backend is not installed, files are not whole, the context is longer than the model's, the chat template
            refuses a question or leaves no room for one, or a label is not one token.
    """
    if section is None:
        return
    check_rollout_backend(section.engine, "reward.judge.backend")
    if section.backend == "vllm":
        check_vllm_device("reward.judge.backend")
    check_generating_model(section.model, section.backend, section.tensor_parallel_size, "reward.judge")
    check_labels(section, load_tokenizer(section.model))


def check_labels(section: JudgeSection, tokenizer: Tokenizer) -> list[int]:
    """Return the tokens of all labels right after a question; none with `score: text`.

    Raises:
        UserError: a label is several tokens, or the token of another one; or a question about short responses is beyond the
            context.
    """
    batch = made_up_batch(section)
    texts = [question.text for question in questions(section, batch, [0] * len(batch))]
    text, before, longest = texts[0], _encode(section, tokenizer, texts[0]), _longest_question(section)
    tokens = max(len(_encode(section, tokenizer, one)) for one in texts)
    if tokens > longest:
        raise UserError(
            f"reward.judge: a question about short responses has {tokens} tokens, expected at most {longest} "
            "(reward.judge.max_model_length, or the model's context); raise it, or shorten reward.judge.template"
        )
    found: dict[int, str] = {}
    for label in label_texts(section, 2 if section.mode == "pairwise" else len(LETTERS)) if section.score == "logprobs" else ():
        ids = _encode(section, tokenizer, text, label)
        if len(ids) != len(before) + 1 or ids[:-1] != before:
            raise UserError(
                f"reward.judge.labels: {label!r} is not one token of the tokenizer of {section.model.path} after the question, "
                f"but {tokenizer.convert_ids_to_tokens(ids[len(before) :])}; expected labels of one token, such as digits"
            )
        if ids[-1] in found:
            raise UserError(f"reward.judge.labels: {label!r} and {found[ids[-1]]!r} are the same token of {section.model.path}")
        found[ids[-1]] = label
    return list(found)


def _encode(section: JudgeSection, tokenizer: Tokenizer, text: str, label: str = "") -> list[int]:
    """Return the tokens of a question as the judge reads it, then a label's."""
    if not tokenizer.chat_template:
        return list(tokenizer(text + label)["input_ids"])
    options = [section.chat_arguments] if section.chat_arguments else None
    rendered = render(tokenizer, [[{"role": "user", "content": text}]], ["reward.judge"], options=options)[0]
    return list(tokenizer(rendered + label, add_special_tokens=False)["input_ids"])


def _longest_question(section: JudgeSection) -> int:
    """Return the most tokens of a question."""
    context, new = (
        context_length(section.engine, load_architecture(section.model), "reward.judge"),
        section.engine.max_new_tokens,
    )
    if new >= context:
        raise UserError(
            f"reward.judge.max_new_tokens {new} leaves no room for a question: {section.model.path} has a context of {context} "
            f"tokens; expected less than that, or reward.judge.score 'logprobs', which needs one"
        )
    return context - new


def _key(question: Question) -> bytes:
    return hashlib.blake2b(f"{question.vote} {question.text}".encode(errors="surrogatepass"), digest_size=16).digest()


def _seed(seed: int, question: Question) -> int:
    """Return the seed of a completion in [0, 2**63), by question and vote alone."""
    return int.from_bytes(hashlib.blake2b(_key(question), digest_size=8, key=str(seed).encode()).digest(), "little") >> 1
