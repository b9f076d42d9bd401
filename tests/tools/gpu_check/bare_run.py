"""A process as on a machine with torch, transformers, peft and a few wheels: runs steps on the CPU, and prints their results.

All other packages are hidden from imports. Arguments: names of the step functions.
"""

import json
import re
import sys
from importlib.machinery import PathFinder
from importlib.metadata import PackageNotFoundError, packages_distributions, requires

IMAGE = ("torch", "transformers", "peft", "numpy", "pip", "setuptools")
"""Packages that such a machine has, with all that they require."""
WHEELS = (
    "pydantic", "pydantic-core", "annotated-types", "typing-inspection", "deepspeed", "hjson", "einops", "msgpack", "xxhash",
)  # fmt: skip
"""Wheels for all steps without Ray, as in `tests/gpu/README.md`."""
RAY_WHEELS = (
    "ray", "protobuf", "requests", "urllib3", "certifi", "charset-normalizer", "idna", "datasets", "dill", "multiprocess",
    "jsonschema", "jsonschema-specifications", "referencing", "rpds-py", "attrs",
)  # fmt: skip
"""Further wheels for the step with Ray and without vLLM."""


def normalized(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def with_requirements(names):
    """The packages with all that they require, extras left out."""
    found, left = set(), list(names)
    while left:
        name = normalized(left.pop())
        if name in found:
            continue
        found.add(name)
        try:
            needs = requires(name) or []
        except PackageNotFoundError:
            continue
        left += [re.match(r"[\w.-]+", text)[0] for text in needs if "extra ==" not in text]
    return found


def hide(allowed):
    """Let no other package be found; returns the function that makes more of them visible."""
    shown = {normalized(name) for name in allowed}
    owners = {module: {normalized(name) for name in names} for module, names in packages_distributions().items()}

    class Finder(PathFinder):
        @classmethod
        def find_spec(cls, name, path=None, target=None):
            owned = owners.get(name.partition(".")[0], set()) - {"rayrlhf"}
            if owned and not owned & shown:
                return None
            return PathFinder.find_spec(name, path, target)

    sys.meta_path[sys.meta_path.index(PathFinder)] = Finder
    return shown.update


def main(names):
    show = hide(with_requirements(IMAGE) | {*WHEELS})
    import torch

    from rayrlhf.tools.gpu_check.check_runner import STEPS
    from rayrlhf.tools.gpu_check.step_result import Notes, measure

    results = []
    for step in (step for step in STEPS if step.function.partition(":")[2] in names):
        notes = Notes()
        measure(step.function, torch.device("cpu"), notes.add)
        results.append(notes.result(step.name, 0.0).as_dict() | {"obstacle": step.obstacle(1)})
    import rayrlhf.cli  # noqa: F401 - the command itself

    show(RAY_WHEELS)
    from rayrlhf.ppo.train_ppo import train_ppo  # noqa: F401 - the run of step 9

    print(json.dumps(results))


if __name__ == "__main__":
    main(sys.argv[1:])
