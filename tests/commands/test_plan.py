"""saferlhf-fast plan: recipes in, stages with their moments out, and settings that make them fit."""

import dataclasses
import json
import re
import shutil

import kit
import pytest

from saferlhf_fast import cli
from saferlhf_fast.commands import plan
from saferlhf_fast.commands.plan import options, sizes, table
from saferlhf_fast.commands.plan.phases import Hardware
from saferlhf_fast.commands.plan.stage_phases import plan_stage
from saferlhf_fast.config import load
from saferlhf_fast.config.overrides import split_words
from saferlhf_fast.errors import UserError

MIB = 2**20
LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 8000,
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
    "torch_dtype": "float32",
}


@pytest.fixture
def model(tmp_path):
    """A folder with a config.json and nothing else."""
    folder = tmp_path / "llama"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(LLAMA))
    return str(folder)


def config(kind, model, **values):
    needed = {"model": model, "data": "none.json", "output": "none"}
    if kind.startswith("ppo"):
        needed |= {"reward": model, "cost": model, "sampling": {"engine": "generate"}}
    if kind == "evaluate":
        needed = {"model": model, "prompts": "none.json", "sampling": {"engine": "generate"}}
    return load.build(kind, {**needed, **values})


def stage(kind, model, gpus=1, device="cpu", memory=1 << 40, **values):
    return plan_stage(kind, kind, config(kind, model, **values), Hardware(gpus, memory, device), {})


def moments(made):
    return {moment.name: moment.total for moment in made.phases}


# ---------------------------------------------------------------- what models are


def test_parameters_are_those_of_the_real_models():
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    for extra in ({}, {"tie_word_embeddings": True}, {"attention_bias": True}):
        text = json.dumps({**LLAMA, **extra}, sort_keys=True)
        values = {**LLAMA, **extra}
        real = AutoConfig.for_model(values.pop("model_type"), **values)
        import torch

        lm, backbone = (
            sum(p.numel() for p in c.from_config(real).parameters())
            for c in (AutoModelForCausalLM, AutoModel)
        )
        assert sizes.count(sizes.Blueprint(text, "policy", torch.float32)).all == lm
        assert (
            sizes.count(sizes.Blueprint(text, "score", torch.float32)).all == backbone + LLAMA["hidden_size"]
        )


def test_the_cache_is_that_of_the_real_model():
    import torch

    text = json.dumps(LLAMA, sort_keys=True)
    heads = LLAMA["num_key_value_heads"] / LLAMA["num_attention_heads"]
    expected = 2 * LLAMA["num_hidden_layers"] * LLAMA["hidden_size"] * heads * 2
    assert sizes.cache_bytes(sizes.Blueprint(text, "policy", torch.bfloat16), 100) == 100 * expected


def test_adapters_are_the_trained_part():
    import torch

    text = json.dumps(LLAMA, sort_keys=True)
    whole = sizes.count(sizes.Blueprint(text, "policy", torch.float32))
    adapted = sizes.count(sizes.Blueprint(text, "policy", torch.float32, lora=(8, "all-linear")))
    width, inner, kv = 256, 688, 128
    per_layer = 8 * (2 * (width + width) + 2 * (width + kv) + 3 * (width + inner))
    assert (
        whole.trained == whole.all
        and adapted.trained == 4 * per_layer
        and adapted.all == whole.all + 4 * per_layer
    )


