"""The README's tree, commands and links are those of the checkout."""

import re

import kit

from saferlhf_fast.config.stages import STAGES

README = (kit.ROOT / "README.md").read_text(encoding="utf-8")


def test_tree_names_what_is_there():
    tree = README.split("## How it is laid out")[1].split("```")[1]
    inside = False
    for line in tree.strip().splitlines():
        names = line.strip().split("   ")[0].split("  ")[0] if not line.startswith("  ") else line.strip()
        if not line.startswith("  "):
            assert (kit.ROOT / names.split()[0]).is_dir(), line
            inside = names.startswith("saferlhf_fast")
            continue
        assert inside
        for name in re.split(r"\s{2,}", names)[:6]:
            if re.fullmatch(r"[a-z_]+(\.py|/)?", name):
                found = kit.ROOT / "saferlhf_fast" / name
                assert found.exists() or found.with_suffix(".py").exists(), name


def test_links_lead_somewhere():
    for target in re.findall(r"\]\((?!http)([^)]+)\)", README):
        assert (kit.ROOT / target).exists(), target


def test_make_targets_exist():
    makefile = (kit.ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"`?make ([a-z-]+)", README):
        assert re.search(rf"^{target}:", makefile, re.M), target


def test_the_demo_s_time_is_said_in_the_same_words():
    """README and Makefile said 8 minutes and 5."""
    said = [re.search(r"^make demo +# .*: (under .*)$", README, re.M), re.search(
        r"^demo: .*## .*: (under .*)$", (kit.ROOT / "Makefile").read_text(encoding="utf-8"), re.M)]
    assert all(said) and said[0][1] == said[1][1], said


def test_commands_are_known():
    known = {*STAGES, "run", "demo", "plan", "info", "bench", "checkpoint"}
    for command in re.findall(r"saferlhf-fast ([a-z-]+)", README):
        assert command in known, command
    for recipe in re.findall(r"`(paper|single-gpu|multi-node|quickstart|pku_tiny)`", README):
        assert (kit.ROOT / "saferlhf_fast" / "recipes" / f"{recipe}.yaml").exists()


def test_public_names_import():
    import saferlhf_fast
    for line in re.findall(r"from saferlhf_fast import (.+)", README):
        for name in line.split(","):
            assert getattr(saferlhf_fast, name.strip()) is not None
