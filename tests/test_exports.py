"""The public names: listed once, all there, nothing else."""

from __future__ import annotations

import importlib

import pytest

import mmchat
from mmchat.errors import MmchatError


def test_the_list_equals_the_homes() -> None:
    homes = [name for names in mmchat._HOME.values() for name in names]
    assert sorted(homes) == sorted(set(mmchat.__all__) - {"__version__"})
    assert len(homes) == len(set(homes))
    assert mmchat.__all__ == sorted(mmchat.__all__)
    assert dir(mmchat) == mmchat.__all__


@pytest.mark.parametrize("name", mmchat.__all__)
def test_every_name_is_there(name: str) -> None:
    found = getattr(mmchat, name)
    home = next((module for module, names in mmchat._HOME.items() if name in names), None)
    if home:
        assert found is getattr(importlib.import_module(f"mmchat.{home}"), name)
        assert found.__module__ == f"mmchat.{home}"


def test_another_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="'mmchat' has no attribute 'chat'"):
        mmchat.chat  # noqa: B018


def test_every_error_is_documented_and_public_where_callers_meet_it() -> None:
    """The tree in the docstring names every class, and every class has MmchatError at its root."""
    errors = importlib.import_module("mmchat.errors")
    classes = {
        name: value for name, value in vars(errors).items() if getattr(value, "__module__", "") == errors.__name__
    }
    for name, value in classes.items():
        assert issubclass(value, MmchatError)
        assert f"{name} " in (errors.__doc__ or "")
        assert value.__doc__
    assert set(classes) - set(mmchat.__all__) == {"MissingEmbeddings", "SamplingFixed"}
