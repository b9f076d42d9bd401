"""Early checks of a Pre-SFT run, and its plan in words for `--dry-run`."""

from collections.abc import Iterator

from rayrlhf.batch_inference.generation import check_generator
from rayrlhf.batch_inference.ingest import describe_examples
from rayrlhf.batch_inference.scoring import BleuScorer
from rayrlhf.config.pipelines import PreSFTConfig
from rayrlhf.config.reward import RewardSection


def check_presft(config: PreSFTConfig) -> None:
    """Load the small parts of later processes, so that errors show before they start.

    Raises:
        UserError: no BLEU tokenizer, an unusable reward function or rollout engine, or a model that cannot do its part.
    """
    from rayrlhf.engines.scoring.reward_model import check_reward_models
    from rayrlhf.models.start_check import check_configuration
    from rayrlhf.rewards.functions import load_functions

    BleuScorer(config.probe.tokenize)
    for section in (config.relabel.verifier, config.quality.verifier if config.quality else None):
        if section is not None:
            load_functions(section)
    if config.relabel.reward_model is not None:
        check_reward_models(config.relabel.reward_model)
    models = [config.model, *([config.probe.model] if config.probe.model else [])]
    for model in models if config.probe.likelihood or config.relabel.method == "likelihood" else ():
        check_configuration(model)
    samples = config.probe.response_field is None or config.quality is not None
    if samples:
        check_generator(config.generate, config.pipeline.address, models)


def describe_data(config: PreSFTConfig) -> Iterator[str]:
    """Read all rows, and yield counts, formats and columns of the datasets in words.

    Raises:
        UserError: see `describe_examples`.
    """
    yield describe_examples(config.data, given_field=config.probe.response_field, needs=needed_columns(config.relabel.verifier))
    if config.quality is not None:
        yield describe_examples(config.quality.data, needs=needed_columns(config.quality.verifier))


def needed_columns(verifier: RewardSection | None) -> dict[str, str]:
    """Return the columns that the functions of a verifier need."""
    from rayrlhf.rewards.functions import load_functions, required_columns

    return {} if verifier is None else required_columns(load_functions(verifier))


def describe(config: PreSFTConfig) -> str:
    """Return the plan, one fact per line."""
    return "\n".join(_lines(config))


def _lines(config: PreSFTConfig) -> Iterator[str]:
    probe, relabel, generate = config.probe, config.relabel, config.generate
    rounds = f"{config.run.rounds} rounds" if config.run.rounds > 1 else "1 round"
    yield f"run: {config.run.folder}, {rounds}, seed {config.run.seed}"
    yield f"dataset: {config.data.path}, {config.data.prompt_field} and {config.data.response_field}"
    if probe.response_field is not None:
        yield f"1. no probe: the responses are in the field {probe.response_field}"
    else:
        model = f"{probe.model.path}, tuned already" if probe.model else f"{config.model.path}, tuned on the dataset"
        how = "greedy" if probe.temperature == 0 else f"{probe.samples} samples at temperature {probe.temperature:g}"
        yield f"1. probe {model}: {how}, at most {generate.max_new_tokens} tokens, with {generate.backend}"
    likelihood = " and the likelihood of the original" if probe.likelihood else ""
    yield f"2. score by sentence BLEU, tokenizer {probe.tokenize}{likelihood}"
    rules = {
        "gap": "below the gap in the histogram",
        "threshold": f"of BLEU below {config.select.value or 0:g}",
        "quantile": f"among the lowest {config.select.value or 0:.1%}",
    }
    yield f"3. select pairs {rules[config.select.rule]}"
    if not config.relabels:
        yield f"4. {relabel.struggling} them"
    elif config.reuses_probe:
        yield f"4. {relabel.struggling} their responses by the probe's own: no more samples"
    else:
        count = "one greedy response" if relabel.method == "greedy" else f"the best of {relabel.samples} by {relabel.method}"
        yield f"4. {relabel.struggling} their responses by {count}; pairs that the guard rejects: {relabel.guarded}"
    yield f"5. tune {config.model.path} from the start on the repaired dataset"
    if config.quality is not None:
        yield f"quality: held-out rows of {config.quality.data.path}, after every tuning"
