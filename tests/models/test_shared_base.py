"""One frozen base and adapters on it: every role is what it would be as a model of its own, and the base is
there once.
"""

from pathlib import Path

import kit
import pytest
import torch

from saferlhf_fast.config.stages import PPO, Engine, Lora, Optimizer, PPOConfig
from saferlhf_fast.models import multi_adapter
from saferlhf_fast.models.causal_lm import load_causal_lm
from saferlhf_fast.models.packing import pack_sequences, response_rows
from saferlhf_fast.models.policy import Policy
from saferlhf_fast.models.score_model import load_score_model
from saferlhf_fast.models.tokenizer import load_tokenizer
from saferlhf_fast.runtime import engine
from saferlhf_fast.training.ppo.load_roles import load_roles

pytestmark = pytest.mark.numeric

SEQUENCES = [[5, 6, 7, 8, 9], [9, 8, 7], [6, 6, 5, 4]]
LORA = {"lora__rank": 4, "lora__alpha": 32}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A tiny policy; a reward model trained with LoRA on it, and a cost model with weights of its own."""
    folder = tmp_path_factory.mktemp("shared_base")
    base = kit.make_model(folder / "model")
    data = kit.make_data(folder / "data")
    kit.run(
        "reward",
        folder / "reward",
        model=base,
        data=data["pairs"],
        train__epochs=6,
        train__max_length=32,
        optim__learning_rate=2e-2,
        **LORA,
    )
    whole = kit.make_scores(folder / "whole", base)
    return {
        "folder": folder,
        "model": base,
        "reward": str(folder / "reward" / "model"),
        "cost": whole["cost"],
        **data,
    }


def packed():
    return pack_sequences(SEQUENCES, [response_rows(1, len(ids)) for ids in SEQUENCES], "cpu")


def make_roles(world, **settings):
    given = {"ppo": PPO(), "lora": Lora(rank=4, alpha=32), "engine": Engine(precision="fp32"), **settings}
    cfg = PPOConfig(
        model=world["model"],
        reward=world["reward"],
        cost=world["cost"],
        data="none",
        output="none",
        optim=Optimizer(learning_rate=1e-2),
        max_length=64,
        **given,
        critic_optim=Optimizer(learning_rate=1e-2, schedule="constant"),
    )
    engine.start(cfg.engine, 0)
    return load_roles(cfg, load_tokenizer(world["model"]), 9, constrained=True)


def scramble(roles):
    """Gives every adapter weights that do something, another for each role."""
    torch.manual_seed(3)
    with torch.no_grad():
        for model in roles.trained:
            for parameter in model.module.adapter:
                parameter.normal_(0.0, 0.1)


def test_each_role_is_a_model_of_its_own(world):
    """Reference = the base; actor = the merged model; the reward model's adapter = the whole model that was
    saved with it.
    """
    roles = make_roles(world)
    scramble(roles)
    base = Policy(load_causal_lm(world["model"]))
    torch.testing.assert_close(roles.reference(packed()), base(packed()).detach())
    values = roles.critics[0].engine(packed())
    actor_logp = roles.actor(packed())
    merged = load_causal_lm(world["model"])
    from saferlhf_fast.models.lora import plain_state

    merged.load_state_dict(plain_state(roles.actor.module.lm))
    torch.testing.assert_close(actor_logp, Policy(merged)(packed()), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(actor_logp, base(packed()), atol=1e-2)
    torch.testing.assert_close(roles.reference(packed()), base(packed()).detach())
    torch.testing.assert_close(roles.critics[0].engine(packed()), values)

    whole = load_score_model(world["reward"])
    torch.testing.assert_close(
        roles.scorers["reward"].model(packed()), whole(packed()).detach(), rtol=1e-4, atol=1e-5
    )


def test_critics_start_from_their_score_model(world):
    """The reward critic from the reward adapter; the cost model is no adapter, so its critic starts without
    it, which is said.
    """
    roles = make_roles(world)
    whole = load_score_model(world["reward"])
    torch.testing.assert_close(roles.critics[0].engine(packed()), whole(packed()), rtol=1e-4, atol=1e-5)
    assert not isinstance(roles.scorers["cost"].model.module, type(roles.scorers["reward"].model.module))


def test_the_base_lies_in_memory_once(world):
    roles = make_roles(world)
    shared_base = roles.actor.module.shared_base
    modules = [
        roles.actor.module,
        roles.reference.module,
        roles.scorers["reward"].model.module,
        *(critic.engine.module for critic in roles.critics),
    ]
    assert all(module.shared_base is shared_base for module in modules)
    embeddings = [
        p
        for p in shared_base.lm.parameters()
        if p.numel() == shared_base.base.get_input_embeddings().weight.numel()
    ]
    assert len(embeddings) == 2  # the input's and the head's: no copy of either
    assert not any(p.requires_grad for name, p in shared_base.lm.named_parameters() if "lora_" not in name)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_backwards_reach_their_own_adapter_alone(world, checkpointing):
    """Forwards of all roles first, backwards in another order, as the update does; recomputed activations are
    the role's.
    """
    roles = make_roles(world, gradient_checkpointing=checkpointing)
    scramble(roles)
    roles.train()
    logp, reward_values, cost_values = (
        roles.actor(packed()),
        roles.critics[0].engine(packed()),
        roles.critics[1].engine(packed()),
    )
    losses = (
        (roles.critics[1].engine, cost_values),
        (roles.actor, logp),
        (roles.critics[0].engine, reward_values),
    )
    for model, out in losses:
        model.backward((out * torch.arange(len(out))).sum())
    got = [[p.grad.clone() for p in model.module.parameters()] for model, _ in losses]
    for (model, _), gradients in zip(losses, got):
        for parameter in model.module.parameters():
            parameter.grad = None
        out = model(packed())
        model.backward((out * torch.arange(len(out))).sum())
        for parameter, gradient in zip(model.module.parameters(), gradients):
            torch.testing.assert_close(parameter.grad, gradient)
            assert gradient.abs().sum() > 0


@pytest.mark.parametrize(
    "settings", [{}, {"ppo__shared_critic": True, "engine__zero_stage": 2, "gradient_checkpointing": True}]
)
def test_ppo_lag_on_one_shared_base(world, tmp_path, capsys, settings):
    """A run: the KL starts at 0, moves, and the saved actor is a plain model with the adapter merged."""
    out = kit.run(
        "ppo-lag",
        tmp_path / "lag",
        model=world["model"],
        reward=world["reward"],
        cost=world["cost"],
        data=world["prompts"],
        max_length=24,
        ppo__batch_size=4,
        ppo__max_steps=3,
        optim__learning_rate=1e-2,
        **{**LORA, **settings},
    )
    assert "cost: a whole model beside the shared base" in capsys.readouterr().out
    kl = kit.losses(out, "train/kl_divergence")
    assert kl[0] == pytest.approx(0.0, abs=1e-6) and abs(kl[2]) > 1e-5
    assert (
        len(kit.losses(out, "train/cost_critic_loss")) == 3
        and kit.losses(out, "train/cost_critic_grad_norm")[0] > 0
    )
    from safetensors.torch import load_file

    saved, before = (
        load_file(Path(folder) / "model.safetensors") for folder in (out / "model", world["model"])
    )
    assert sorted(saved) == sorted(before)
    changed = [name for name in saved if not torch.equal(saved[name], before[name])]
    assert changed and all("proj" in name for name in changed)


def test_shards_of_adapters_change_nothing(world, tmp_path):
    """ZeRO-0, 1 and 2, and a step of its own for old log-probs: the same figures."""
    runs = [
        kit.run(
            "ppo-lag",
            tmp_path / str(i),
            model=world["model"],
            reward=world["reward"],
            cost=world["cost"],
            data=world["prompts"],
            max_length=24,
            ppo__batch_size=4,
            ppo__max_steps=3,
            **LORA,
            **settings,
        )
        for i, settings in enumerate(
            ({}, {"engine__zero_stage": 1}, {"engine__zero_stage": 2}, {"ppo__single_pass": False})
        )
    ]
    for name in ("actor_loss", "reward_critic_loss", "cost_critic_loss", "kl_divergence", "actor_grad_norm"):
        first, *others = (kit.losses(run, f"train/{name}") for run in runs)
        for other in others:
            assert other == pytest.approx(first, rel=1e-3, abs=1e-5), name


def test_two_heads_on_one_critic_without_adapters(world, tmp_path):
    """One backbone, two value heads: the reward's starts as a critic of its own would; both learn, by one
    backward.
    """
    runs = [
        kit.run(
            "ppo-lag",
            tmp_path / str(shared),
            model=world["model"],
            reward=world["reward"],
            cost=world["cost"],
            data=world["prompts"],
            max_length=24,
            ppo__batch_size=8,
            ppo__max_steps=2,
            ppo__shared_critic=shared,
        )
        for shared in (True, False)
    ]
    loss = [
        {name: kit.losses(run, f"train/{name}_critic_loss") for name in ("reward", "cost")} for run in runs
    ]
    assert loss[0]["reward"][0] == pytest.approx(loss[1]["reward"][0], rel=1e-5)
    assert loss[0]["cost"][0] != pytest.approx(loss[1]["cost"][0], rel=1e-3)
    assert kit.losses(runs[0], "train/reward_critic_grad_norm") == kit.losses(
        runs[0], "train/cost_critic_grad_norm"
    )

    roles = make_roles(world, lora=Lora(), ppo=PPO(shared_critic=True))
    (critic,) = roles.critics
    assert critic.names == ("reward", "cost") and roles.trained == [roles.actor, roles.critics[0].engine]
    wanted = {"reward": torch.linspace(-1, 1, 9), "cost": torch.linspace(2, 0, 9)}
    errors = []
    for _ in range(30):
        values = critic(packed())
        parts = [(values[name] - wanted[name]).square().mean() for name in wanted]
        errors.append([part.item() for part in parts])
        critic.engine.backward(sum(parts))
        critic.engine.step()
    # at most 0.03 over 5 seeds
    assert errors[-1][0] < 0.4 * errors[0][0] and errors[-1][1] < 0.4 * errors[0][1]


def test_what_does_not_go_with_a_trunk_is_said(world, tmp_path, capsys):
    for settings, said in (
        ({"engine.zero_stage": 3}, "engine.zero_stage: expected 0, 1 or 2 with lora.rank, got 3"),
        ({"engine.frozen": "sharded"}, "engine.frozen: expected auto or replicated with lora.rank, whose"),
        ({"reward_critic": world["reward"]}, "reward_critic: expected none with lora.rank"),
    ):
        words = [f"{key}={value}" for key, value in settings.items()]
        code = kit.main(
            "ppo-lag",
            f"model={world['model']}",
            f"reward={world['reward']}",
            f"cost={world['cost']}",
            f"data={world['prompts']}",
            f"output={tmp_path / 'no'}",
            "lora.rank=2",
            "max_length=64",
            *words,
        )
        assert code != 0 and said in capsys.readouterr().err
        assert not (tmp_path / "no" / "model").exists()


def test_the_saved_adapter_is_read_by_peft(world):
    """As AutoPeftModelForSequenceClassification reads it: the scores of the whole model."""
    from peft import AutoPeftModelForSequenceClassification

    folder = Path(world["reward"]) / "adapter"
    assert multi_adapter.load_score_adapter(world["reward"], world["cost"]) is None  # of another base
    theirs = AutoPeftModelForSequenceClassification.from_pretrained(folder, num_labels=1)
    theirs.config.pad_token_id = 3
    ours = load_score_model(world["reward"])
    ids = torch.tensor([SEQUENCES[0]])
    expected = ours(ids, torch.ones_like(ids))[0, -1]
    assert theirs(input_ids=ids).logits[0, 0].item() == pytest.approx(expected.item(), rel=1e-4)
