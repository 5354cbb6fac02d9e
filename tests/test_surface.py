"""The public names: present, sorted, documented, and each where it says it is."""

from __future__ import annotations

import pytest

import isoflop


def test_public_names_are_sorted_and_complete() -> None:
    names = list(isoflop.__all__)
    assert names == sorted(names)
    assert set(names) <= set(dir(isoflop))


@pytest.mark.parametrize("name", isoflop.__all__)
def test_a_public_name_resolves_and_says_what_it_is(name: str) -> None:
    value = getattr(isoflop, name)
    assert value.__doc__


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="parms"):
        _ = isoflop.parms
