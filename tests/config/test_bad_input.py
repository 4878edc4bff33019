"""Bad input gives exit code 2 and one line that says where and what is wrong, and no file is lost.

Every case runs with overwrite=true over a finished run: bad input must be detected before it is replaced.
"""

import gzip
import json
import re
import shutil
import socket
from pathlib import Path

import kit
import pytest


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """{name: path} of a tiny policy, its score models and data; a case names them in braces."""
    folder = tmp_path_factory.mktemp("bad")
    base = kit.make_model(folder / "model")
    return {
        "folder": folder,
        "model": base,
        **kit.make_scores(folder, base),
        **kit.make_data(folder / "data"),
        **bad_models(folder, base),
        **bad_data(folder),
    }


def bad_models(folder, base):
    """Makes copies of the model folder with one mistake each; returns {name: path}."""
    folders = {
        name: str(shutil.copytree(base, folder / name))
        for name in ("no_config", "no_tokenizer", "no_weights", "broken_weights", "broken_config", "no_eos")
    }
    (folder / "no_config" / "config.json").unlink()
    (folder / "no_tokenizer" / "tokenizer.json").unlink()
    (folder / "no_weights" / "model.safetensors").unlink()
    weights = folder / "broken_weights" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    (folder / "broken_config" / "config.json").write_text("{")
    settings = json.loads((folder / "no_eos" / "tokenizer_config.json").read_text())
    (folder / "no_eos" / "tokenizer_config.json").write_text(json.dumps({**settings, "eos_token": None}))
    return {**folders, "large_vocabulary": kit.make_model(folder / "large_vocabulary", vocab=20)}


