"""Refuse an image whose parts are not what its labels say.

`python check_build.py VARIANT NAME=VERSION ...`, inside the build.
"""

import sys
from importlib import import_module, metadata


def problems(variant: str, wanted: dict[str, str]) -> list[str]:
    """Say what is not as it should be in this environment."""
    found = [
        f"{name} is {metadata.version(name)}, its label would say {version}"
        for name, version in wanted.items()
        if metadata.version(name) != version
    ]
    for module in ("anycontrast.cli", "anycontrast_datasets", "anycontrast_kernels", "ray.train"):
        import_module(module)
    import torch

    is_cuda = torch.version.cuda is not None
    if is_cuda != (variant == "cuda"):
        found.append(f"torch {torch.__version__} in a {variant} image; choose it with PIP_ARGS")
    operations = {"cpu": ["cpu_adam"], "cuda": ["cpu_adam", "fused_adam"]}[variant]
    built = import_module("deepspeed.git_version_info").installed_ops
    found += [f"DeepSpeed's {name} is not built in" for name in operations if not built.get(name)]
    if variant == "cuda":
        try:
            import_module("flash_attn")
        except ImportError as error:
            found.append(f"flash-attn does not import: {error}")
    return found


if __name__ == "__main__":
    lines = problems(sys.argv[1], dict(word.split("=", 1) for word in sys.argv[2:]))
    sys.exit("\n".join(lines) or None)
