"""One model on one placement, on megatron-core, which the next line makes importable without CUDA."""

import megatron_zj.parallel  # noqa: F401
