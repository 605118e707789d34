"""The rules of documentation hold in the tree, and each is seen to fail on planted text."""

import pytest

from tests.architecture import documentation
from tests.architecture.source import PACKAGES, Rule, Source, obey, sources

_C = "megatron_zj.config.x"
_FROZEN = "@dataclass(frozen=True, kw_only=True)\nclass AConfig:\n"

BAD = [
    (documentation.public_docstrings, "megatron_zj.engine.x", "x = 1"),
    (documentation.public_docstrings, "megatron_zj.engine.x", '"""M."""\ndef f(): ...'),
    (documentation.public_docstrings, "megatron_zj.engine.x", '"""M."""\nclass A:\n    x = 1'),
    (documentation.public_docstrings, "megatron_zj.engine.x", '"""M."""\nclass A:\n    """A."""\n    def f(self): ...'),
    (documentation.config_classes, _C, "@dataclass(frozen=True)\nclass AConfig:\n    x: int  # ranks"),
    (documentation.config_classes, _C, "@dataclass\nclass AConfig:\n    x: int  # ranks"),
    (documentation.config_classes, _C, _FROZEN + "    x: int = 1"),
    (documentation.config_classes, _C, _FROZEN + "    # of y alone\n    y: int = 1\n    x: int = 1"),
]
GOOD = [
    (documentation.public_docstrings, "megatron_zj.engine.__init__", ""),
    (documentation.public_docstrings, "megatron_zj.engine.x", '"""M."""\ndef _f(): ...\nclass _A: ...'),
    (documentation.public_docstrings, "megatron_zj.engine.x", '"""M."""\ndef f():\n    """F."""\n    def g(): ...'),
    (documentation.config_classes, _C, _FROZEN + "    x: int = 1  # ranks\n    # in tokens\n    y: int = 1"),
    (documentation.config_classes, _C, _FROZEN + '    """``x``: in tokens."""\n    x: int = 1\n    m: ModelConfig'),
]


def test_the_tree_documents_what_is_public() -> None:
    known = frozenset(name for source in sources(*PACKAGES) for name in documentation.documented_interfaces(source))

    def public_docstrings(source: Source) -> list[str]:
        """Modules, public classes, functions and methods have docstrings."""
        return documentation.public_docstrings(source, known)

    obey(public_docstrings)


def test_configurations_are_frozen_and_every_field_is_explained() -> None:
    obey(documentation.config_classes)


def test_a_method_may_leave_it_to_the_protocol_that_documents_it() -> None:
    protocol = 'class P(Protocol):\n    """P."""\n    def f(self):\n        """F."""\n'
    text = '"""M."""\n' + protocol + 'class A:\n    """A."""\n    def f(self): ...'
    source = Source("megatron_zj.engine.x", text)
    assert documentation.documented_interfaces(source) == {"f"}
    assert documentation.public_docstrings(source)
    assert documentation.public_docstrings(source, frozenset({"f"})) == []


@pytest.mark.parametrize(("rule", "module", "text"), BAD)
def test_a_planted_breach_is_found(rule: Rule, module: str, text: str) -> None:
    assert rule(Source(module, text))


@pytest.mark.parametrize(("rule", "module", "text"), GOOD)
def test_what_is_allowed_passes(rule: Rule, module: str, text: str) -> None:
    assert rule(Source(module, text)) == []
