"""Checkpoints: complete or absent, readable under any layout, and from and to Hugging Face folders."""

# The CPU port must be in place before megatron-core is imported.
import megatron_zj.parallel  # noqa: F401
