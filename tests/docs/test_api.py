"""docs/api.md against the code, both ways: every public name, its exact signature, every command, and nothing
else.
"""

import inspect
import re
import typing

import api_page
import pytest
import torch

import saferlhf_fast
from saferlhf_fast import cli

TEXT = api_page.PAGE.read_text(encoding="utf-8")
AGAIN = "python tests/support/api_page.py writes the signatures anew; the words are yours"


def test_every_public_name_is_on_the_page_and_nothing_else():
    assert list(api_page.entries(TEXT)) and set(api_page.entries(TEXT)) == set(api_page.public()), AGAIN
    headings = re.findall(r"^### `(.+)`$", TEXT, re.M)
    assert len(headings) == len(set(headings)) == len(re.findall("^### ", TEXT, re.M))


@pytest.mark.parametrize("name", api_page.public())
def test_its_signature_is_the_code_s_and_it_has_words(name):
    block, words = api_page.entries(TEXT)[name]
    assert block == api_page.block(name, api_page.public()[name]), AGAIN
    assert len(words) > 60 and "TODO" not in words, f"{name}: two or three lines on what it does, with shapes"


def test_every_command_is_on_the_page_with_its_line():
    assert api_page.commands(TEXT) == cli.COMMANDS, AGAIN


def test_the_page_can_be_written_anew():
    assert api_page.rewritten(TEXT) == TEXT
    spoilt = TEXT.replace("### `gae`\n\n```python\ngae(", "### `gae`\n\n```python\ngae(old, ")
    assert spoilt != TEXT and api_page.entries(spoilt)["gae"] != api_page.entries(TEXT)["gae"]
    assert api_page.entries(api_page.rewritten(spoilt))["gae"] == api_page.entries(TEXT)["gae"]
    whole = TEXT.replace("### `unpack`", "### `unpacked`")
    assert "### `unpack`" in api_page.rewritten(whole) and "TODO" in api_page.rewritten(whole)


def test_type_checkers_see_every_name():
    assert api_page.imported_for_checkers() == {*saferlhf_fast._HOME, "integrations"}


def functions(name, thing):
    """[(name, function, parameters without self)] of a public function or of a class's public methods."""
    if not inspect.isclass(thing):
        return [(name, thing, list(inspect.signature(thing).parameters.values()))] if callable(thing) else []
    methods = [
        (key, value)
        for key, value in vars(thing).items()
        if inspect.isfunction(value) and not key.startswith("_")
    ]
    made = (
        []
        if issubclass(thing, BaseException)
        else [(name, thing, list(inspect.signature(thing).parameters.values()))]
    )
    return made + [
        (f"{name}.{key}", value, list(inspect.signature(value).parameters.values())[1:])
        for key, value in methods
    ]


@pytest.mark.parametrize("name", ["token_logprob", "linear_logprob"])
def test_type_checkers_know_what_return_entropy_changes(name):
    """One tensor, two, or either; beside that the variants are the function: same arguments, same types."""
    function = api_page.public()[name]
    variants = [inspect.signature(variant) for variant in typing.get_overloads(function)]
    told = [
        (variant.parameters["return_entropy"].annotation, variant.return_annotation) for variant in variants
    ]
    one, two, own = torch.Tensor, tuple[torch.Tensor, torch.Tensor], inspect.signature(function)
    assert told == [(typing.Literal[False], one), (typing.Literal[True], two), (bool, one | two)]
    for variant in variants:
        assert [(p.name, p.kind) for p in variant.parameters.values()] == [
            (p.name, p.kind) for p in own.parameters.values()
        ]
        for each, mine in zip(variant.parameters.values(), own.parameters.values(), strict=True):
            assert each.name == "return_entropy" or each.annotation == mine.annotation
            by_choice = each.name == "return_entropy" and each.annotation != typing.Literal[False]
            assert (each.default is each.empty) == (mine.default is mine.empty or by_choice)
    assert own.return_annotation == one | two


def test_every_public_function_has_type_hints():
    for name, thing in api_page.public().items():
        for where, function, parameters in functions(name, thing):
            bare = [parameter.name for parameter in parameters if parameter.annotation is parameter.empty]
            assert not bare, f"{where}: {bare} without a type"
            assert (
                inspect.isclass(function)
                or inspect.signature(function).return_annotation is not inspect.Signature.empty
            ), where
