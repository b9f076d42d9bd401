"""Chains of the examples with another seed."""

from pathlib import Path

import yaml

from rayrlhf.config.pipelines import ChainConfig


def seeded_chain(file: Path, seed: int, root: Path, *built_ins: str) -> ChainConfig:
    """Return an example's chain with other start weights, rows and draws.

    Args:
        file: of the chain; its folder names the run.
        seed: of each stage and of the built-in models and datasets.
        root: folder of the run.
        built_ins: texts with a `?`, after which the seed is written.
    """
    text = file.read_text()
    for built_in in built_ins:
        assert built_in in text
        text = text.replace(built_in, built_in.replace("?", f"?seed={seed}&"))
    tree = yaml.safe_load(text)
    tree["run"] = {"name": f"{file.parent.name}-{seed}", "root": str(root)}
    for stage in tree["stages"]:
        stage["settings"]["run"] = stage["settings"].get("run", {}) | {"seed": seed}
    return ChainConfig.model_validate(tree)
