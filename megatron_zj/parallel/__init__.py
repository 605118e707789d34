"""Ranks, grids and process groups.  Importing this package makes megatron-core importable without CUDA."""

import warnings

from megatron_zj.parallel import accelerators, cpu_port

accelerators.refuse_foreign_apex()
if cpu_port.needed():
    accelerators.hide_transformer_engine()
cpu_port.install()
# Both are optional; six modules of megatron-core each say at import that they are not there, on every rank.
warnings.filterwarnings("ignore", message=r"(Transformer Engine and Apex are|Apex is) not installed")
