"""Every stage in one table: its name, its settings, its function, its help, and what else differs.

Standard library only: the command line reads it before it imports anything else. A new stage is a row here, a
config class in stages.py, and a planner in commands/plan/.
"""

from typing import NamedTuple


class Family(NamedTuple):
    """Stages that work alike, and the keys of the settings that every stage has in some form.

    Attributes:
        step: The name of one step in a plan's text.
        max_length: Key of the longest sequence (tokens).
        pass_rows: Key of the sequences, or examples, in a pass when all of them have that length.
        pass_tokens: Key of the most tokens of a pass, which replaces `pass_rows` when it is given; "" where
            there is none.
        recomputation: Key of the switch that recomputes activations in the backward pass; "" where nothing
            is trained.
    """

    step: str
    max_length: str
    pass_rows: str
    pass_tokens: str = ""
    recomputation: str = ""


FAMILIES: dict[str, Family] = {
    "supervised": Family(
        "optimiser step",
        "train.max_length",
        "train.batch_size",
        "train.micro_tokens",
        "train.gradient_checkpointing",
    ),
    "ppo": Family(
        "batch of rollouts",
        "max_length",
        "ppo.micro_batch_size",
        "ppo.micro_tokens",
        "gradient_checkpointing",
    ),
    "evaluation": Family("batch", "max_length", "batch_size"),
}


class StageSpec(NamedTuple):
    """One stage, or a command that has settings as stages have.

    Attributes:
        config: The class of its settings in stages.py.
        entry: "module:function" that runs it: the function takes the config and `restart` (see
            run_folder.open_run), and returns a summary that can be written as JSON.
        help: One line for the list of commands.
        examples: Command lines for its `--help`, without the program's name.
        family: Its key in FAMILIES; "" where a recipe cannot name it.
        sequences: How many sequences one example has: 2 for pairs.
        best_by: What train.best_metric can name.
        planner: The function in commands/plan/ that lists its phases, as "module:function"; "" where a recipe
            cannot name it.
        several_processes: Whether it starts a process for each GPU.
    """

    config: str
    entry: str
    help: str
    examples: tuple[str, ...]
    family: str = ""
    sequences: int = 1
    best_by: tuple[str, ...] = ()
    planner: str = ""
    several_processes: bool = True


_SCORE = "model=runs/sft/model data=PKU-Alignment/PKU-SafeRLHF"
_REWARD = "model=runs/sft/model reward=runs/reward/model"

STAGE_SPECS: dict[str, StageSpec] = {
    "sft": StageSpec(
        "SFTConfig",
        "saferlhf_fast.training.sft:train",
        "fine-tune a causal language model on instructions",
        (
            "sft model=Qwen/Qwen3-0.6B data=alpaca.json output=runs/sft",
            "sft recipe.yaml train.max_steps=10 --optim.learning_rate 1e-5 --overwrite",
        ),
        family="supervised",
        best_by=("eval/loss",),
        planner="stage_phases:sft",
    ),
    "reward": StageSpec(
        "PreferenceConfig",
        "saferlhf_fast.training.preference:train_reward",
        "train a reward model on helpfulness preferences",
        (f"reward {_SCORE} output=runs/reward", "reward recipe.yaml train.eval_fraction=0.1 --baseline"),
        family="supervised",
        sequences=2,
        best_by=("eval/loss", "eval/accuracy"),
        planner="stage_phases:preference",
    ),
    "cost": StageSpec(
        "PreferenceConfig",
        "saferlhf_fast.training.preference:train_cost",
        "train a cost model on harmlessness preferences and safety labels",
        (f"cost {_SCORE} output=runs/cost", "cost recipe.yaml lora.rank=16 train.batch_size=8"),
        family="supervised",
        sequences=2,
        best_by=("eval/loss", "eval/accuracy", "eval/accuracy_sign"),
        planner="stage_phases:preference",
    ),
    "ppo": StageSpec(
        "PPOConfig",
        "saferlhf_fast.training.ppo_lag:train_ppo",
        "optimise the policy for reward alone (or for R − ν·C: ppo.shaping)",
        (
            f"ppo {_REWARD} data=prompts.jsonl output=runs/ppo",
            "ppo recipe.yaml cost=runs/cost/model ppo.shaping=1.0",
        ),
        family="ppo",
        planner="ppo_phases:ppo",
    ),
    "ppo-lag": StageSpec(
        "PPOConfig",
        "saferlhf_fast.training.ppo_lag:train_ppo_lag",
        "optimise the policy for reward while its mean cost stays under a threshold",
        (
            f"ppo-lag {_REWARD} cost=runs/cost/model data=prompts.jsonl output=runs/ppo-lag",
            "ppo-lag recipe.yaml multiplier.rule=pid --multiplier.threshold -0.5",
        ),
        family="ppo",
        planner="ppo_phases:ppo",
    ),
    "dpo": StageSpec(
        "DPOConfig",
        "saferlhf_fast.training.dpo:train",
        "optimise the policy on preferences directly, without score models",
        (
            "dpo model=runs/sft/model data=pairs.jsonl output=runs/dpo beta=0.1",
            "dpo recipe.yaml --preference safer",
        ),
        family="supervised",
        sequences=2,
        best_by=("eval/loss", "eval/reward_accuracy", "eval/reward_margin"),
        planner="stage_phases:dpo",
    ),
    "moderation": StageSpec(
        "ModerationConfig",
        "saferlhf_fast.moderation.train:train",
        "train a moderator (moderation train): harm categories, severity, refusal, calibrated",
        (
            "moderation train model=runs/sft/model data=PKU-Alignment/PKU-SafeRLHF-QA output=runs/moderation "
            "train.eval_fraction=0.1",
            "moderation train recipe.yaml features=ngrams --lora.rank 8",
        ),
        family="supervised",
        best_by=("eval/loss", "eval/loss_categories", "eval/loss_severity", "eval/loss_refusal"),
        planner="stage_phases:moderation",
    ),
    "evaluate": StageSpec(
        "EvaluateConfig",
        "saferlhf_fast.evaluation.evaluate:evaluate",
        "mean reward, mean cost, unsafe share, KL and length of a policy",
        (
            "evaluate model=runs/ppo-lag/model prompts=prompts.jsonl reward=runs/reward/model "
            "cost=runs/cost/model",
            "evaluate recipe.yaml output=runs/evaluation --sampling.max_new_tokens 128",
        ),
        family="evaluation",
        planner="ppo_phases:evaluate",
    ),
}
"""The stages that a recipe can name, as the list of commands shows them."""

