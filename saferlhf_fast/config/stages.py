"""Every setting of every stage: frozen, typed, strict.

Nothing here imports torch, so a wrong key is reported in well under a second.

One dataclass per stage, made of groups that several stages share (sections.py). The docstring under a field
is its `--help` text; units are in parentheses. Defaults are the recipe of the Safe RLHF paper's reference
implementation. `saferlhf_fast.config.load` merges recipes (YAML) and `key=value` overrides over these
defaults and reports errors. Values are never written back: derived values are methods of the config.
"""

from dataclasses import field
from typing import ClassVar, Literal

from .judge_settings import JudgeCalibrationConfig
from .moderation_stages import (
    ModerationClassifyConfig,
    ModerationConfig,
    ModerationEvaluateConfig,
    ModerationServeConfig,
)
from .sections import (
    PPO,
    Checkpoint,
    Constraint,
    Engine,
    Evaluation,
    Logging,
    Lora,
    Multiplier,
    Optimizer,
    Sampling,
    Training,
)
from .setting_types import (
    COST,
    REWARD,
    Data,
    ModelPath,
    NonNegative,
    NonNegativeInt,
    Output,
    Positive,
    PositiveInt,
    PreferenceData,
    Scorer,
    ScorerSpec,
    Seed,
    Source,
    scorer_spec,
    settings_class,
)
from .stage_config import StageConfig
from .stage_table import STAGE_SPECS

