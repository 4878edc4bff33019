"""Groups of settings that several stages share, one dataclass each; stages.py puts stages together from them.

The docstring under a field is its `--help` text; units are in parentheses. Defaults are the recipe of the
Safe RLHF paper's reference implementation. Nothing here imports torch.
"""

from dataclasses import field
from typing import Annotated, Literal

from pydantic import Field

from .setting_types import COST as COST
from .setting_types import PAIR as PAIR
from .setting_types import REWARD as REWARD
from .setting_types import SCORER_KINDS as SCORER_KINDS
from .setting_types import (
    Data,
    Fraction,
    ModelPath,
    NonNegative,
    NonNegativeInt,
    OpenFraction,
    Positive,
    PositiveInt,
    Scorer,
    settings_class,
)
from .setting_types import PreferenceData as PreferenceData
from .setting_types import ScorerSpec as ScorerSpec
from .setting_types import scorer_spec as scorer_spec


@settings_class(frozen=True)
class Training:
    """How long to train, in what portions, and when to evaluate and save."""

    epochs: Positive = 1.0
    """Passes over the training data (may be fractional)."""
    max_steps: PositiveInt | None = None
    """Make this many optimiser steps at most; `epochs` may end the run earlier (steps)."""
    batch_size: PositiveInt = 4
    """Times `accumulation`: what each device adds to an optimiser step (sequences; for preferences:
    pairs)."""
    accumulation: PositiveInt = 1
    """See `batch_size`; how a step is cut into passes follows from `micro_tokens`."""
    micro_tokens: PositiveInt | None = None
    """Most tokens of a forward and backward pass on each device; batch_size · max_length when not given,
    twice that for pairs (tokens)."""
    max_length: PositiveInt = 512
    """Longest prompt + response (tokens); longer answers are dropped and counted, never cut."""
    cache: str | None = None
    """Folder for tokenised data: built once by all processes, then memory-mapped, for data that do not fit
    into memory; keyed by content and settings (docs/data.md). Held in memory when not given."""
    eval_data: Data | None = None
    """Evaluation data; a split by prompt of the training data when not given."""
    eval_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the prompts held out for evaluation when `eval_data` is not given."""
    eval_interval: PositiveInt | None = None
    """Evaluate every so many steps (steps); at the end only when not given."""
    best_metric: str | None = None
    """The result is the weights of the best evaluation by this metric (e.g. eval/loss, eval/accuracy)."""
    save_interval: PositiveInt | None = None
    """Save the model every so many steps, besides the end (steps)."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""

    def pass_tokens(self, sequences: int = 1) -> int:
        """Returns the most tokens of a forward and backward pass.

        Args:
            sequences: Sequences of one example (2 for pairs).
        """
        return self.micro_tokens or self.batch_size * self.max_length * sequences


@settings_class(frozen=True)
class Optimizer:
    """The optimiser and its learning-rate schedule."""

    kind: Literal["adamw", "adamw-8bit", "adafactor"] = "adamw"
    """adamw; adamw-8bit, whose states take a quarter of the memory (pip install 'saferlhf-fast[8bit]'); or
    adafactor, whose states take almost none (ZeRO 0 only)."""
    learning_rate: Positive = 2e-5
    """Peak learning rate; the same scale for all kinds."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape of the learning rate after the warm-up."""
    warmup_ratio: Annotated[float, Field(ge=0, lt=1)] = 0.03
    """Share of all steps over which the learning rate rises from zero."""
    weight_decay: NonNegative = 0.0
    """Decoupled weight decay; not applied to biases and norms."""
    betas: tuple[OpenFraction, OpenFraction] = (0.9, 0.95)
    """Adam's β1 and β2; adafactor has neither."""
    eps: Positive = 1e-8
    """Adam's ε; adafactor has its own."""
    max_grad_norm: NonNegative = 1.0
    """Clip the global gradient norm to this; 0 switches clipping off."""


