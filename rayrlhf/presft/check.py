"""What can be known to be wrong before a dataset is read or a process started."""

import importlib.util

from rayrlhf.config.presft import PreSFTConfig
from rayrlhf.errors import UserError
from rayrlhf.presft.bleu import BleuScorer


def check_presft(config: PreSFTConfig) -> None:
    """Load what is small and used later in other processes, where a mistake would cost a start.

    Raises:
        UserError: a BLEU tokenizer that cannot be had, a reward function that cannot be loaded, or no vLLM.
    """
    from rayrlhf.rewards.functions import load_functions

    BleuScorer(config.probe.tokenize)
    for section in (config.relabel.verifier, config.quality.verifier if config.quality else None):
        if section is not None:
            load_functions(section)
    samples = config.probe.response_field is None or config.quality is not None
    if samples and config.generate.backend == "vllm" and importlib.util.find_spec("vllm") is None:
        raise UserError(
            "generate.backend: vllm is not installed; expected `pip install 'rayrlhf[cpu]'` or `'rayrlhf[gpu]'`, "
            "or generate.backend=transformers"
        )
