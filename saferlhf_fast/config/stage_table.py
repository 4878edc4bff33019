"""Every stage in one table: what it is called, its settings, where it lives, its help, and what else differs between stages.

Standard library only: the command line reads it before anything is imported. A new stage is a row here, a config class in
stages.py, and a planner in commands/plan/.
"""

from typing import NamedTuple


class StageSpec(NamedTuple):
    """One stage, or a command that has settings as stages have.

    Attributes:
        config: The class of its settings in stages.py.
        entry: "module:function" that runs it: the function takes the config and `restart` (see run_folder.open_run), and
            returns a summary that JSON can hold.
        help: One line for the list of commands.
        examples: Command lines for its `--help`, without the program's name.
        best_by: What train.best_metric can name.
        planner: The function in commands/plan/ that lists its phases, as "module:function"; "" where a recipe cannot name it.
        several_processes: Whether it starts a process for each GPU.
    """

    config: str
    entry: str
    help: str
    examples: tuple[str, ...]
    best_by: tuple[str, ...] = ()
    planner: str = ""
    several_processes: bool = True


_SCORE = "model=runs/sft/model data=PKU-Alignment/PKU-SafeRLHF"
_REWARD = "model=runs/sft/model reward=runs/reward/model"

STAGE_SPECS: dict[str, StageSpec] = {
    "sft": StageSpec(
        "SFTConfig", "saferlhf_fast.training.sft:train", "fine-tune a causal language model on instructions",
        ("sft model=Qwen/Qwen3-0.6B data=alpaca.json output=runs/sft",
         "sft recipe.yaml train.max_steps=10 --optim.learning_rate 1e-5 --overwrite"),
        best_by=("eval/loss",), planner="stage_phases:sft"),
    "reward": StageSpec(
        "PreferenceConfig", "saferlhf_fast.training.preference:train_reward", "train a reward model on helpfulness preferences",
        (f"reward {_SCORE} output=runs/reward", "reward recipe.yaml train.eval_fraction=0.1 --baseline"),
        best_by=("eval/loss", "eval/accuracy"), planner="stage_phases:preference"),
    "cost": StageSpec(
        "PreferenceConfig", "saferlhf_fast.training.preference:train_cost",
        "train a cost model on harmlessness preferences and safety labels",
        (f"cost {_SCORE} output=runs/cost", "cost recipe.yaml lora.rank=16 train.batch_size=8"),
        best_by=("eval/loss", "eval/accuracy", "eval/accuracy_sign"), planner="stage_phases:preference"),
    "ppo": StageSpec(
        "PPOConfig", "saferlhf_fast.training.ppo_lag:train_ppo",
        "optimise the policy for reward alone (or for R − ν·C: ppo.shaping)",
        (f"ppo {_REWARD} data=prompts.jsonl output=runs/ppo", "ppo recipe.yaml cost=runs/cost/model ppo.shaping=1.0"),
        planner="ppo_phases:ppo"),
    "ppo-lag": StageSpec(
        "PPOConfig", "saferlhf_fast.training.ppo_lag:train_ppo_lag",
        "optimise the policy for reward while its mean cost stays under a threshold",
        (f"ppo-lag {_REWARD} cost=runs/cost/model data=prompts.jsonl output=runs/ppo-lag",
         "ppo-lag recipe.yaml multiplier.rule=pid --multiplier.threshold -0.5"), planner="ppo_phases:ppo"),
    "dpo": StageSpec(
        "DPOConfig", "saferlhf_fast.training.dpo:train", "optimise the policy on preferences directly, without score models",
        ("dpo model=runs/sft/model data=pairs.jsonl output=runs/dpo beta=0.1", "dpo recipe.yaml --preference safer"),
        best_by=("eval/loss", "eval/reward_accuracy", "eval/reward_margin"), planner="stage_phases:dpo"),
    "evaluate": StageSpec(
        "EvaluateConfig", "saferlhf_fast.evaluation.evaluate:evaluate",
        "mean reward, mean cost, unsafe share, KL and length of a policy",
        ("evaluate model=runs/ppo-lag/model prompts=prompts.jsonl reward=runs/reward/model cost=runs/cost/model",
         "evaluate recipe.yaml output=runs/evaluation --sampling.max_new_tokens 128"), planner="ppo_phases:evaluate"),
}
"""The stages that a recipe can name, as the list of commands shows them."""

RUN = StageSpec("RunConfig", "", "several of these stages, one after the other, from one recipe",
                ("run recipe.yaml root=/data output=runs/mine",
                 "run quickstart sft.train.max_steps=10 --ppo-lag.ppo.max_steps 5"))
DEMO = StageSpec("DemoConfig", "saferlhf_fast.demo.run:run",
                 "the whole loop on an embedded world: no data, no network, minutes on two cores",
                 ("demo", "demo --seeds 0 1 2 output=runs/demo"), several_processes=False)

WITH_SETTINGS: dict[str, StageSpec] = {**STAGE_SPECS, "run": RUN, "demo": DEMO}
"""Every command whose settings come from a config class."""
