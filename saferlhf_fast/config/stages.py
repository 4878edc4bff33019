"""Every setting of every stage: frozen, typed, strict.

No torch here: a wrong key ends in well under a second.

One dataclass per stage, made of groups that several stages share (sections.py). The docstring under a field
is its `--help` text; units are in parentheses. Defaults are the recipe of the Safe RLHF paper's reference
implementation. Recipes (YAML) and `key=value` overrides are merged over these defaults by
`saferlhf_fast.config.load`, which also reports errors. Values are never written back: what is derived is a
function of the config.
"""

from dataclasses import field, fields
from typing import ClassVar, Literal

from .sections import (
    COST,
    PPO,
    REWARD,
    Checkpoint,
    Constraint,
    Data,
    Engine,
    Evaluation,
    Logging,
    Lora,
    ModelPath,
    Multiplier,
    NonNegative,
    NonNegativeInt,
    Optimizer,
    Output,
    Positive,
    PositiveInt,
    PreferenceData,
    Sampling,
    Scorer,
    Seed,
    Source,
    Training,
    frozen_keywords,
    scorer_spec,
)
from .stage_table import STAGE_SPECS

__all__ = [
    "PPO",
    "STAGES",
    "Checkpoint",
    "Constraint",
    "Data",
    "DemoConfig",
    "DPOConfig",
    "Engine",
    "Evaluation",
    "EvaluateConfig",
    "Logging",
    "Lora",
    "Multiplier",
    "Optimizer",
    "PPOConfig",
    "PreferenceConfig",
    "RunConfig",
    "SFTConfig",
    "Sampling",
    "Source",
    "StageConfig",
    "Training",
]


@frozen_keywords
class StageConfig:
    """What every stage of a recipe has. Stages inherit from it, and from nothing else."""

    seed: Seed = 42
    """Seed of everything random."""
    overwrite: bool = False
    """Replace an existing output folder."""
    resume: str | None = None
    """Go on from a checkpoint: auto takes the newest complete one in <output>/checkpoints (none there: starts anew), or name
    one's folder."""
    template: Literal["auto", "tokenizer", "safe-rlhf", "none"] = "auto"
    """Conversation template: auto (the tokenizer's own, else safe-rlhf), tokenizer, safe-rlhf, or none."""
    trust_remote_code: bool = False
    """Run Python code that lies in the model's folder or Hub repository."""
    allow_pickle: bool = False
    """Read weights from .bin files (pickles) where a model has no .safetensors; tensors alone are taken from them."""
    engine: Engine = field(default_factory=Engine)

    def groups(self, kind):
        """{name: settings} of the groups of one class from sections.py: a stage may have none, one, or
        several (PPO's two optimisers).
        """
        return {
            f.name: getattr(self, f.name) for f in fields(self) if isinstance(getattr(self, f.name), kind)
        }


@frozen_keywords
class SFTConfig(StageConfig):
    """sft: supervised fine-tuning of a causal language model on instruction data (next-token loss over
    responses).
    """

    model: ModelPath
    """Causal language model to start from: a folder or a Hub name."""
    data: Data
    """Instruction data: a path, a Hub name, or a list of sources."""
    output: Output
    train: Training = field(default_factory=lambda: Training(epochs=3, batch_size=4, accumulation=8))
    optim: Optimizer = field(default_factory=Optimizer)
    lora: Lora = field(default_factory=Lora)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    log: Logging = field(default_factory=Logging)


@frozen_keywords
class PreferenceConfig(StageConfig):
    """reward, cost: a score model from preferences; the cost model's loss adds the safety-sign terms."""

    model: ModelPath
    """Backbone to start from (usually the SFT model), or a score model to go on from: a folder or a Hub name."""
    data: PreferenceData
    output: Output
    regularization: NonNegative = 0.001
    """c: weight of the mean squared score in the loss."""
    loss: Literal["sequence", "token"] = "sequence"
    """sequence: last-token scores; token: mean over positions from the first difference of the two responses."""
    drop_bias: bool = False
    """Leave out a bias or normaliser that `model` brought along, so that transformers' own class gives the saved
    model's scores; the shift is printed. Otherwise both are kept in the saved config and applied by our loader."""
    baseline: bool = False
    """Report TF-IDF with logistic regression on the same pairs beside the model (needs scikit-learn)."""
    train: Training = field(default_factory=lambda: Training(epochs=2, batch_size=16))
    optim: Optimizer = field(default_factory=lambda: Optimizer(weight_decay=0.1))
    lora: Lora = field(default_factory=Lora)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    log: Logging = field(default_factory=Logging)