def bad_data(folder):
    """Makes data files with one mistake each; returns {name: path}."""
    good = {"instruction": "what is red", "input": "", "output": "yes"}
    pair = kit.pair("what is red", "yes red", "harm red", 0)
    rows_of = {
        "empty": [],
        "blank": ["", ""],
        "not_json": [good, good, '{"instruction": '],
        "list_row": [good, "[1, 2]"],
        "no_field": [good, {"instruction": "what is red", "input": ""}],
        "wrong_type": [good, {**good, "output": 3}],
        "strange": [{"a": 1, "b": 2}],
        "bad_id": [pair, {**pair, "better_response_id": 2}],
        "bad_safer": [pair, {**pair, "safer_response_id": -1}],
        "bad_flag": [pair, {**pair, "is_response_1_safe": "perhaps"}],
        "no_better": [pair, {k: v for k, v in pair.items() if k != "better_response_id"}],
        "identical": [{**pair, "response_1": pair["response_0"]}] * 3,
        "empty_response": [{**pair, "response_1": " "}],
        "empty_output": [{**good, "output": ""}],
        "contrary": [{**pair, "safer_response_id": 1}] * 3,
        "long": [{**good, "output": "yes " * 200}] * 3,
        "empty_prompts": [{"prompt": ""}, {"prompt": "  "}],
        "no_answer": [{"messages": [{"role": "user", "content": "what"}]}],
        "bad_role": [{"messages": [{"role": "usr", "content": "what"}]}],
    }
    paths = {name: kit.write_rows(folder / f"{name}.jsonl", rows) for name, rows in rows_of.items()}
    compressed = gzip.compress(json.dumps(good).encode() * 50)
    for name, content in (("truncated", compressed[: len(compressed) // 2]), ("not_gzip", b"hello")):
        paths[name] = str(folder / f"{name}.jsonl.gz")
        Path(paths[name]).write_bytes(content)
    paths["latin"] = str(folder / "latin.jsonl")
    Path(paths["latin"]).write_bytes('{"instruction": "caf\u00e9", "output": "x"}'.encode("latin-1"))
    paths["folder_of_nothing"] = str(folder / "folder_of_nothing")
    Path(paths["folder_of_nothing"]).mkdir()
    return paths


@pytest.fixture
def output(tmp_path):
    """The folder of a finished run, which bad input must leave unchanged."""
    folder = tmp_path / "out"
    (folder / "model").mkdir(parents=True)
    for name in ("config.yaml", "versions.json", "finished.json", "sentinel", "model/model.safetensors"):
        (folder / name).write_text('{"saferlhf-fast": "0.1.0"}')
    return folder


def line_of(capfd, *words, code=2):
    """Runs a command that must be refused; returns its one line without `error: `.

    It takes capfd, since C libraries write to the file descriptor too.
    """
    capfd.readouterr()
    exit_code, (_, err) = kit.main(*words), capfd.readouterr()
    assert exit_code == code, err
    assert err.startswith("error: ") and err.count("\n") == 1 and "Traceback" not in err, err
    return err.removeprefix("error: ").strip()


MODEL, PPO = "model={model}", "model={model} reward={reward} cost={cost} data={prompts} max_length=32"
SFT = f"sft {MODEL} data="
REWARD, COST = f"reward {MODEL} data=", f"cost {MODEL} data="

CASES = {
    # settings
    "unknown key": (
        SFT + "{sft} optim.learning_rat=1",
        "command line: optim.learning_rat",
        "optim.learning_rate?",
    ),
    "wrong type": (SFT + "{sft} train.epochs=many", "train.epochs", "expected", "many"),
    "out of range": (SFT + "{sft} train.batch_size=0", "train.batch_size", "above 0", "got 0"),
    "not a choice": (SFT + "{sft} optim.schedule=sine", "optim.schedule", "cosine", "sine"),
    "unknown metric": (
        SFT + "{sft} train.eval_fraction=0.3 train.best_metric=eval/accuracy",
        "train.best_metric",
        "eval/loss",
        "eval/accuracy",
    ),
    "unknown metric of a reward": (
        REWARD + "{pairs} train.eval_fraction=0.3 train.best_metric=accuracy",
        "train.best_metric",
        "eval/accuracy",
        "got accuracy",
    ),
    "unknown template": (SFT + "{sft} template=chat", "template", "safe-rlhf", "chat"),
    "no chat template": (SFT + "{sft} template=tokenizer", "template", "no chat template"),
    "wandb is missing": (SFT + "{sft} log.trackers=[wandb]", "log.trackers: wandb", "not installed"),
    "lambda that would stay 0": (
        f"ppo-lag {PPO} multiplier.init=0",
        "multiplier.init: expected above 0",
        "got 0",
    ),
    "lambda bounded at less than its start": (
        f"ppo-lag {PPO} multiplier.init=3 multiplier.max=2",
        "multiplier.init",
        "multiplier.max",
        "3",
    ),
    "no layer of that name": (
        SFT + "{sft} lora.rank=2 lora.target_modules=[nose]",
        "lora.target_modules",
        "nose",
    ),
    "prompt length below the tag": (
        f"ppo-lag {PPO} sampling.max_prompt_length=1",
        "max_prompt_length",
        "got 1",
    ),
    # models
    "no model folder": ("sft model={folder}/gone data={sft}", "model: {folder}/gone does not exist"),
    "model is a file": ("sft model={sft} data={sft}", "model: {sft} is a file", "expected a model folder"),
    "no config": ("sft model={no_config} data={sft}", "model: {no_config} has no config.json"),
    "broken config": ("sft model={broken_config} data={sft}", "{broken_config}/config.json is not JSON"),
    "no tokenizer": ("sft model={no_tokenizer} data={sft}", "model: {no_tokenizer} has no tokenizer"),
    "no weights": ("sft model={no_weights} data={sft}", "model: {no_weights} has no weights"),
    "broken weights": ("sft model={broken_weights} data={sft}", "{broken_weights} cannot be loaded"),
    "no end token": ("sft model={no_eos} data={sft}", "{no_eos}", "eos_token"),
    "large vocabulary": (
        "sft model={large_vocabulary} data={sft}",
        "{large_vocabulary}",
        "vocabulary (31 tokens)",
        "embedding (20 rows)",
    ),
    "large vocabulary of a reward": (
        "reward model={large_vocabulary} data={pairs}",
        "vocabulary (31 tokens)",
        "20 rows",
    ),
    "a score model as policy": (
        "sft model={reward} data={sft}",
        "{reward} lacks weights of a causal language model",
    ),
    "a policy as score model": (
        "ppo model={model} reward={model} data={prompts} max_length=32",
        "{model}",
        "expected a score model",
    ),
    "a policy as cost critic": (
        f"ppo-lag {PPO} cost_critic={{no_tokenizer}}",
        "cost_critic: {no_tokenizer}",
        "no tokenizer",
    ),
    "a longer text than the context": (f"ppo-lag {PPO} max_length=400", "max_length", "128", "400"),
    # data files
    "no data file": (SFT + "{folder}/gone.jsonl", "data: {folder}/gone.jsonl does not exist"),
    "one of two files is missing": (SFT + "[{sft},{folder}/gone.jsonl]", "data.1: {folder}/gone.jsonl"),
    "empty": (SFT + "{empty}", "data: {empty} is empty"),
    "blank": (SFT + "{blank}", "{blank}: the file is empty"),
    "empty folder": (SFT + "{folder_of_nothing}", "{folder_of_nothing}", "empty folder"),
    "truncated gzip": (SFT + "{truncated}", "{truncated}", "gzip", "truncated"),
    "not gzip": (SFT + "{not_gzip}", "{not_gzip}", "expected gzip data"),
    "not JSON": (SFT + "{not_json}", "{not_json} line 3: not JSON"),
    "row is a list": (SFT + "{list_row}", "{list_row} line 2: expected a JSON object", "a list [1, 2]"),
    "not UTF-8": (SFT + "{latin}", "{latin} line 1: expected UTF-8", "0xe9"),
    "no field": (SFT + "{no_field}", "{no_field} line 2: no field 'output'"),
    "field of another type": (
        SFT + "{wrong_type}",
        "{wrong_type} line 2, field 'output': expected text",
        "number 3",
    ),
    "unknown columns": (SFT + "{strange}", "{strange}", "columns a, b"),
    "pairs for sft": (SFT + "{pairs}", "{pairs}: expected conversations", "pku"),
    "instructions for a reward": (REWARD + "{sft}", "{sft}: expected preferences", "alpaca"),
    "unknown role": (SFT + "{bad_role}", "{bad_role} line 1, field 'messages[0].role'", "usr"),
    "no answer": (SFT + "{no_answer}", "{no_answer}: no usable conversation in 1 rows", "no assistant turn"),
    "id out of range": (
        REWARD + "{bad_id}",
        "{bad_id} line 2, field 'better_response_id': expected 0 or 1",
        "number 2",
    ),
    "safer id out of range": (
        COST + "{bad_safer}",
        "{bad_safer} line 2, field 'safer_response_id'",
        "number -1",
    ),
    "flag of another type": (COST + "{bad_flag}", "{bad_flag} line 2, field 'is_response_1_safe'", "perhaps"),
    "no preference": (REWARD + "{no_better}", "{no_better} line 2: no field 'better_response_id'"),
    "identical only": (
        REWARD + "{identical}",
        "{identical}: no usable preference in 3 rows",
        "3 dropped",
        "identical",
    ),
    "identical only, dpo": (f"dpo {MODEL} data={{identical}}", "no usable preference", "identical"),
    "contrary only": (COST + "{contrary}", "{contrary}: no usable preference in 3 rows", "labelled unsafe"),
    "every row too long": (
        SFT + "{long} train.max_length=64",
        "{long}: no usable conversation",
        "longer than 64 tokens",
    ),
    "every pair too long": (
        REWARD + "{pairs} train.max_length=4",
        "{pairs}: no usable preference",
        "longer than 4",
    ),
    "a response with no token": (
        REWARD + "{empty_response}",
        "no usable preference",
        "a response with no token",
    ),
    "an output with no token": (SFT + "{empty_output}", "no usable conversation", "a response with no token"),
    "prompts with no text": (
        f"ppo {PPO} data={{empty_prompts}}",
        "no usable prompt in 2 rows",
        "an empty prompt",
    ),
    "bad evaluation data": (SFT + "{sft} train.eval_data={not_json}", "{not_json} line 3: not JSON"),
    "bad evaluation prompts": (f"ppo-lag {PPO} evaluation.data={{empty_prompts}}", "no usable prompt"),
    "bad ptx data": (f"ppo-lag {PPO} ptx={{no_field}}", "{no_field} line 2: no field 'output'"),
    "bad prompts to evaluate": ("evaluate model={model} prompts={empty_prompts}", "no usable prompt"),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_input_gets_one_line_and_deletes_nothing(world, output, capfd, case):
    words, *fragments = CASES[case]
    before = kit.files(output)
    words = [word.format(**world) for word in words.split(" ")]
    line = line_of(capfd, *words, f"output={output}", "overwrite=true")
    for fragment in fragments:
        assert fragment.format(**world) in line, line
    assert kit.files(output) == before
    assert [p.name for p in output.parent.iterdir()] == ["out"]


def test_an_output_that_holds_something_else_is_refused(world, output, tmp_path, capfd):
    words = ["sft", f"model={world['model']}", f"data={world['sft']}"]
    before = kit.files(output)
    line = line_of(capfd, *words, f"output={output}")
    assert f"output: {output} holds a finished run" in line and "overwrite=true" in line
    other = tmp_path / "thesis"
    other.mkdir()
    (other / "chapter1.tex").write_text("mine")
    for extra in ([], ["overwrite=true"]):
        assert f"{other} is not empty" in line_of(capfd, *words, f"output={other}", *extra)
    assert "is a file" in line_of(capfd, *words, f"output={world['sft']}", "overwrite=true")
    assert "own input model" in line_of(
        capfd, *words, f"output={Path(world['model']).parent}", "overwrite=true"
    )
    assert kit.files(output) == before and kit.files(other) == {"chapter1.tex": b"mine"}


def test_debug_shows_the_traceback(world, output, capfd):
    capfd.readouterr()
    assert (
        kit.main(
            "sft",
            f"model={world['model']}",
            f"data={world['not_json']}",
            f"output={output}",
            "overwrite=true",
            "--debug",
        )
        == 2
    )
    err = capfd.readouterr().err
    assert "Traceback (most recent call last)" in err and err.splitlines()[-1].startswith("error: ")


def test_an_unknown_name_on_the_hub_is_refused_after_one_request(world, output, capfd, monkeypatch):
    """Without this the loaders would repeat their requests for half a minute."""
    lookups = []

    def fail(host, *args, **kwargs):
        lookups.append(host)
        raise OSError("no network")

    monkeypatch.setattr(socket, "getaddrinfo", fail)
    before = kit.files(output)
    tail = [f"output={output}", "overwrite=true"]
    line = line_of(capfd, "sft", "model=nobody/nothing", f"data={world['sft']}", *tail)
    assert "nobody/nothing: expected a model folder or a model on the Hub" in line
    assert 0 < len(lookups) <= 2  # one request, which may look up twice
    line = line_of(capfd, "sft", f"model={world['model']}", "data=nobody/no-data", *tail)
    assert all(word in line for word in ("nobody/no-data: no such file", "Hub", "no network")), line
    assert 0 < len(lookups) <= 4 and kit.files(output) == before


def test_contradictory_rows_are_counted_and_skipped(world, tmp_path, capsys):
    """Rows whose labels contradict each other, and other unusable rows, do not end a run."""
    good = [kit.pair(f"what is {word}", "yes red", "harm red", 0) for word in ("one", "two", "three")]
    rows = [
        *good,
        {**good[0], "safer_response_id": 1},
        {**good[1], "response_1": "yes red"},
        {**good[2], "response_0": ""},
        {**good[0], "response_0": "yes " * 100},
    ]
    data = kit.write_rows(tmp_path / "rows.jsonl", rows)
    assert (
        kit.main(
            "cost",
            f"model={world['model']}",
            f"data={data}",
            f"output={tmp_path / 'out'}",
            "train.max_steps=1",
            "train.max_length=64",
        )
        == 0
    )
    report = json.loads((tmp_path / "out" / "summary.json").read_text())["data"]
    assert report["kept"] == 3
    assert sorted(report["dropped"].items()) == [
        ("a response with no token", 1),
        ("prompt + response is longer than 64 tokens", 1),
        ("the safer response is labelled unsafe and the other safe", 1),
        ("the two responses are identical", 1),
    ]
    out = capsys.readouterr().out
    assert "1 dropped: the safer response is labelled unsafe and the other safe (first: line 4)" in out


SUPERVISED = {"sft": "sft", "reward": "pairs", "cost": "pairs", "dpo": "pairs"}


def stopped_at(line, folder):
    """Returns the step that a run's one line names.

    It must be the step after the last logged one, and the run must not have finished.
    """
    step = int(re.match(r"step (\d): ", line)[1])
    assert kit.steps(folder)[-1] == step - 1 > 0
    assert not (folder / "finished.json").exists() and not (folder / "model").exists()
    return step


@pytest.mark.parametrize("stage", SUPERVISED)
def test_a_non_finite_loss_stops_at_its_step(world, tmp_path, capfd, stage):
    """The first step spoils the weights (learning rate 1e30); a later loss or gradient is not finite."""
    line = line_of(
        capfd,
        stage,
        f"model={world['model']}",
        f"data={world[SUPERVISED[stage]]}",
        f"output={tmp_path / 'out'}",
        "optim.learning_rate=1e30",
        "train.batch_size=5",
        "train.epochs=3",
        "train.accumulation=1",
        "log.progress=false",
    )
    saved = tmp_path / "out" / f"nonfinite_batch_step{stopped_at(line, tmp_path / 'out')}.jsonl"
    assert (
        re.search(r"(loss|gradient norm): expected finite numbers, got NaN or inf in 3 steps", line)
        and str(saved) in line
    )
    batch = [json.loads(text) for text in saved.read_text().splitlines()]
    assert len(batch) == 5 and all("what is" in row["prompt_text"] for row in batch)


def ppo(world, out, stage="ppo-lag", **changes):
    settings = {
        "model": world["model"],
        "reward": world["reward"],
        "data": world["prompts"],
        "output": out,
        "max_length": 32,
        "ppo.batch_size": 4,
        "ppo.max_steps": 6,
        **changes,
    }
    settings |= {"cost": world["cost"]} if stage == "ppo-lag" and "cost" not in settings else {}
    return [stage, *(f"{key}={value}" for key, value in settings.items())]


def test_ppo_that_diverges_stops_at_its_step(world, tmp_path, capfd):
    line = line_of(capfd, *ppo(world, tmp_path / "out", **{"optim.learning_rate": 1e30}))
    step = stopped_at(line, tmp_path / "out")
    assert re.search(
        r"step \d+: (actor_loss|gradient of actor).*: expected finite numbers, got NaN or inf", line
    )
    batch = (tmp_path / "out" / f"nonfinite_batch_step{step}_rank0.jsonl").read_text().splitlines()
    assert len(batch) == 4


@pytest.mark.parametrize("kind", ["reward", "cost"])
def test_a_score_model_that_gives_nan_is_named(world, tmp_path, capfd, kind):
    from safetensors.torch import load_file, save_file

    broken = Path(shutil.copytree(world[kind], tmp_path / "broken"))
    weights = load_file(broken / "model.safetensors")
    weights["score.weight"][:] = float("nan")
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    line = line_of(capfd, *ppo(world, tmp_path / "out", **{kind: broken, f"{kind}_critic": world[kind]}))
    assert re.match(
        rf"step 3: score of the {kind} model, actor_loss\b.*: expected finite numbers.* in 3 steps", line
    )
    assert (tmp_path / "out" / "nonfinite_batch_step3_rank0.jsonl").exists()
    # the two skipped steps before, which were logged
    assert len(kit.losses(tmp_path / "out", "train/actor_loss")) == 2


def test_a_critic_with_another_tokenizer_is_refused(world, tmp_path, capfd):
    """The critic would read the ids as other words."""
    other = kit.make_model(tmp_path / "other", extra=("new", "words"))
    line = line_of(capfd, *ppo(world, tmp_path / "out", reward_critic=other))
    assert line.startswith(f"reward_critic: {other}") and "tokenizer" in line
    assert not (tmp_path / "out").exists()
