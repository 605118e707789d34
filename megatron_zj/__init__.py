"""From a Chinese LLaMA to a medical assistant: pre-training, SFT, reward model and PPO on Megatron parallelism."""

from __future__ import annotations

from importlib import metadata


def refuse_foreign_kernels() -> None:
    """Raise ImportError where Hugging Face's package ``kernels`` is installed: it has the import name of our own.

    Whichever stands first on the path would win, for us and for ``transformers``, with an error far from the cause.
    """
    try:
        version = metadata.version("kernels")
    except metadata.PackageNotFoundError:
        return
    raise ImportError(
        f"the Hugging Face package 'kernels' ({version}) is installed in this environment and has the same import name "
        "as the kernels of megatron-zj. Remove it (pip uninstall kernels) or use an environment of its own"
    )


refuse_foreign_kernels()
