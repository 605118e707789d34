"""Text and records in, batches of token rows out.

Importing ``parallel`` first is what makes ``megatron.core`` importable where there is no CUDA device.
"""

import megatron_zj.parallel  # noqa: F401