__all__ = [
    "PPO",
    "STAGES",
    "Checkpoint",
    "Constraint",
    "Data",
    "DemoConfig",
    "JudgeCalibrationConfig",
    "DPOConfig",
    "Engine",
    "Evaluation",
    "EvaluateConfig",
    "Logging",
    "Lora",
    "ModerationClassifyConfig",
    "ModerationConfig",
    "ModerationEvaluateConfig",
    "ModerationServeConfig",
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


@settings_class(frozen=True, kw_only=True)
class SFTConfig(StageConfig):
    """sft: supervised fine-tuning of a causal language model on instruction data (loss over responses)."""

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


@settings_class(frozen=True, kw_only=True)
class PreferenceConfig(StageConfig):
    """reward, cost: a score model from preferences; the cost model's loss adds the safety-sign terms."""

    model: ModelPath
    """Backbone to start from (usually the SFT model), or a score model to train further: a folder or Hub
    name."""
    data: PreferenceData
    output: Output
    regularization: NonNegative = 0.001
    """c: weight of the mean squared score in the loss."""
    loss: Literal["sequence", "token"] = "sequence"
    """sequence: last-token scores; token: mean over positions from where the two responses first differ."""
    pooling: Literal["last", "cls", "mean"] | None = None
    """Where the score is read: last, cls (the first token) or mean (of all tokens); when not given as the
    architecture does: last for decoders, cls (or what its config says) for encoders."""
    drop_bias: bool = False
    """Leave out a bias or normaliser of `model`, so that transformers' own class gives the saved model's
    scores; the shift is printed. Otherwise both are kept in the saved config and applied by saferlhf-fast's
    loader."""
    baseline: bool = False
    """Report TF-IDF with logistic regression on the same pairs beside the model, and the difference, with
    intervals by prompt (needs scikit-learn)."""
    train: Training = field(default_factory=lambda: Training(epochs=2, batch_size=16))
    optim: Optimizer = field(default_factory=lambda: Optimizer(weight_decay=0.1))
    lora: Lora = field(default_factory=Lora)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    log: Logging = field(default_factory=Logging)


@settings_class(frozen=True, kw_only=True)
class DPOConfig(StageConfig):
    """dpo: direct preference optimisation, −log σ(β(Δlogp_chosen − Δlogp_rejected)).

    Source: Rafailov et al., 2023.
    """

    model: ModelPath
    """Causal language model to start from, and the frozen reference: a folder or a Hub name."""
    data: PreferenceData
    output: Output
    beta: Positive = 0.1
    """β: how strongly the policy is kept near the reference."""
    preference: Literal["better", "safer"] = "better"
    """Which label of a safety record says what is chosen: the more helpful or the safer response."""
    train: Training = field(default_factory=lambda: Training(epochs=2, batch_size=16))
    optim: Optimizer = field(default_factory=lambda: Optimizer(learning_rate=1e-6))
    lora: Lora = field(default_factory=Lora)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    log: Logging = field(default_factory=Logging)


@settings_class(frozen=True, kw_only=True)
class PPOConfig(StageConfig):
    """ppo, ppo-lag: policy optimisation with a reward model; ppo-lag keeps the mean cost under a threshold.

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
    """Reward critic to start from. When not given, the reward model; where that is an encoder, the actor with
    a new head; with lora.rank an adapter on the shared base."""
    cost_critic: ModelPath | None = None
    """Cost critic to start from; when not given as `reward_critic`, from the cost model."""
    constraints: list[Constraint] | None = None
    """Long form of cost, cost_critic, multiplier (ppo-lag): [{name: …, cost: …, critic: …, multiplier:
    {…}}]."""
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

    def pass_tokens(self) -> int:
        """Returns the most tokens of a forward and backward pass."""
        return self.ppo.micro_tokens or self.ppo.micro_batch_size * self.max_length

    def long_form(self) -> list[Constraint]:
        """Returns `constraints`, or the one that cost, cost_critic and multiplier give; [] without a cost."""
        if self.constraints is not None:
            return self.constraints
        if self.cost is None:
            return []
        return [Constraint(cost=self.cost, critic=self.cost_critic, multiplier=self.multiplier)]

    def scorers(self) -> dict[str, ScorerSpec]:
        """Returns {name: spec} of the reward and of each cost, whether it is constrained or not."""
        return {REWARD: scorer_spec(self.reward), **{c.name: scorer_spec(c.cost) for c in self.long_form()}}

    def scorer_settings(self) -> dict[str, str]:
        """Returns {name: key of the setting that gives it} of the scorers."""
        costs = {
            c.name: COST if self.constraints is None else f"constraints.{i}.cost"
            for i, c in enumerate(self.long_form())
        }
        return {REWARD: REWARD, **costs}

    def critic_settings(self) -> dict[str, tuple[str, str | None]]:
        """Returns {name: (key, path or None)}: the settings that name the critics to start from.

        There is one for the reward and one for each cost.
        """
        costs = {
            c.name: ("cost_critic" if self.constraints is None else f"constraints.{i}.critic", c.critic)
            for i, c in enumerate(self.long_form())
        }
        return {REWARD: ("reward_critic", self.reward_critic), **costs}

    def streams_of_critics(self, constrained: bool) -> list[tuple[str, ...]]:
        """Returns for each critic the names of the values that it predicts.

        There is a critic for the reward and one for each constraint, or one critic with a head for each.

        Args:
            constrained: True in ppo-lag, where costs have critics.
        """
        streams = (REWARD, *(c.name for c in self.long_form())) if constrained else (REWARD,)
        return [streams] if constrained and self.ppo.shared_critic else [(name,) for name in streams]

    def in_one_pass(self) -> bool:
        """Tells whether the update's own forward passes can give the old log-probs and values.

        That takes one optimiser step per batch, no whitening over the batch (its statistics would have to be
        known before the first loss), and no dropout in adapters (the old policy has none).
        """
        dropout = self.lora.rank > 0 and self.lora.dropout > 0
        return (
            self.ppo.single_pass and self.ppo.optimizer_steps() == 1 and not self.ppo.whiten and not dropout
        )

    def trains_on_ptx(self) -> bool:
        """Tells whether each step has a supervised loss on `ptx` data."""
        return self.ptx is not None and self.ppo.ptx_coeff > 0


@settings_class(frozen=True, kw_only=True)
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
    """Reference policy for the KL divergence: a folder or a Hub name; when not given, the model that a run's
    model started from."""
    resume: str | None = None
    """auto: repeat an unfinished evaluation with the same settings, and keep a finished one."""
    max_length: PositiveInt = 512
    """Longest prompt + response (tokens)."""
    batch_size: PositiveInt = 16
    """Prompts processed at once on each device."""
    show: NonNegativeInt = 4
    """Samples shown on the terminal."""
    sampling: Sampling = field(default_factory=Sampling)

    def pass_tokens(self) -> int:
        """Returns the most tokens of a forward pass."""
        return self.batch_size * self.max_length

    def scorers(self) -> dict[str, ScorerSpec]:
        """Returns {name: spec} of the scorers that are given."""
        return {
            name: scorer_spec(scorer)
            for name, scorer in ((REWARD, self.reward), (COST, self.cost))
            if scorer is not None
        }

    def scorer_settings(self) -> dict[str, str]:
        """Returns {name: key of the setting that gives it} of the scorers that are given."""
        return {name: name for name in self.scorers()}


@settings_class(frozen=True, kw_only=True)
class DemoConfig:
    """demo: the whole loop on the embedded world, from nothing, with gold scores to check the outcome."""

    output: str | None = None
    """Folder of the run; runs/demo-<date> when not given."""
    seeds: list[Seed] = field(default_factory=lambda: [0])
    """Seeds to run one after another; each changes the world, the models and the data."""
    overwrite: bool = False
    """Replace an existing output folder."""
    quick: bool = False
    """A few steps of each stage, to see that they run; the result says nothing about safety."""
    progress: bool = True
    """Progress bars on the terminal."""
    resume: ClassVar[None] = None  # it always starts from the beginning


@settings_class(frozen=True, kw_only=True)
class RunConfig:
    """run: several stages in order, from one recipe; stages that are finished and unchanged do not run again.

    A setting of one stage is `<stage>.<key>`: sft.train.max_steps=3. <stage> is the stage's `name`, or its
    kind when none is given. A stage's output is <output>/<stage>, so later ones write ${output}/sft/model.
    """

    output: str
    """Folder of the whole run; each stage gets a folder in it."""
    stages: list[dict]
    """The stages in order, each a map from its kind to its settings: - sft: {…}; `name:` beside it renames
    it."""
    root: str | None = None
    """Folder of data and models that the recipe calls ${root}."""
    models: str | None = None
    """Folder of models that the recipe calls ${models}; `make models` fills one."""
    seed: Seed = 42
    """Seed of every stage that does not set its own."""
    overwrite: bool = False
    """Replace stages whose settings or inputs have changed, also unfinished ones and their checkpoints."""
    resume: Literal["auto", "never"] = "auto"
    """auto: an unfinished stage with the same settings resumes from its newest checkpoint; never: it does
    not."""


STAGES: dict[str, type[StageConfig]] = {name: globals()[spec.config] for name, spec in STAGE_SPECS.items()}
"""The stages that a recipe can name, and their settings."""
