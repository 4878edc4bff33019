"""The side of bench_step.py that runs this library: the whole loop of `saferlhf_fast.training.ppo_lag`.

It runs on random models, with a clock around the parts of a step.

`unfused` is the same with `engine.packing=false` and SAFERLHF_IMPL=reference, which bench_step.py sets:
padded rows, every op in plain torch. The recipe is the stage's default. So micro-batches are filled by
tokens, score and update share their passes where that is allowed, and the rollout engine is the device's
default. The rollout part is sampling and packing; the score part is every pass without gradient; the update
part is the rest of a step, metrics on the host included. Left out: data, logging, evaluation, checkpoints.
"""

import dataclasses

import step_work
import torch
from step_safe_rlhf import now
from step_words import one_word_an_id

# Functions that `loop` calls, by their names in rollout/sample.py and training/ppo_lag.py: the part of the
# step to which their time belongs.
PARTS = {
    "sample": "rollout",
    "score_rollout": "score",
    "old_logprobs_and_values": "score",
    "advantages": "score",
}


class Limited:
    """A rollout engine that ends each prompt's response at a given length.

    This makes the token counts of all sides equal.
    """

    def __init__(self, engine, work):
        self.engine = engine
        self.limits = {tuple(ids): limit for ids, limit in zip(work.prompts, work.limits)}

    def generate(self, prompts, seeds, limits):
        return self.engine.generate(prompts, seeds, [self.limits[tuple(ids)] for ids in prompts])

    def __getattr__(self, name):
        return getattr(self.engine, name)


