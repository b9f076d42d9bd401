"""Regenerate the manifests of this folder: `python cluster/generate.py`, from the repository root."""

from collections.abc import Iterator
from pathlib import Path

import yaml

from rayrlhf.config.launch import ClusterConfig
from rayrlhf.config.loading.load import load_config
from rayrlhf.config.ppo import PPOConfig
from rayrlhf.tools.launch.emit import emit_manifest

HERE = Path(__file__).parent


def manifests() -> Iterator[tuple[Path, str]]:
    """Yield path and text of every manifest in `manifests.yaml`."""
    root = HERE.parent
    for entry in yaml.safe_load((HERE / "manifests.yaml").read_text(encoding="utf-8")):
        overrides = entry.get("overrides", [])
        config = load_config(PPOConfig, root / entry["config"], overrides)
        cluster = load_config(ClusterConfig, root / entry["cluster"])
        text = emit_manifest(entry["emit"], config, cluster, Path(entry["config"]), overrides, entry["cluster"])
        yield HERE / entry["file"], text


if __name__ == "__main__":
    for path, content in manifests():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")