@pytest.mark.parametrize("kind", ["sft", "reward", "dpo", "ppo-lag"])
def test_a_base_in_4_bits_is_counted_once_for_each_model_that_has_it(model, kind):
    pytest.importorskip("bitsandbytes", reason="lora.bits needs bitsandbytes")
    size = {"max_length": 128} if kind == "ppo-lag" else {"train": {"max_length": 128}}
    whole, packed = (stage(kind, model, **size, lora={"rank": 4, "bits": b}).models for b in (None, 4))
    width, inner, kv, layers = 256, 688, 128, 4
    linear = layers * (2 * width * width + 2 * width * kv + 3 * width * inner)
    # a scale of 8 bits for 64 weights and one of 32 bits for 256 scales
    saved = linear * (4 - 0.5 - 1 / 64 - 1 / 4096)
    bases = {"sft": 1, "reward": 1, "dpo": 2, "ppo-lag": 1}[kind]  # a whole score model keeps its precision
    less = [old.states.weights - new.states.weights for old, new in zip(whole, packed, strict=True)]
    assert sorted(less)[-bases:] == pytest.approx([saved] * bases, rel=1e-4)
    assert not any(sorted(less)[:-bases])
    assert packed[0].states.unpacking == 4 * width * inner


def test_a_model_of_an_earlier_stage_is_the_one_it_started_from(model, tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text(f"""
output: {tmp_path}/out
stages:
  - sft: {{model: {model}, data: a.json, lora: {{rank: 4}}}}
  - reward: {{model: '${{output}}/sft/model', data: a.json}}
  - ppo: {{model: '${{output}}/sft/model', reward: '${{output}}/reward/model', data: a.json}}
""")
    found = plan.plan(str(recipe), {}, Hardware(1, 1 << 40, "cpu"))
    sft, reward, ppo = (made for made, _ in found)
    lm = sft.models[0].count.all - sft.models[0].count.trained
    assert [m.role for m in ppo.models] == ["reference", "reward model", "actor", "reward critic"]
    assert ppo.models[0].count.all == lm and ppo.models[1].count.all == reward.models[0].count.all
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------- moments


def test_a_moment_is_the_sum_of_its_parts_and_nothing_is_negative(model):
    for kind in ("sft", "reward", "dpo", "ppo", "ppo-lag", "evaluate"):
        made = (
            stage(kind, model, max_length=128)
            if kind in ("ppo", "ppo-lag", "evaluate")
            else stage(kind, model, train={"max_length": 128})
        )
        for moment in made.phases:
            assert moment.total == sum(moment.parts.values()) and min(moment.parts.values()) >= 0, (
                kind,
                moment,
            )
        assert made.worst.total == max(moments(made).values())


def test_what_saves_memory_does(model):
    big = {"train": {"batch_size": 8, "accumulation": 2, "max_length": 256}}

    def peak(moment="passes", gpus=1, device="cpu", **values):
        return moments(stage("sft", model, gpus, device, **{**big, **values}))[moment]

    whole = peak()
    assert peak(train={**big["train"], "gradient_checkpointing": True}) < 0.7 * whole
    assert peak(train={**big["train"], "micro_tokens": 512}) < 0.7 * whole
    assert peak(lora={"rank": 4}) < whole
    assert peak(optim={"kind": "adamw-8bit"}) < whole
    assert peak(engine={"precision": "bf16"}) < whole
    at_8 = []
    for zero in (0, 1, 2, 3):
        step = next(
            m
            for m in stage("sft", model, 8, **big, engine={"zero_stage": zero}).phases
            if m.name == "optimiser step"
        )
        at_8.append(step.total - step.parts["buffers"])  # ZeRO-3's bucket is there in the step too
    assert at_8[0] > at_8[1] > at_8[2] > at_8[3]


def test_one_pass_holds_all_graphs_at_once(model):
    together, apart = (
        stage("ppo-lag", model, max_length=256, ppo={"single_pass": single, "batch_size": 32})
        for single in (True, False)
    )
    assert moments(together)["update"] > 1.3 * moments(apart)["update"]
    assert moments(together)["scoring"] <= moments(apart)["scoring"]


def test_auto_is_the_engine_that_the_stage_itself_would_choose(model, tmp_path):
    """Continuous batching on a GPU, but not for an architecture that it cannot run."""
    bloom = {"model_type": "bloom", "vocab_size": 500, "hidden_size": 64, "n_layer": 2, "n_head": 4}
    (tmp_path / "config.json").write_text(json.dumps(bloom))
    for folder, device, engine in (
        (model, "cuda", "continuous"),
        (model, "cpu", "generate"),
        (tmp_path, "cuda", "generate"),
    ):
        folder = str(folder)
        auto, named = (
            moments(stage("evaluate", folder, device=device, sampling={"engine": name}))
            for name in ("auto", engine)
        )
        assert auto == named
        other = {"continuous": "generate", "generate": "continuous"}[engine]
        assert auto != moments(stage("evaluate", folder, device=device, sampling={"engine": other}))


def test_a_cut_distribution_is_planned_in_every_moment(model):
    plain, cut = (
        stage("ppo-lag", model, max_length=128, ptx="none.json", sampling={"engine": "generate", **shape})
        for shape in ({}, {"top_p": 0.9, "repetition_penalty": 1.1})
    )
    assert moments(cut)["scoring"] > moments(plain)["scoring"]
    assert all(moments(cut)[name] >= moments(plain)[name] for name in ("rollout", "update"))


def test_one_shared_base_has_its_weights_once(model):
    separate, shared_base = (
        stage("ppo-lag", model, max_length=128),
        stage("ppo-lag", model, max_length=128, lora={"rank": 4}),
    )
    base = next(m for m in shared_base.models if m.role == "base")
    assert base.states.weights == next(m for m in separate.models if m.role == "reference").states.weights
    small = [
        m for m in shared_base.models if m.role in ("actor", "reference", "reward critic", "cost critic")
    ]
    assert sum(m.states.weights for m in small) < 0.1 * base.states.weights
    reward = next(m for m in shared_base.models if m.role == "reward model")
    assert reward.count.all > 0.5 * base.count.all  # a whole one beside it


def test_score_models_trained_as_adapters_join_the_shared_base(model, tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text(f"""
output: {tmp_path}/out
stages:
  - reward: {{model: {model}, data: a.json, lora: {{rank: 4}}}}
  - ppo: {{model: {model}, reward: '${{output}}/reward/model', data: a.json, lora: {{rank: 4}}}}
""")
    (_, _), (ppo, _) = plan.plan(str(recipe), {}, Hardware(1, 1 << 40, "cpu"))
    by_role = {m.role: m for m in ppo.models}
    assert by_role["reward model"].count.all < 0.1 * by_role["base"].count.all


def test_a_score_model_on_disk_joins_the_shared_base_if_its_adapter_is_of_the_same_base(model, tmp_path):
    """As training/ppo/load_roles.py would take it."""
    import peft

    counts = {}
    for name, base in (("same", model), ("other", str(tmp_path))):
        folder = tmp_path / name
        shutil.copytree(model, folder)
        adapter = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], base_model_name_or_path=base)
        adapter.save_pretrained(folder / "adapter")
        made = stage("ppo", model, max_length=128, lora={"rank": 4}, reward=str(folder), cost=None)
        counts |= {
            name: next(m.count.all for m in made.models if m.role == "reward model"),
            "base": next(m.count.all for m in made.models if m.role == "base"),
        }
    width, values = LLAMA["hidden_size"], 128
    per_layer = 4 * ((width + width) + (width + values))
    assert (
        counts["same"] == LLAMA["num_hidden_layers"] * per_layer + width
        and counts["other"] > 0.5 * counts["base"]
    )


