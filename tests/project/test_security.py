"""What SECURITY.md promises: no pickle that runs, no code from models, no path out of its root, no secret in
a run folder.
"""

import ast
import json
import shutil
from pathlib import Path

import kit
import pytest
import torch

from saferlhf_fast.config import redact
from saferlhf_fast.errors import UserError
from saferlhf_fast.models.causal_lm import load_causal_lm
from saferlhf_fast.models.score_model import load_backbone, load_score_model, score_model_from_backbone

PACKAGE = kit.ROOT / "saferlhf_fast"

# ---------------------------------------------------------------- what could run code

RISKY = {
    "torch.load",
    "pickle.load",
    "pickle.loads",
    "pickle.Unpickler",
    "marshal.load",
    "marshal.loads",
    "shelve.open",
    "joblib.load",
    "numpy.load",
    "np.load",
    "yaml.load",
    "yaml.full_load",
    "yaml.unsafe_load",
    "yaml.load_all",
    "eval",
    "exec",
    "compile",
    "__import__",
    "os.system",
    "os.popen",
    "runpy.run_path",
    "torch.hub.load",
    "torch.jit.load",
}
ALLOWED = {
    ("models/score_checkpoint.py", "torch.load"): "weights_only=True",
    ("runtime/checkpoint/safe_pickle.py", "_TORCH_LOAD"): "weights_only=True, with a list of classes",
}
"""(file, what is called) -> why it is safe; a new site is a decision."""


def dotted(node):
    """a.b.c of an expression; ? for what is not a name."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else "?"


def risky_calls(path):
    """(name, call) of every call of a file that could run what it reads, and of shells."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call):
            continue
        name = dotted(node.func)
        if (
            name in RISKY
            or name == "_TORCH_LOAD"
            or any(word.arg == "shell" and getattr(word.value, "value", None) for word in node.keywords)
        ):
            yield name, node


def test_every_site_that_could_run_what_it_reads_is_named():
    found = {}
    for path in sorted(p for p in PACKAGE.rglob("*.py")):
        for name, call in risky_calls(path):
            found[str(path.relative_to(PACKAGE)), name] = call
    assert set(found) == set(ALLOWED)
    for (file, name), call in found.items():
        if name == "torch.load":
            options = {word.arg: getattr(word.value, "value", None) for word in call.keywords}
            assert options.get("weights_only") is True, (file, name)
    assert '"weights_only": True}' in (PACKAGE / "runtime" / "checkpoint" / "safe_pickle.py").read_text(
        encoding="utf-8"
    )


def test_no_loader_of_transformers_may_read_pickles_or_code_by_itself():
    """Every from_pretrained of weights says which files and whether code; none says trust_remote_code=True
    but plan's, which does so only where the user did. A GGUF file holds tensors alone.
    """
    for path in PACKAGE.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Call) and dotted(node.func) in (
                "AutoModel.from_pretrained",
                "AutoModelForCausalLM.from_pretrained",
            ):
                options = ast.unparse(node)
                said = (
                    "allowed_files(allow_pickle)" in options
                    and "trust_remote_code=trust_remote_code" in options
                    or "gguf_file=" in options
                    and "trust_remote_code=False" in options
                )
                assert said, (path, options)
        if path.name != "sizes.py":
            assert "trust_remote_code=True" not in text and '"trust_remote_code": True' not in text, path


# ---------------------------------------------------------------- models


class Harm:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return (open, (self.marker, "w"))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("security")
    base = kit.make_model(folder / "model")
    return {
        "folder": folder,
        "model": base,
        **kit.make_scores(folder, base),
        **kit.make_data(folder / "data"),
    }


def pickled(world, target, weights=None):
    """A copy of the model whose weights are a .bin alone -> its folder."""
    from safetensors.torch import load_file

    folder = Path(shutil.copytree(world["model"], target))
    state = load_file(folder / "model.safetensors") if weights is None else weights
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin")
    return folder


def refused(capfd, *words):
    """Runs a command that must be refused with exit code 2 -> its one line."""
    capfd.readouterr()
    code, (_, err) = kit.main(*words), capfd.readouterr()
    assert code == 2 and err.startswith("error: ") and err.count("\n") == 1, err
    return err


def sft(model, world, output, *more):
    return [
        "sft",
        f"model={model}",
        f"data={world['sft']}",
        f"output={output}",
        "train.max_steps=1",
        "log.progress=false",
        *more,
    ]


def test_weights_in_a_pickle_alone_are_refused_and_can_be_allowed(world, tmp_path, capfd):
    folder = pickled(world, tmp_path / "bin")
    line = refused(capfd, *sft(folder, world, tmp_path / "out"))
    assert (
        f"model: {folder} has its weights as a pickle alone (pytorch_model.bin)" in line
        and "allow_pickle=true" in line
    )
    assert not (tmp_path / "out").exists()
    for load in (load_causal_lm, score_model_from_backbone, load_backbone):
        with pytest.raises(UserError, match="pickle alone"):
            load(folder)
        assert load(folder, allow_pickle=True) is not None
    expected = load_causal_lm(world["model"]).state_dict()
    found = load_causal_lm(folder, allow_pickle=True).state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_safetensors_are_read_where_both_are_there(world, tmp_path):
    """A pickle beside them is not even opened."""
    folder = Path(shutil.copytree(world["model"], tmp_path / "both"))
    torch.save({"lm_head.weight": Harm(tmp_path / "ran")}, folder / "pytorch_model.bin")
    for allow in (False, True):
        load_causal_lm(folder, allow_pickle=allow)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("load", [load_causal_lm, load_backbone, load_score_model])
