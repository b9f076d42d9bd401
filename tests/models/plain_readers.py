"""Greedy answers of exported models by `rayrlhf chat`, plain transformers and plain vLLM, in a process of their own."""

import contextlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
SETTINGS = {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}
TOKENS = 8


def greedy_answers(folders, question):
    """The three answers of each folder."""
    command = [sys.executable, "-m", "tests.models.plain_readers", question, *map(str, folders)]
    environment = os.environ | SETTINGS | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def answers(folder, question):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    from rayrlhf.ppo.chat import chat_with

    turns = [{"role": "user", "content": question}]
    with contextlib.redirect_stdout(io.StringIO()) as said:
        chat_with(Path(folder), question, max_new_tokens=TOKENS, temperature=0.0)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model, report = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    found = model.generate(**ids, max_new_tokens=TOKENS, do_sample=False)[0, ids["input_ids"].shape[1] :]
    engine = LLM(folder, dtype="float32", max_model_len=128, enforce_eager=True)
    (out,) = engine.chat(turns, SamplingParams(temperature=0.0, max_tokens=TOKENS), use_tqdm=False)
    engine.llm_engine.engine_core.shutdown()
    cleanup_dist_env_and_memory()
    texts = (said.getvalue(), tokenizer.decode(found, skip_special_tokens=True), out.outputs[0].text)
    return [text.strip() for text in texts]


if __name__ == "__main__":
    print("\n" + json.dumps([answers(folder, sys.argv[1]) for folder in sys.argv[2:]]))