def test_constraints_in_the_long_form_are_planned_like_those_in_short(model):
    for critic, more in (
        (model, {}),
        (None, {"lora": {"rank": 4}}),
        (None, {"ppo": {"shared_critic": True}}),
    ):
        short = stage("ppo-lag", model, cost_critic=critic, **more)
        constraint = {"name": "cost", "cost": {"path": model}, "critic": critic}
        long = stage("ppo-lag", model, cost=None, constraints=[constraint], **more)
        assert moments(long) == moments(short) and [m.role for m in long.models] == [
            m.role for m in short.models
        ]


def test_overlap_adds_a_copy_and_both_sides_of_the_step(model):
    plain = stage("ppo-lag", model, max_length=128)
    ahead = stage("ppo-lag", model, max_length=128, ppo={"overlap": True, "importance_cap": 2.0})
    copy = next(m for m in ahead.models if m.role == "copy of the actor").states.weights
    assert moments(ahead)["update"] - moments(plain)["update"] == copy
    assert moments(ahead)["both at once"] > max(moments(ahead)["update"], moments(ahead)["rollout"])


def test_the_cache_grows_with_rows_and_is_bounded_by_the_batch(model):
    def cache(**sampling):
        made = stage(
            "ppo-lag",
            model,
            max_length=256,
            ppo={"batch_size": 8},
            sampling={"engine": "generate", **sampling},
        )
        return made.use["actor"]["cache"]

    assert cache(num_return_sequences=2) == 2 * cache() and cache(batch_size=4) == cache() // 2
    assert cache(max_new_tokens=64, max_prompt_length=64) == cache() // 2


