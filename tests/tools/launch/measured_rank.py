"""A process that is one rank of a policy: takes real optimizer steps and says what memory it took, on standard output.

Arguments: hidden size, layers, tokens of a micro-batch, dtype. Its peak is the largest resident size between two looks, a few
milliseconds apart, of everything that the process holds: weights, state, activations, and itself.
"""

import json
import sys
import threading
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

TOKENS_A_SAMPLE = 128
STEPS = 2


def resident():
    """Bytes of this process by kind: private memory, and pages of files (libraries)."""
    sizes = {}
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(("RssAnon", "RssFile")):
            sizes[line.split(":")[0]] = int(line.split()[1]) * 1024
    return sizes["RssAnon"], sizes["RssFile"]


class Peak:
    """The largest private memory while its block runs."""

    def __enter__(self):
        self.anonymous, self._stop = 0, threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exception):
        self._stop.set()
        self._thread.join()

    def _run(self):
        while not self._stop.wait(0.002):
            self.anonymous = max(self.anonymous, resident()[0])


def llama(hidden, layers):
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=4096,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 128,
        head_dim=64,
        max_position_embeddings=256,
        tie_word_embeddings=True,
    )


def samples(tokens):
    """A PPO batch of that many tokens: prompts of 8, all samples of one length."""
    from rayrlhf.data.records import TokenSequence
    from rayrlhf.data.training_batch import TrainingBatch

    count, responses = tokens // TOKENS_A_SAMPLE, TOKENS_A_SAMPLE - 8
    generator = np.random.default_rng(0)
    ids = generator.integers(0, 4096, (count, TOKENS_A_SAMPLE)).astype(np.int32)
    arrays = {
        "action_mask": np.ones((count, responses), dtype=bool),
        "old_logprobs": np.full((count, responses), -8.3, dtype=np.float32),
        "advantages": generator.normal(size=(count, responses)).astype(np.float32),
    }
    return TrainingBatch([TokenSequence(row, 8) for row in ids], arrays)


def main(hidden, layers, tokens, dtype):
    import torch
    from transformers import LlamaForCausalLM

    from rayrlhf.config.model import ModelSection
    from rayrlhf.config.policy_loss import PPOLossSection
    from rayrlhf.config.train import TrainSection
    from rayrlhf.engines.objectives.policy import PolicyObjective
    from rayrlhf.engines.train.engine import TrainEngine
    from rayrlhf.engines.train.plan import UpdatePlan
    from rayrlhf.engines.train.spec import TrainEngineSpec
    from tests.engines.training import join_alone

    torch.set_num_threads(1)
    join_alone()
    with TemporaryDirectory() as folder:
        LlamaForCausalLM(llama(hidden, layers)).save_pretrained(folder)
        train = TrainSection(micro_batch_tokens=tokens)
        spec = TrainEngineSpec(ModelSection(path=folder, dtype=dtype), frozenset({"lm"}), train, learning_rate=1e-4)
        before = resident()
        with Peak() as peak:
            engine = TrainEngine(spec)
            batch = samples(tokens)
            for _ in range(STEPS):
                engine.update(batch, UpdatePlan([[list(range(len(batch)))]]), PolicyObjective(PPOLossSection()))
    print(json.dumps({"before": before, "after": resident(), "peak": peak.anonymous}))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