@settings_class(frozen=True)
class Engine:
    """DeepSpeed: sharding, offload, precision."""

    zero_stage: Annotated[int, Field(ge=0, le=3)] = 0
    """ZeRO stage: 0 nothing sharded, 1 optimiser states, 2 and gradients, 3 and weights."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Number format of the weights in forward and backward; auto is bf16 on a GPU and fp32 on a CPU."""
    offload_optimizer: bool = False
    """Keep optimiser states in host memory (ZeRO 1 to 3)."""
    offload_parameters: bool = False
    """Keep weights in host memory (ZeRO 3)."""
    frozen: Literal["auto", "sharded", "replicated"] = "auto"
    """Frozen models' weights: sharded over the devices, or complete on each; auto: sharded under ZeRO 3
    only."""
    max_skips: PositiveInt = 3
    """Stop, and save the batch, after this many steps in a row with a number that is not finite (steps)."""
    timeout: Positive = 30.0
    """End the run, and name the missing rank, when a rank has waited this long for the others (minutes)."""
    packing: bool = True
    """Concatenate sequences instead of padding them, where the architecture supports it; false pads."""
    threads: PositiveInt | None = None
    """CPU threads of each process; torch's own choice when not given."""
    config: dict | None = None
    """More DeepSpeed settings, by DeepSpeed's own JSON keys; they override those that saferlhf-fast gives."""


@settings_class(frozen=True)
class Checkpoint:
    """When the complete state of a run is written to <output>/checkpoints; resume=auto resumes from there."""

    interval: PositiveInt | None = None
    """Write one every so many steps (steps)."""
    minutes: Positive | None = 30.0
    """Write one at the end of a step when the last one is this old (minutes)."""
    keep: PositiveInt = 2
    """Keep this many of the newest ones."""
    keep_best: bool = True
    """Keep the one with the best evaluation too (by train.best_metric or evaluation.select; without these
    by eval/loss, where there is one)."""
    asynchronous: bool = False
    """Write in the background while training continues; needs host memory for a copy of the state."""
    required: bool = False
    """End the run when one cannot be written, as on a full disk; else it warns and continues."""


@settings_class(frozen=True)
class Lora:
    """Low-rank adapters (peft); off while rank is 0.

    In ppo and ppo-lag all roles then share one frozen base: the reference is the base alone, and score
    models trained with LoRA on it (their stages save <output>/model/adapter) are adapters too.
    """

    rank: NonNegativeInt = 0
    """Rank of the adapters; 0 trains all weights."""
    alpha: Positive = 16.0
    """Scale: the adapter's output is multiplied by alpha / rank."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout on the adapter's input."""
    target_modules: str | list[str] = "all-linear"
    """Modules that get an adapter; all-linear means every linear layer but the head."""
    bits: Literal[4] | None = None
    """4 keeps the frozen base's linear layers in 4 bits (QLoRA: NF4 with double quantisation; pip install
    'saferlhf-fast[qlora]'); None keeps them in the engine's precision."""


@settings_class(frozen=True)
class Logging:
    """What is written while training."""

    trackers: list[Literal["tensorboard", "wandb", "trackio"]] = field(
        default_factory=lambda: ["tensorboard"]
    )
    """Trackers besides metrics.jsonl, which is always written."""
    interval: PositiveInt = 1
    """Write metrics every so many steps (steps)."""
    sample_interval: PositiveInt = 50
    """Show sample prompts, responses and scores every so many steps (steps); PPO stages only."""
    samples: PositiveInt = 4
    """How many samples to show."""
    project: str = "saferlhf-fast"
    """Project name for wandb and trackio."""
    progress: bool = True
    """Progress bars and tables on the terminal."""


MEMORY_SHARES = {"continuous": 0.8, "vllm": 0.4}
"""Shares of a GPU's memory that rollout engines take by default; `sampling.memory` names them too."""