RUN = StageSpec(
    "RunConfig",
    "",
    "several of these stages, one after the other, from one recipe",
    (
        "run recipe.yaml root=/data output=runs/mine",
        "run quickstart sft.train.max_steps=10 --ppo-lag.ppo.max_steps 5",
    ),
)
DEMO = StageSpec(
    "DemoConfig",
    "saferlhf_fast.demo.run:run",
    "the whole loop on an embedded world: no data, no network, minutes on two cores",
    ("demo", "demo --seeds 0 1 2 output=runs/demo"),
    several_processes=False,
)
MODERATION = {
    "moderation evaluate": StageSpec(
        "ModerationEvaluateConfig",
        "",
        "how good a moderator is on labelled answers",
        ("moderation evaluate model=runs/moderation/model data=test.jsonl output=runs/quality",),
        several_processes=False,
    ),
    "moderation classify": StageSpec(
        "ModerationClassifyConfig",
        "",
        "judge answers of files or of standard input",
        (
            "moderation classify model=runs/moderation/model input=answers.jsonl output=judged.jsonl",
            "moderation classify model=runs/moderation/model --stream < answers.jsonl",
        ),
        several_processes=False,
    ),
    "moderation serve": StageSpec(
        "ModerationServeConfig",
        "",
        "a moderator behind HTTP, as OpenAI's moderations endpoint and for pairs",
        (
            "moderation serve model=runs/moderation/model",
            "moderation serve model=runs/moderation/model port=9000 token_file=token preset=strict",
        ),
        several_processes=False,
    ),
}
"""What a moderator can do beside being trained, by command."""

JUDGE = {
    "evaluate judge-calibration": StageSpec(
        "JudgeCalibrationConfig",
        "",
        "how often an LLM judge agrees with people's labels of pairs",
        (
            "evaluate judge-calibration judge.base_url=http://127.0.0.1:8000/v1 judge.model=NAME "
            "data=pairs.jsonl output=runs/judge",
            "evaluate judge-calibration recipe.yaml judge.max_requests=500",
        ),
        several_processes=False,
    ),
}
"""What an LLM judge can do beside judging models in `evaluate`, by command."""

WITH_SETTINGS: dict[str, StageSpec] = {**STAGE_SPECS, "run": RUN, "demo": DEMO, **MODERATION, **JUDGE}
"""Every command whose settings come from a config class."""


def stages_of(*families: str) -> tuple[str, ...]:
    """Returns the names of the stages of some families, one family after the other."""
    return tuple(name for family in families for name, spec in STAGE_SPECS.items() if spec.family == family)
