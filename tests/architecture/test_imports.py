"""The import rules hold in the tree, and each is seen to fail on a planted line."""

import pytest

from tests.architecture import imports
from tests.architecture.source import Rule, Source, obey

RULES = [
    imports.import_order,
    imports.restricted_imports,
    imports.config_is_stdlib_only,
    imports.no_function_level_imports,
    imports.no_patching,
]

BAD = [
    (imports.import_order, "megatron_zj.engine.x", "from megatron_zj.roles.role import Role"),
    (imports.import_order, "megatron_zj.engine.x", "def f():\n    import megatron_zj.cli.main"),
    (imports.import_order, "megatron_zj.engine.x", "import importlib\nimportlib.import_module('megatron_zj.train')"),
    (imports.import_order, "megatron_zj.engine.x", "from ..roles import role"),
    (imports.import_order, "megatron_zj.engine.x", "from megatron_zj import train"),
    (imports.import_order, "kernels.gae.x", "from megatron_zj.config.model import ModelConfig"),
    (imports.import_order, "megatron_zj.config.x", "if typing.TYPE_CHECKING:\n    import megatron_zj.data"),
    (imports.import_order, "megatron_zj.__init__", "from megatron_zj.config import run"),
    (imports.import_order, "megatron_zj.data.x", "from megatron_zj.models.presets import PRESETS"),
    (imports.import_order, "megatron_zj.models.x", "from megatron_zj.data.packing import PackedBatch"),
    (imports.restricted_imports, "megatron_zj.roles.x", "from megatron.core import parallel_state"),
    (imports.restricted_imports, "megatron_zj.algorithms.x", "import torch.distributed as dist"),
    (imports.restricted_imports, "megatron_zj.models.x", "from torch import distributed"),
    (imports.restricted_imports, "megatron_zj.models.x", "import torch\ntorch.distributed.barrier()"),
    (imports.restricted_imports, "megatron_zj.data.x", "from transformers import AutoTokenizer"),
    (imports.restricted_imports, "megatron_zj.checkpoint.load", "import transformers"),
    (imports.restricted_imports, "megatron_zj.models.x", "import triton.language as tl"),
    (imports.restricted_imports, "megatron_zj.algorithms.x", "from megatron_zj.checkpoint.load import load"),
    (imports.restricted_imports, "megatron_zj.train.x", "from megatron_zj.algorithms import ppo"),
    (imports.restricted_imports, "kernels.gae.x", "import numpy as np"),
    (imports.config_is_stdlib_only, "megatron_zj.config.x", "import torch"),
    (imports.config_is_stdlib_only, "megatron_zj.config.x", "def f():\n    from omegaconf import OmegaConf"),
    (imports.no_function_level_imports, "megatron_zj.engine.x", "class A:\n    def f(self):\n        import json"),
    (imports.no_function_level_imports, "megatron_zj.engine.x", "def f():\n    from megatron.core import extensions"),
    (imports.no_patching, "megatron_zj.engine.x", "import torch\ntorch.cuda.current_device = lambda: 0"),
    (imports.no_patching, "megatron_zj.engine.x", "from megatron.core import parallel_state as ps\nps._GROUP = None"),
    (imports.no_patching, "megatron_zj.engine.x", "from megatron.core import Adam\nsetattr(Adam, 'step', None)"),
    (imports.no_patching, "megatron_zj.engine.x", "import torch.distributed as dist\ndel dist.barrier"),
]  # fmt: skip

GOOD = [
    (
        imports.import_order,
        "megatron_zj.train.x",
        "from megatron_zj.engine.objective import Metrics\nimport kernels.gae",
    ),
    (imports.import_order, "megatron_zj.cli.x", "from megatron_zj.cli.main import entry\nfrom . import build"),
    (
        imports.import_order,
        "megatron_zj.models.x",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from megatron_zj.data.packing import PackedBatch",
    ),
    (imports.restricted_imports, "megatron_zj.engine.x", "import torch.distributed\nfrom megatron.core import utils"),
    (imports.restricted_imports, "megatron_zj.checkpoint.hf", "from transformers import LlamaConfig"),
    (imports.restricted_imports, "kernels.gae.triton", "import triton\nimport torch"),
    (imports.restricted_imports, "megatron_zj.models.x", "import torch.nn as nn\nmegatron = 1"),
    (
        imports.config_is_stdlib_only,
        "megatron_zj.config.x",
        "import difflib\nfrom megatron_zj.config.run import RunConfig",
    ),
    (imports.no_function_level_imports, "megatron_zj.checkpoint.hf", "def f():\n    import transformers"),
    (imports.no_function_level_imports, "megatron_zj.models.x", "def f():\n    import transformer_engine.pytorch"),
    (imports.no_patching, "megatron_zj.engine.x", "import torch\ntorch.backends.cudnn.benchmark = False\nself.a = 1"),
    (imports.no_patching, "megatron_zj.engine.x", "from megatron_zj.config import run\nrun.x = 1"),
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_tree_obeys(rule: Rule) -> None:
    obey(rule)


@pytest.mark.parametrize(("rule", "module", "text"), BAD)
def test_a_planted_breach_is_found(rule: Rule, module: str, text: str) -> None:
    assert rule(Source(module, text))


@pytest.mark.parametrize(("rule", "module", "text"), GOOD)
def test_what_is_allowed_passes(rule: Rule, module: str, text: str) -> None:
    assert rule(Source(module, text)) == []


def test_every_rule_was_seen_to_fail() -> None:
    assert {rule for rule, _, _ in BAD} == set(RULES)


def test_nobody_imports_the_tools() -> None:
    def no_tools(source: Source) -> list[str]:
        """tools/ are for people."""
        return [source.at(item.node, name) for item in imports.imports(source) for name in item.names if _is_tool(name)]

    obey(no_tools)
    assert no_tools(Source("megatron_zj.cli.x", "from tools.run_demo import main"))


def _is_tool(name: str) -> bool:
    return name.split(".")[0] == "tools"