def test_a_pickle_that_would_run_something_never_does(world, tmp_path, load):
    folder = pickled(world, tmp_path / "harm", {"score.weight": Harm(tmp_path / "ran")})
    for allow in (False, True):
        with pytest.raises(UserError, match=str(folder)):
            load(folder, allow_pickle=allow)
    assert not (tmp_path / "ran").exists()


def test_code_beside_a_model_is_not_run(world, tmp_path, capfd):
    folder = Path(shutil.copytree(world["model"], tmp_path / "remote"))
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": "harmful",
        "auto_map": {"AutoConfig": "harm.HarmConfig", "AutoModelForCausalLM": "harm.Harm"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "harm.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    line = refused(capfd, *sft(folder, world, tmp_path / "out"))
    assert str(folder) in line and "trust_remote_code" in line
    assert not (tmp_path / "ran").exists() and not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["../model/model.safetensors", "/etc/passwd", "inside/model.safetensors"])
def test_an_index_names_no_file_outside_its_folder(world, tmp_path, name):
    folder = Path(shutil.copytree(world["model"], tmp_path / "indexed"))
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"lm_head.weight": name}}))
    shutil.copy(Path(world["model"]) / "model.safetensors", folder / "other.safetensors")
    for load in (load_causal_lm, load_backbone, load_score_model):
        with pytest.raises(UserError, match="expected a file of this folder"):
            load(folder)


# ---------------------------------------------------------------- paths


@pytest.mark.parametrize("name", ["../out", "a/b", "/tmp/x", "..", "."])
def test_a_stage_of_a_recipe_has_a_name_not_a_path(world, tmp_path, capfd, name):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        json.dumps(
            {
                "output": str(tmp_path / "runs" / "one"),
                "stages": [{"sft": {"model": world["model"], "data": world["sft"]}, "name": name}],
            }
        )
    )
    refused(capfd, "run", recipe)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["recipe.yaml"]


def test_overwriting_follows_no_link(world, tmp_path, capfd):
    """An output that is a link to a foreign folder is not emptied, nor is what lies behind it."""
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("mine")
    (tmp_path / "out").symlink_to(foreign)
    refused(capfd, *sft(world["model"], world, tmp_path / "out", "overwrite=true"))
    assert (foreign / "thesis.tex").read_text() == "mine" and (tmp_path / "out").is_symlink()


# ---------------------------------------------------------------- secrets

SECRETS = {
    "HF_TOKEN": "hf_MARKEDsecretOne",
    "WANDB_API_KEY": "MARKEDsecretTwo",
    "AWS_SECRET_ACCESS_KEY": "MARKEDsecretThree",
    "MY_PASSWORD": "MARKEDsecretFour",
}


def test_a_run_folder_holds_no_secret(world, tmp_path, monkeypatch):
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    out = tmp_path / "out"
    words = [
        "ppo-lag",
        f"model={world['model']}",
        f"reward={world['reward']}",
        f"cost={world['cost']}",
        f"data={world['prompts']}",
        f"output={out}",
        "max_length=32",
        "ppo.batch_size=3",
        "ppo.max_steps=1",
        "log.progress=false",
        "sampling.server=http://me:MARKEDsecretFive@host:8000",
        'engine.config={"comet": {"enabled": false, "api_key": "MARKEDsecretSix"}}',
        "checkpoint.interval=1",
    ]
    assert kit.main(*words) == 0
    written = kit.files(out)
    assert {"config.yaml", "versions.json", "metrics.jsonl", "report.html", "model/README.md"} <= set(written)
    assert any("tfevents" in name for name in written)
    found = [name for name, content in written.items() if b"MARKEDsecret" in content]
    assert not found, found
    assert b"http://***@host:8000" in written["config.yaml"]


def test_a_traceback_that_is_kept_holds_no_secret(world, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("HF_TOKEN", SECRETS["HF_TOKEN"])

    def fail(*args, **kwargs):
        raise RuntimeError(f"401 for https://me:MARKEDsecretFive@hub/x with {SECRETS['HF_TOKEN']}")

    monkeypatch.setattr("saferlhf_fast.training.sft.train_supervised", fail)
    assert kit.main(*sft(world["model"], world, tmp_path / "out")) == 1
    kept = (tmp_path / "out" / "error-rank0.txt").read_text()
    assert "RuntimeError: 401 for https://***@hub/x with ***" in kept
    assert not [name for name, content in kit.files(tmp_path / "out").items() if b"MARKEDsecret" in content]


def test_what_is_hidden_and_what_is_not(monkeypatch):
    monkeypatch.setenv("SOME_TOKEN", "a-long-secret")
    monkeypatch.setenv("OTHER_KEY", "short")
    tree = {
        "api_key": "x",
        "micro_tokens": 5,
        "password": "p",
        "token": None,
        "url": "https://u:p@host/a",
        "text": "short a-long-secret",
        "list": ["ftp://u@h"],
        "model": "/models/key",
        "monkey": "banana",
        "max_new_tokens": "7",
    }
    assert redact.values(tree) == {
        "api_key": "***",
        "micro_tokens": 5,
        "password": "***",
        "token": None,
        "url": "https://***@host/a",
        "text": "short ***",
        "list": ["ftp://***@h"],
        "model": "/models/key",
        "monkey": "banana",
        "max_new_tokens": "7",
    }