@settings_class(frozen=True)
class Sampling:
    """How responses are sampled; log-probs are scored with the same temperature, top-p, top-k and penalty."""

    engine: Literal["auto", "generate", "continuous", "vllm", "vllm-server"] = "auto"
    """What generates: transformers' generate or continuous batching, vLLM in this process, or a vLLM server;
    auto is generate on a CPU and continuous on a GPU (docs/rollouts.md)."""
    temperature: Positive = 1.0
    """Sampling temperature; log-probs are scored at the same temperature."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Sample from the most likely tokens that together have this probability; 1 is all of them."""
    top_k: NonNegativeInt = 0
    """Sample from this many most likely tokens; 0 is all of them (tokens)."""
    repetition_penalty: Positive = 1.0
    """Logits of tokens in prompt or response so far are divided (below 0: multiplied) by this; 1 is off."""
    num_return_sequences: PositiveInt = 1
    """Responses sampled for each prompt."""
    stop: list[str] = field(default_factory=list)
    """A response ends with the token that completes one of these texts, besides at its end token."""
    max_new_tokens: PositiveInt | None = None
    """Longest response (tokens); what max_length leaves after the prompt when not given."""
    max_prompt_length: PositiveInt | None = None
    """Longer prompts lose their beginning, never the assistant tag; max_length / 2 when not given
    (tokens)."""
    batch_size: PositiveInt | None = None
    """Prompts generated at once on each device; all of a step's when not given."""
    gather: bool = True
    """Under ZeRO-3, gather the actor's weights once per rollout; false gathers layer by layer for each token,
    for models that do not fit on one device (generate only)."""
    memory: OpenFraction | None = None
    """Share of a GPU's memory that continuous may take for its cache (of what is free; 0.8 when not given)
    and vllm for its weights and cache (of all; 0.4 when not given)."""
    server: str = "http://127.0.0.1:8000"
    """Address of the server that vllm-server uses."""
    server_weights: str | None = None
    """Folder through which the server gets new weights, by the same path; temporary when not given."""

    def prompt_limit(self, max_length: int) -> int:
        """Returns the longest prompt (tokens).

        Args:
            max_length: Longest prompt + response (tokens).
        """
        return self.max_prompt_length or max_length // 2

    def response_limit(self, prompt: int, max_length: int) -> int:
        """Returns the longest response to a prompt (tokens, at least 1).

        Args:
            prompt: Length of the prompt (tokens).
            max_length: Longest prompt + response (tokens).
        """
        return max(1, min(max_length - prompt, self.max_new_tokens or max_length))

    def memory_share(self, engine: str) -> float:
        """Returns the share of a GPU's memory that a rollout engine may take.

        Args:
            engine: "continuous", whose share is of the free memory, or "vllm", whose share is of all memory.
        """
        return self.memory or MEMORY_SHARES[engine]


@settings_class(frozen=True)
class Multiplier:
    """The Lagrange multiplier λ and the constraint mean cost ≤ threshold."""

    rule: Literal["exponential", "pid"] = "exponential"
    """exponential: log λ += lr · λ · (J_C − d), safe-rlhf's rule; pid: λ = K_p·e + I + K_d·max(0, Δe)
    with e = J_C − d and I = init + K_i·Σe, both between 0 and `max`."""
    init: NonNegative = 1.0
    """λ at the start; with the pid rule also its integral I at the start."""
    lr: NonNegative = 0.1
    """Step size of the exponential rule."""
    max: Positive = 5.0
    """Upper bound of λ."""
    threshold: float = 0.0
    """d: the mean cost that may not be exceeded (cost model units; below 0 is safe)."""
    threshold_quantile: OpenFraction | None = None
    """Take d as this quantile of the starting policy's costs instead of `threshold`."""
    window: Annotated[int, Field(gt=0, le=1 << 24)] = 1024
    """J_C is the mean cost of this many last episodes, over all devices (episodes)."""
    delay: NonNegativeInt = 0
    """λ stays as it is for this many steps (steps)."""
    kp: NonNegative = 0.1
    """K_p of the pid rule."""
    ki: NonNegative = 0.01
    """K_i of the pid rule."""
    kd: NonNegative = 0.01
    """K_d of the pid rule."""


