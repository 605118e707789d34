"""Importing ``parallel`` first makes ``megatron.core`` importable where there is no CUDA device."""

import megatron_zj.parallel  # noqa: F401
