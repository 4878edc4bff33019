"""The tables of docs/scaling.md are what bench/scaling.py prints today."""

import importlib.util
import re

import kit
import pytest

DOCUMENT = (kit.ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def scaling():
    spec = importlib.util.spec_from_file_location("scaling", kit.ROOT / "bench" / "scaling.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def stated(heading):
    """Lines of the document's table."""
    return re.search(rf"<!-- {heading} -->\n(.*?)\n<!-- end -->", DOCUMENT, re.DOTALL)[1].splitlines()


def test_the_smallest_size_is_as_the_document_says(scaling):
    for heading, table in scaling.tables(("7B",)).items():
        lines = stated(heading)
        assert table.splitlines() == lines[:2] + [line for line in lines if line.startswith("| 7B |")], (
            heading
        )


@pytest.mark.matrix
def test_all_tables_are_as_the_document_says(scaling):
    for heading, table in scaling.tables().items():
        assert table.splitlines() == stated(heading), heading


def test_the_shapes_have_as_many_weights_as_their_names_say(scaling, tmp_path):
    import json

    import torch

    from saferlhf_fast.commands.plan import pass_memory, sizes

    for name, billions in (("7B", 6.74), ("13B", 13.02), ("70B", 68.98)):
        values = json.loads((scaling.Path(scaling.folder_of(tmp_path, name)) / "config.json").read_text())
        whole = sizes.Blueprint(json.dumps(values, sort_keys=True), "policy", torch.bfloat16)
        one, two = (sizes.count(pass_memory.with_layers(whole, n)).all for n in (1, 2))
        total = one + (two - one) * (values["num_hidden_layers"] - 1)
        assert round(total / 1e9, 2) == billions