@frozen_keywords
class DPOConfig(StageConfig):
    """dpo: direct preference optimisation, −log σ(β(Δlogp_chosen − Δlogp_rejected)) (Rafailov et al., 2023)."""

    model: ModelPath
    """Causal language model to start from, and the frozen reference: a folder or a Hub name."""
    data: PreferenceData
    output: Output
    beta: Positive = 0.1
    """β: strength of the pull towards the reference."""
    preference: Literal["better", "safer"] = "better"
    """Which label of a safety record says what is chosen: the more helpful or the safer response."""
    train: Training = field(default_factory=lambda: Training(epochs=2, batch_size=16))
    optim: Optimizer = field(default_factory=lambda: Optimizer(learning_rate=1e-6))
    lora: Lora = field(default_factory=Lora)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    log: Logging = field(default_factory=Logging)


@frozen_keywords
class PPOConfig(StageConfig):
    """ppo, ppo-lag: policy optimisation with a reward model; ppo-lag holds the mean cost under a threshold.

    multiplier.* and evaluation.margin are for ppo-lag alone: ppo has no constraint and refuses them.
    """

    model: ModelPath
    """Actor to start from (the SFT model), and the frozen reference: a folder or a Hub name."""
    reward: Scorer
    """Reward model: a folder or a Hub name."""
    data: Data
    """Prompts: a path, a Hub name, or a list of sources."""
    output: Output
    cost: Scorer | None = None
    """Cost model: a folder or a Hub name (ppo-lag; in ppo only with ppo.shaping, or to report costs)."""
    reward_critic: ModelPath | None = None
    """Reward critic to start from; the reward model when not given."""
    cost_critic: ModelPath | None = None
    """Cost critic to start from; the cost model when not given."""
    constraints: list[Constraint] | None = None
    """The long form of cost, cost_critic and multiplier (ppo-lag): [{name: …, cost: …, critic: …, multiplier: {…}}]."""
    ptx: Data | None = None
    """Instruction data for the supervised loss that keeps the policy's abilities."""
    max_length: PositiveInt = 512
    """Longest prompt + response (tokens)."""
    save_interval: PositiveInt | None = None
    """Save the actor every so many steps, besides the end (steps)."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    ppo: PPO = field(default_factory=PPO)
    multiplier: Multiplier = field(default_factory=Multiplier)
    sampling: Sampling = field(default_factory=Sampling)
    optim: Optimizer = field(default_factory=lambda: Optimizer(learning_rate=1e-5, weight_decay=0.01))
    critic_optim: Optimizer = field(
        default_factory=lambda: Optimizer(learning_rate=5e-6, schedule="constant", weight_decay=0.0)
    )
    evaluation: Evaluation = field(default_factory=Evaluation)
    lora: Lora = field(default_factory=Lora)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    log: Logging = field(default_factory=Logging)

    def pass_tokens(self):
        """Most tokens of a forward and backward pass."""
        return self.ppo.micro_tokens or self.ppo.micro_batch_size * self.max_length

    def long_form(self):
        """[Constraint]: `constraints`, or what cost, cost_critic and multiplier say in short; [] without a
        cost model.
        """
        if self.constraints is not None:
            return self.constraints
        return (
            []
            if self.cost is None
            else [Constraint(cost=self.cost, critic=self.cost_critic, multiplier=self.multiplier)]
        )

    def scorers(self):
        """{name: ScorerSpec} of the reward and of each cost, whether it is constrained or not."""
        return {REWARD: scorer_spec(self.reward), **{c.name: scorer_spec(c.cost) for c in self.long_form()}}

    def scorer_settings(self):
        """{name: the setting that gives it} of the scorers."""
        costs = {
            c.name: COST if self.constraints is None else f"constraints.{i}.cost"
            for i, c in enumerate(self.long_form())
        }
        return {REWARD: REWARD, **costs}

    def critic_settings(self):
        """{name: (setting, path or None)}: what names the critic of the reward, and of each cost, to start
        from.
        """
        costs = {
            c.name: ("cost_critic" if self.constraints is None else f"constraints.{i}.critic", c.critic)
            for i, c in enumerate(self.long_form())
        }
        return {REWARD: ("reward_critic", self.reward_critic), **costs}

    def streams_of_critics(self, constrained):
        """[names of what each critic predicts]: a critic for the reward and one for each constraint, or one
        with a head for each. constrained: in ppo-lag, where costs have critics.
        """
        streams = (REWARD, *(c.name for c in self.long_form())) if constrained else (REWARD,)
        return [streams] if constrained and self.ppo.shared_critic else [(name,) for name in streams]

    def in_one_pass(self):
        """True when the settings let the update's own forward passes give the old log-probs and values: one
        optimiser step per batch, no whitening over the batch (whose statistics would have to be known before
        the first loss), no dropout in adapters (the old policy has none).
        """
        dropout = self.lora.rank > 0 and self.lora.dropout > 0
        return (
            self.ppo.single_pass and self.ppo.optimizer_steps() == 1 and not self.ppo.whiten and not dropout
        )

    def trains_on_ptx(self):
        """True when each step has a supervised loss on `ptx` data."""
        return self.ptx is not None and self.ppo.ptx_coeff > 0


@frozen_keywords
class EvaluateConfig(StageConfig):
    """evaluate: mean reward and cost, share with C > 0, KL and length of a policy, with 95 % intervals."""

    model: ModelPath
    """Policy to evaluate: a folder or a Hub name."""
    prompts: Data
    """Prompts: a path, a Hub name, or a list of sources."""
    output: str | None = None
    """Folder for evaluation.json, samples.jsonl and the table; only printed when not given."""
    reward: Scorer | None = None
    """Reward model: a folder or a Hub name."""
    cost: Scorer | None = None
    """Cost model: a folder or a Hub name."""
    reference: ModelPath | None = None
    """Reference policy for the KL divergence: a folder or a Hub name; the model that a run's model started from when not
    given."""
    resume: str | None = None
    """auto: start an unfinished evaluation of the same settings again, and leave a finished one alone."""
    max_length: PositiveInt = 512
    """Longest prompt + response (tokens)."""
    batch_size: PositiveInt = 16
    """Prompts at once on each device."""
    show: NonNegativeInt = 4
    """Samples shown on the terminal."""
    sampling: Sampling = field(default_factory=Sampling)

    def pass_tokens(self):
        """Most tokens of a forward pass."""
        return self.batch_size * self.max_length

    def scorers(self):
        """{name: ScorerSpec} of those that are given."""
        return {
            name: scorer_spec(scorer)
            for name, scorer in ((REWARD, self.reward), (COST, self.cost))
            if scorer is not None
        }

    def scorer_settings(self):
        """{name: the setting that gives it} of those that are given."""
        return {name: name for name in self.scorers()}


@frozen_keywords
class DemoConfig:
    """demo: the whole loop on the embedded world, from nothing, with gold scores to check the outcome."""

    output: str | None = None
    """Folder of the run; runs/demo-<date> when not given."""
    seeds: list[Seed] = field(default_factory=lambda: [0])
    """Seeds to run one after another; each changes the world, the models and the data."""
    overwrite: bool = False
    """Replace an existing output folder."""
    quick: bool = False
    """A few steps of everything, to see that it runs; shows nothing about safety."""
    progress: bool = True
    """Progress bars on the terminal."""
    resume: ClassVar[None] = None  # it always starts anew


@frozen_keywords
class RunConfig:
    """run: several stages, one after the other, from one recipe; what is finished and unchanged is not done
    again.

    A setting of one stage is `<stage>.<key>`: sft.train.max_steps=3. The stage is called by its `name`, which
    is its kind when none is given. A stage's output is <output>/<stage>, so later ones say
    ${output}/sft/model.
    """

    output: str
    """Folder of the whole run; each stage gets a folder in it."""
    stages: list[dict]
    """The stages in order, each a map of one kind to its settings: - sft: {…}; with `name:` beside it to rename it."""
    root: str | None = None
    """Folder of data and models that the recipe calls ${root}."""
    seed: Seed = 42
    """Seed of every stage that does not set its own."""
    overwrite: bool = False
    """Replace stages whose settings or inputs have changed, unfinished ones with their checkpoints too."""
    resume: Literal["auto", "never"] = "auto"
    """auto: an unfinished stage goes on from its newest checkpoint, if its settings are the same; never: it starts anew."""


STAGES = {name: globals()[spec.config] for name, spec in STAGE_SPECS.items()}
"""The stages that a recipe can name, and their settings."""