@settings_class(frozen=True, kw_only=True)
class Constraint:
    """A cost whose mean stays under a threshold."""

    name: str = COST
    """Its name in messages and, with several constraints, in metrics (letters, digits, _ and -)."""
    cost: Scorer
    """Cost model: a folder or a Hub name, or a scorer."""
    critic: ModelPath | None = None
    """Critic to start from; when not given as `reward_critic`, from the cost model."""
    multiplier: Multiplier = field(default_factory=Multiplier)
    """Its λ and its threshold: the settings of multiplier.*."""


@settings_class(frozen=True)
class PPO:
    """The policy-optimisation step."""

    batch_size: PositiveInt = 16
    """Prompts per step on each device."""
    micro_batch_size: PositiveInt = 16
    """Full-length sequences per forward and backward pass on each device; of shorter ones more fit in."""
    micro_tokens: PositiveInt | None = None
    """Most tokens of a forward and backward pass; micro_batch_size · max_length when not given (tokens)."""
    epochs: PositiveInt = 1
    """How often the actor and the critics are updated on each batch of rollouts."""
    minibatches: PositiveInt = 1
    """Optimiser steps into which each batch of rollouts is divided."""
    single_pass: bool = True
    """With one optimiser step per batch, train in the forward pass that gives the old log-probs and values,
    instead of computing these before: faster, but actor and critics keep their activations together."""
    shared_critic: bool = False
    """One critic with heads for reward and cost, not two critics: one forward and backward pass less."""
    old_logp: Literal["trainer", "engine"] = "trainer"
    """Whose log-probs are the old ones in the ratio: the trainer's, or the rollout engine's."""
    importance_cap: Positive | None = None
    """Truncated importance weights min(π_trainer/π_engine, cap) on the advantages: for engines whose
    probabilities differ from the trainer's, and for overlap."""
    overlap: bool = False
    """Sample and score the next batch while the models are updated on this one: the next batch is then one
    step stale, which importance_cap (or old_logp=engine) corrects. Needs memory for a copy of the policy."""
    prompt_epochs: Positive = 1.0
    """Passes over the prompts."""
    max_steps: PositiveInt | None = None
    """Make this many steps at most; `prompt_epochs` may end the run earlier (steps)."""
    kl_coeff: NonNegative = 0.01
    """β: weight of the per-token KL penalty to the reference in reward and cost."""
    gamma: Fraction = 1.0
    """Discount γ."""
    lam: Fraction = 0.95
    """λ_gae of generalised advantage estimation."""
    clip_ratio: Positive = 0.2
    """ε of the clipped policy loss."""
    clip_score: Positive = 50.0
    """Bound on the shaped per-token reward and cost."""
    clip_value: Positive = 5.0
    """Bound on a critic's change within one update."""
    whiten: bool = False
    """Whiten the combined advantage over the global batch."""
    reduction: Literal["sequence-mean", "token-mean"] = "sequence-mean"
    """Whether each sequence or each token has the same weight in the losses."""
    ptx_coeff: NonNegative = 16.0
    """Weight of the supervised loss on `ptx` data, where such data are given."""
    shaping: NonNegative | None = None
    """ν: maximise R − ν·C with one critic (the paper's reward-shaping baseline); only in the stage ppo."""

    def optimizer_steps(self) -> int:
        """Returns the number of optimiser steps of each trained model on one batch of rollouts."""
        return self.epochs * self.minibatches


@settings_class(frozen=True)
class Evaluation:
    """Held-out evaluation of a policy during training."""

    data: Data | None = None
    """Evaluation prompts; when not given `fraction` of the prompts, or the first 64 where it is 0."""
    fraction: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the prompts held out when `data` is not given."""
    interval: PositiveInt | None = None
    """Evaluate every so many steps (steps); at the end only when not given."""
    select: bool = False
    """The result is the best evaluation: highest reward among those whose cost is under the threshold."""
    margin: NonNegative = 0.0
    """With `select`: how far under the threshold the evaluation cost must be (cost model units)."""