def make_config(work, recipe):
    """Returns the stage's default settings for this work, with the recipe's `lora` and `micro_tokens`."""
    from saferlhf_fast.config import stages
    from saferlhf_fast.runtime.engine import world_size

    return stages.PPOConfig(
        model="random",
        reward=SEEDS["reward"],
        cost=SEEDS["cost"],
        data="none",
        output="none",
        seed=0,
        max_length=max(512, work.longest),
        lora=stages.Lora(rank=recipe["lora"]),
        ppo=stages.PPO(batch_size=len(work.prompts) // world_size(), micro_tokens=recipe["micro_tokens"]),
        engine=stages.Engine(
            packing=recipe["packing"], precision="bf16" if work.shape.dtype == "bfloat16" else "fp32"
        ),
    )


# the "paths" of the score models name the seed of their random weights
SEEDS = {"reward": "random 1", "cost": "random 2"}


def make_roles(work, cfg, steps):
    """Returns the Roles of `load_roles`, with models from seeds instead of files.

    With `lora` the score models are adapters of the actor's base, so that there is one shared base.
    """
    from saferlhf_fast.models import lora, multi_adapter
    from saferlhf_fast.models.score_model import ScoreModel
    from saferlhf_fast.rollout import scorers
    from saferlhf_fast.rollout.engines import open_generator
    from saferlhf_fast.runtime import engine
    from saferlhf_fast.training.ppo import load_roles

    tokenizer, where = one_word_an_id(work.shape.vocabulary), engine.device()

    def score_model(path, **ignored):
        backbone, head = step_work.backbone(work.shape, int(path.split()[1]), where)
        score = ScoreModel(backbone)
        with torch.no_grad():
            score.score.weight.copy_(head)
        return score

    def adapter(path, base):
        return multi_adapter.Saved(
            lora.lora_config(cfg.lora, "CAUSAL_LM"), {}, torch.randn(1, work.shape.hidden) * 0.02
        )

    def random_adapter(model, role, state):
        for parameter in multi_adapter.parameters(model, role):
            torch.nn.init.normal_(parameter, 0.0, 0.01)

    load_roles.load_causal_lm = lambda path, **ignored: step_work.causal_lm(work.shape, device=where)
    for room in (scorers, load_roles):
        room.load_score_model, room.load_tokenizer = score_model, lambda path, **ignored: tokenizer
        room.reads_pairs = lambda path, trust_remote_code: False
    multi_adapter.of_score, multi_adapter.load = adapter, random_adapter
    roles = load_roles.load_roles(cfg, tokenizer, steps, constrained=True)
    # An end token that is never sampled: a random policy must not end where the other sides do not.
    never = [work.shape.vocabulary]
    generator = open_generator(roles.actor, tokenizer, never, cfg.sampling)
    return dataclasses.replace(roles, ends=never, generator=Limited(generator, work))


class Side:
    """The measured side.

    `step()` returns the seconds of rollout, score and update of one whole step; `check()` returns sums to
    compare with other sides.
    """

    def __init__(self, work, recipe):
        from saferlhf_fast.data.examples import PromptExample, SFTExample
        from saferlhf_fast.rollout import sample
        from saferlhf_fast.runtime import engine
        from saferlhf_fast.training import ppo_lag
        from saferlhf_fast.training.ppo.constraints import make_multipliers

        self.work, self.page, self.steps, self.seconds = work, ppo_lag, [], {}
        self.cfg = make_config(work, recipe)
        engine.start(self.cfg.engine, 0)
        self.device, self.processes = engine.device(), engine.world_size()
        self.count = recipe["warmup"] + recipe["repeat"]
        self.roles = make_roles(work, self.cfg, self.count + 1)
        self.multipliers = make_multipliers(self.cfg)
        self.prompts = [PromptExample(ids, "", ()) for ids in work.prompts]
        self.ptx = None
        if recipe["ptx"]:
            self.ptx = [
                SFTExample(p + r, [False] * len(p) + [True] * len(r))
                for p, r in zip(work.prompts, work.responses)
            ]
        for name, part in PARTS.items():
            room = sample if name == "sample" else ppo_lag
            setattr(room, name, self._timed(getattr(room, name), part))

    def _timed(self, call, part):
        def timed(*args, **more):
            start = now(self.device)
            result = call(*args, **more)
            self.seconds[part] = self.seconds.get(part, 0.0) + now(self.device) - start
            return result

        return timed

    def step(self):
        """Returns the next of the steps that `loop` made."""
        if not self.steps:
            self._run()
        return self.steps.pop(0)

    def _run(self):
        self.seconds, self.start = {}, now(self.device)

        from saferlhf_fast.training.ppo.prompts import ptx_batches, rollouts_of

        def after_step(step, metrics, rollout, scored, bad):
            end = now(self.device)
            split = {name: self.seconds.get(name, 0.0) for name in ("rollout", "score")}
            tokens = sum(minibatch.tokens for minibatch in rollout.minibatches)
            self.steps.append({**split, "update": end - self.start - sum(split.values()), "tokens": tokens})
            self.seconds, self.start = {}, now(self.device)

        rollouts = rollouts_of(self.roles, self.prompts, self.cfg, self.count)
        self.page.loop(
            self.roles,
            rollouts,
            ptx_batches(self.ptx, self.cfg),
            self.multipliers,
            self.cfg,
            self.count,
            after_step,
        )

    def check(self):
        """Scores and updates once on the stored responses and returns sums to compare with other sides."""
        from saferlhf_fast.rollout import scoring
        from saferlhf_fast.rollout.batch import assemble
        from saferlhf_fast.rollout.types import Response
        from saferlhf_fast.training.ppo.update import in_one_pass, update_in_one_pass

        if self.processes > 1:
            return {}
        rollout = assemble(
            self.prompts,
            [Response(list(ids), None, True) for ids in self.work.responses],
            self.roles.tokenizer,
            self.cfg.pass_tokens(),
        )
        scored = scoring.score_rollout(rollout, self.roles, self.cfg)
        old = scoring.old_logprobs_and_values(rollout, self.roles, self.cfg)

        def total(tensor):
            return tensor.double().sum().item()

        sums = {
            "logp": total(old["logp_N"]),
            "ref_logp": total(scored.ref_logp_N),
            "reward": total(scored.reward_B),
            "reward_values": total(old["values"]["reward"]),
            "cost": total(scored.costs["cost"]),
            "cost_values": total(old["values"]["cost"]),
        }
        assert in_one_pass(self.cfg, self.roles), (
            "the default recipe shares one pass between scoring and the update"
        )
        lambdas = {name: multiplier.value for name, multiplier in self.multipliers.items()}
        step_metrics = update_in_one_pass(self.roles, rollout, scored, lambdas, self.cfg)
        self.roles.generator.refresh()
        return sums | {
            f"{name}_critic_loss": total(step_metrics.sums[f"{name}_critic_loss"])
            for name in ("reward", "cost")
        }