def test_a_paged_cache_takes_what_is_free(model):
    values = {"max_length": 512, "ppo": {"batch_size": 512}, "sampling": {"engine": "continuous"}}
    roomy = stage("ppo-lag", model, device="cuda", memory=1 << 40, **values)
    tight = stage("ppo-lag", model, device="cuda", memory=moments(roomy)["rollout"] // 2, **values)
    assert tight.use["actor"]["cache"] < roomy.use["actor"]["cache"]
    server = stage("ppo-lag", model, max_length=128, sampling={"engine": "vllm-server"})
    assert "rollout" not in moments(server)


# ---------------------------------------------------------------- what makes it fit


def advice(kind, model, usable, gpus=8, **values):
    cfg = config(kind, model, **values)
    hardware = Hardware(gpus, usable, "cuda")
    return cfg, hardware, options.advise(kind, kind, cfg, hardware, {}, usable)


@pytest.mark.parametrize("kind, share", [("sft", 0.7), ("sft", 0.4), ("ppo-lag", 0.7), ("ppo-lag", 0.35)])
def test_what_is_advised_fits_and_nothing_of_it_is_idle(model, kind, share):
    values = (
        {"ppo": {"batch_size": 64}, "max_length": 256}
        if kind == "ppo-lag"
        else {"train": {"batch_size": 32, "max_length": 256}}
    )
    values["engine"] = {"config": {"zero_optimization": {"reduce_bucket_size": 10**6}}}
    before = stage(kind, model, 8, "cuda", **values).worst.total
    usable = int(share * before)
    cfg, hardware, found = advice(kind, model, usable, **values)
    assert found.enough and found.peak <= usable and found.tried[-1].fits
    peaks = []
    for left_out in (None, *found.enough):
        new = cfg
        for choice in found.enough:
            if choice is not left_out:
                for key in filter(None, (choice.key, choice.also)):
                    new = options.changed(new, key, choice.value)
        try:
            settings_of = dataclasses.replace(new)
            options.check_settings(kind, settings_of)
            peaks.append(plan_stage(kind, kind, new, hardware, {}).worst.total)
        except UserError:
            # cannot be left out: the rest does not go together without it
            peaks.append(usable + 1)
    assert peaks[0] == found.peak and all(peak > usable for peak in peaks[1:])


def test_what_cannot_fit_is_said_to_be_so(model):
    _, _, found = advice("sft", model, 1000, gpus=1)
    assert found.enough == [] and found.peak > 1000


def test_options_go_together_as_the_stage_itself_would_find(model):
    cfg = config("ppo-lag", model, lora={"rank": 4})
    assert options._possible("ppo-lag", cfg)
    assert not options._possible("ppo-lag", options.changed(cfg, "engine.zero_stage", 3))
    assert not options._possible(
        "sft", options.changed(config("sft", model), "engine.offload_optimizer", True)
    )


def test_settings_are_typed_as_the_command_line_takes_them(model):
    words = [
        choice.words("sft") for choice in options.choices("sft", config("sft", model), Hardware(8, 1, "cuda"))
    ]
    for word in words:
        _, overrides = split_words("sft", [w.removeprefix("sft.") for w in word.split()])
        load.load(
            "sft",
            None,
            {"model": "a", "data": "a", "output": "a", "train.gradient_checkpointing": "false", **overrides},
        )
    assert "sft.engine.zero_stage=3" in words and "sft.optim.kind=adamw-8bit" in words
    both = next(
        c for c in options.choices("ppo-lag", config("ppo-lag", model), Hardware(8, 1, "cuda")) if c.also
    )
    assert both.words("ppo-lag") == "ppo-lag.optim.kind=adamw-8bit ppo-lag.critic_optim.kind=adamw-8bit"


# ---------------------------------------------------------------- the command


def test_the_command_prints_every_stage_and_touches_nothing(model, tmp_path, capsys):
    recipe = tmp_path / "r.yaml"
    recipe.write_text(f"""
output: {tmp_path}/out
stages:
  - sft: {{model: '???', data: absent.json, train: {{max_length: 64}}}}
  - name: second
    dpo: {{model: '${{output}}/sft/model', data: absent.json, train: {{max_length: 64}}}}
""")
    before = kit.files(tmp_path)
    assert cli.main(["plan", str(recipe), "--gpus", "2", "--memory", "24", f"sft.model={model}"]) == 0
    text = capsys.readouterr().out
    assert (
        "sft: memory per GPU, 2 GPUs" in text
        and "second: memory per GPU in each phase" in text
        and "reference" in text
    )
    assert max(map(len, text.splitlines())) <= 120
    assert kit.files(tmp_path) == before


def test_sizes_below_a_tenth_of_a_gib_are_printed_in_smaller_units(model, capsys):
    sizes_and_texts = [(0, "0 B"), (1, "1 KiB"), (300 * 1024, "0.3 MiB"), (100 * MIB, "100.0 MiB")]
    sizes_and_texts += [(103 * MIB, "0.10 GiB"), (5 << 30, "5.00 GiB"), (80 << 30, "80.0 GiB")]
    assert [table.size_text(size) for size, _ in sizes_and_texts] == [text for _, text in sizes_and_texts]
    assert [table.size_cell(size) for size in (None, 0, 3 * MIB)] == ["–", "–", "3.0 MiB"]
    words = ["stage=sft", f"model={model}", "data=none", "output=none", "train.max_length=16"]
    assert cli.main(["plan", *words, "device=cpu", "lora.rank=4", "gpus=2"]) == 0
    text = capsys.readouterr().out
    assert "sft: memory per process, 2 processes" in text
    assert " MiB" in text and not re.search(r" 0\.00\b", text)


def test_the_command_prints_json(model, capsys):
    words = [
        "plan",
        "--json",
        "stage=sft",
        f"model={model}",
        "data=none.json",
        "output=none",
        "device=cpu",
        "memory=0.05",
        "train.batch_size=8",
        "gpus=1",
    ]
    assert cli.main(words) == 0
    found = json.loads(capsys.readouterr().out)
    (made,) = found["stages"]
    assert (
        found["device"] == "cpu"
        and not made["fits"]
        and made["peak"] == max(m["total"] for m in made["moments"])
    )
    assert made["options"] and {"setting", "costs", "alone", "together", "fits"} == set(made["options"][0])
    assert made["models"][0]["parameters"] == made["models"][0]["trained"]


def test_what_is_to_be_typed_works(model, capsys):
    base = [
        "plan",
        "--json",
        "stage=sft",
        f"model={model}",
        "data=none.json",
        "output=none",
        "device=cpu",
        "gpus=1",
        "train.batch_size=16",
        "train.max_length=256",
    ]
    assert cli.main([*base, "memory=100"]) == 0
    peak = json.loads(capsys.readouterr().out)["stages"][0]["peak"] / 2**30
    assert cli.main([*base, f"memory={0.6 * peak}"]) == 0
    words = json.loads(capsys.readouterr().out)["stages"][0]["type"]
    assert words
    typed = [word.removeprefix("sft.") for words_ in words for word in words_.split()]
    assert cli.main([*base, f"memory={0.6 * peak}", *typed]) == 0
    assert json.loads(capsys.readouterr().out)["stages"][0]["fits"]


@pytest.mark.parametrize(
    "words, line",
    [
        ([], "error: plan: missing: a recipe"),
        (["absent.yaml"], "error: absent.yaml: no such recipe"),
        (["quickstart", "--gpus", "0"], "error: command line: gpus: expected a whole number above 0, got 0"),
        (["quickstart", "memory=much"], "error: command line: memory: expected a number above 0, got much"),
        (["quickstart", "device=tpu"], "error: command line: device: expected one of cuda, cpu, got tpu"),
        (
            ["quickstart", "sft.train.epohs=3"],
            "error: command line: sft.train.epohs: unknown key; did you mean sft.train.epochs",
        ),
        (["quickstart", "sft.model=/no/where"], "error: sft.model: /no/where does not exist"),
        (["quickstart", "stage=sft"], "error: stage: quickstart has stages of its own"),
        (["stage=stf", "model=m"], "error: stage: expected one of sft, reward"),
        (
            ["stage=sft", "model=/no", "data=d", "output=o", "engine.offload_optimizer=true"],
            "error: engine.offload_optimizer: needs engine.zero_stage 1, 2 or 3, got 0",
        ),
    ],
)
def test_a_mistake_gets_one_line(words, line, capsys):
    assert cli.main(["plan", *words]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(line) and err.count("\n") == 1


def test_a_hub_name_without_a_network_says_what_to_give_instead(monkeypatch, capsys):
    from saferlhf_fast.models import folders

    def unreachable(name):
        raise UserError(
            f"{name}: expected a model folder or a model on the Hub; there is no such folder, and the Hub "
            f"says: no"
        )

    monkeypatch.setattr(folders, "_find_on_hub", unreachable)
    assert cli.main(["plan", "quickstart"]) == 2
    _, err = capsys.readouterr()
    assert err.count("\n") == 1 and "sft.model: HuggingFaceTB/SmolLM2-135M" in err and "sft.model=DIR" in err


def test_help_teaches(capsys):
    assert cli.main(["plan", "--help"]) == 0
    text = capsys.readouterr().out
    assert (
        text.startswith("usage: saferlhf-fast plan recipe.yaml") and "--json" in text and "examples:" in text
    )
    assert max(map(len, text.splitlines())) <= 130


# ---------------------------------------------------------------- against real peaks


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_plans_are_within_fifteen_percent_of_real_peaks(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(kit.ROOT / "bench")
    import plan_memory

    rows = list(plan_memory.compare(list(plan_memory.CASES), tmp_path))
    assert len(rows) == len(plan_memory.CASES)
    assert {row["case"]: row["ratio"] for row in rows if not 0.85 <= row["ratio"] <= 1.15} == {}


def test_frozen_models_lie_where_the_recipe_says(model):
    """engine.frozen=auto shards them under ZeRO-3 alone; sharded and replicated do as they are told."""
    persistent = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
    for zero, frozen, sharded in (
        (2, "auto", False),
        (2, "sharded", True),
        (3, "auto", True),
        (3, "replicated", False),
    ):
        made = stage(
            "ppo-lag", model, gpus=4, engine={"zero_stage": zero, "frozen": frozen, "config": persistent}
        )
        for held in made.models:
            if not held.trained:
                assert held.states.sharded == sharded, (zero, frozen, held.role)
        asked = [sent for sent in made.sent if sent.role in ("reference", "reward model", "cost model")]
        assert bool(asked) == sharded
