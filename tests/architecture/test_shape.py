"""The rules of size, names and state hold in the tree, and each is seen to fail on planted text."""

import pytest

from tests.architecture import shape
from tests.architecture.source import Rule, Source, obey

EVERYWHERE = ("megatron_zj", "kernels", "tests", "tools")
RULES: dict[Rule, tuple[str, ...]] = {  # rule -> where it holds; () is the two packages
    shape.file_size: EVERYWHERE,
    shape.function_size: EVERYWHERE,
    shape.names: (),
    shape.no_print: (),
    shape.environment: (),
    shape.no_module_state: (),
    shape.group_timeouts: (*EVERYWHERE,),
    shape.no_code_from_files: ("megatron_zj", "kernels", "tools"),  # tests plant what is refused
    shape.one_loop: (),
    shape.todo_with_reason: ("megatron_zj", "kernels", "tools"),
}
_X = "megatron_zj.engine.x"

BAD = [
    (shape.file_size, _X, "x = 1\n" * 401),
    (shape.file_size, "kernels.gae.triton", "x = 1\n" * 801),
    (shape.function_size, _X, "class A:\n    def f(self):\n" + "        x = 1\n" * 60),
    (shape.function_size, "kernels.gae.triton", "def f():\n" + "    x = 1\n" * 150),
    (shape.names, "megatron_zj.engine.utils", ""),
    (shape.names, "megatron_zj.common.rows", ""),
    (shape.names, _X, "class CheckpointManager: ..."),
    (shape.names, _X, "class TrainerBase: ..."),
    (shape.no_print, _X, "def f():\n    print('x')"),
    (shape.environment, _X, "import os\nx = os.environ['RANK']"),
    (shape.environment, _X, "import os\nx = os.getenv('RANK')"),
    (shape.environment, _X, "from os import environ"),
    (shape.no_module_state, _X, "def f():\n    global x\n    x = 1"),
    (shape.no_module_state, _X, "SEEN = {}\ndef f(x):\n    SEEN[x] = 1"),
    (shape.no_module_state, _X, "SEEN: list[int] = []\ndef f(x):\n    SEEN.append(x)"),
    (shape.no_module_state, _X, "_STATE = State()\ndef f():\n    _STATE.step += 1"),
    (shape.no_module_state, _X, "cache = {}"),
    (shape.no_module_state, _X, "import collections\ncache = collections.defaultdict(list)"),
    (shape.group_timeouts, _X, "g = dist.new_group([0, 1])"),
    (shape.group_timeouts, _X, "torch.distributed.init_process_group('gloo')"),
    (shape.no_code_from_files, _X, "import pickle\npickle.loads(data)"),
    (shape.no_code_from_files, _X, "from pickle import Unpickler"),
    (shape.no_code_from_files, _X, "from cloudpickle import loads"),
    (shape.no_code_from_files, _X, "torch.load(path)"),
    (shape.no_code_from_files, _X, "torch.load(path, weights_only=False)"),
    (shape.no_code_from_files, _X, "eval(text)"),
    (shape.no_code_from_files, _X, "yaml.load(text)"),
    (shape.no_code_from_files, _X, "np.load(path, allow_pickle=True)"),
    (shape.one_loop, "megatron_zj.cli.train", "for _ in range(9):\n    algorithm.step()"),
    (shape.one_loop, "megatron_zj.cli.train", "self._algorithm.step()"),
    (shape.todo_with_reason, _X, "x = 1  # TO" + "DO later"),
    (shape.todo_with_reason, _X, "# FIX" + "ME"),
]

GOOD = [
    (shape.file_size, "kernels.gae.triton", "x = 1\n" * 800),
    (shape.function_size, _X, "def f():\n" + "    x = 1\n" * 59),
    (shape.names, _X, "class DataBaseline: ...\nclass Managed: ..."),
    (shape.environment, "megatron_zj.runtime.distributed", "import os\nx = os.environ['RANK']"),
    (shape.environment, _X, "import os\nos.replace(a, b)"),
    (shape.no_module_state, _X, "NAMES = {'a': 1}\ndef f(x):\n    return NAMES[x]"),
    (shape.no_module_state, _X, "SEEN = {}\ndef f(SEEN):\n    SEEN[1] = 1"),
    (shape.no_module_state, "megatron_zj.algorithms.registry", "_BUILDERS = {}\ndef f(x):\n    _BUILDERS[x] = 1"),
    (shape.group_timeouts, _X, "g = dist.new_group([0, 1], timeout=timeout)"),
    (shape.no_code_from_files, _X, "import pickle\ntry: ...\nexcept pickle.UnpicklingError: ..."),
    (shape.no_code_from_files, _X, "model.eval()\ntorch.load(path, weights_only=True)\nyaml.safe_load(text)"),
    (shape.one_loop, "megatron_zj.train.loop", "algorithm.step()"),
    (shape.one_loop, _X, "optimizer.step()\nprofiler.step(3)"),
    (shape.todo_with_reason, _X, "# TO" + "DO: shard the table too, megatron-core 0.17 will let us"),
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_tree_obeys(rule: Rule) -> None:
    obey(rule, *RULES[rule])


@pytest.mark.parametrize(("rule", "module", "text"), BAD)
def test_a_planted_breach_is_found(rule: Rule, module: str, text: str) -> None:
    assert rule(Source(module, text))


@pytest.mark.parametrize(("rule", "module", "text"), GOOD)
def test_what_is_allowed_passes(rule: Rule, module: str, text: str) -> None:
    assert rule(Source(module, text)) == []


def test_every_rule_was_seen_to_fail() -> None:
    assert {rule for rule, _, _ in BAD} == set(RULES)
