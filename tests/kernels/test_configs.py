"""Which blocks a device and a head size get."""

from __future__ import annotations

import pytest
import torch

from kernels import configs


@pytest.mark.parametrize(
    ("capability", "table"),
    [((8, 0), "sm_80"), ((8, 9), "sm_80"), ((9, 0), "sm_90"), ((10, 0), "sm_100"), ((12, 0), "sm_80")],
)
def test_a_device_gets_blocks_that_fit_it(
    capability: tuple[int, int], table: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert configs.architecture(torch.device("cuda")) == table


def test_an_older_device_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.raises(NotImplementedError, match="sm_80 or newer, this device is sm_75"):
        configs.architecture(torch.device("cuda"))


@pytest.mark.parametrize(
    ("kernel", "key", "same_as"),
    [
        ("attention_forward", "128", "128"),
        ("attention_forward", "112", "128"),
        ("attention_forward", "8", "64"),
        ("attention_forward", "256/fp32", "256/fp32"),
        ("attention_forward", "112/fp32", "fp32"),
        ("decode_split", "160", "256"),
        ("decode_split", "96", ""),
    ],
)
def test_a_size_without_an_entry_takes_the_power_of_two_above(kernel: str, key: str, same_as: str) -> None:
    assert configs.lookup("sm_90", kernel, key) == configs.TABLES["sm_90"][kernel][same_as]
