"""Groups of settings that several stages share, one dataclass each; stages.py puts stages together from them.

No torch here.

The docstring under a field is its `--help` text; units are in parentheses. Defaults are the recipe of the
Safe RLHF paper's reference implementation.
"""

from dataclasses import field
from typing import Annotated, Literal, Union

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

PositiveInt = Annotated[int, Field(gt=0)]
NonNegativeInt = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Seed = Annotated[int, Field(ge=0, lt=1 << 32)]
OpenFraction = Annotated[float, Field(gt=0, lt=1)]

_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, strict=False, allow_inf_nan=False)
frozen = dataclass(frozen=True, config=_config)
frozen_keywords = dataclass(frozen=True, kw_only=True, config=_config)
"""For stages, whose required settings come after those that they inherit."""


ModelPath = Annotated[str, Field(json_schema_extra={"input": "model"})]
"""A model's folder or Hub name: what inputs.py looks for, as it looks for Data and Scorer."""


@frozen
class Source:
    """One data source of a mixture."""

    path: str
    """A file (.json, .jsonl, .jsonl.gz, .csv, .parquet), a local folder of such files, or a Hub data set name."""
    format: str = "auto"
    """Record format: auto (told from the columns) or one of the names in docs/data.md (pku, alpaca, hh, messages …)."""
    split: str = "train"
    """Split of a Hub data set or of a folder that has splits."""
    name: str | None = None
    """Configuration of a Hub data set (e.g. alpaca-7b)."""
    count: PositiveInt | None = None
    """Take this many rows, drawn with the stage's seed; all when not given (rows)."""
    proportion: Positive | None = None
    """Weight of this source in the mixture, relative to the others; each source counts whole when none gives one."""
    columns: dict[str, str] | None = None
    """Renames columns before the format is told: {"their name": "our name"}."""


Data = Union[str, Source, list[str | Source]]

REWARD, COST = PAIR = ("reward", "cost")
"""What a response is scored by: how helpful it is, how harmful it is. In this order wherever both are named."""

SCORER_KINDS = ("score_model",)
"""What can score a response; rollout/scorers.py loads each."""


@frozen
class ScorerSpec:
    """What scores a response."""

    path: str
    """A score model: a folder or a Hub name."""
    kind: Literal[SCORER_KINDS] = "score_model"
    """What scores: score_model, a model with a scalar head that reads prompt and response."""


Scorer = Union[str, ScorerSpec]
"""A plain path is a score model's."""


def scorer_spec(scorer):
    """The ScorerSpec of a setting of the type Scorer; None of None."""
    return ScorerSpec(path=scorer) if isinstance(scorer, str) else scorer


# Settings that several stages have, each documented once.
PreferenceData = Annotated[
    Data, Field(description="Preference data: a path, a Hub name, or a list of sources.")
]
Output = Annotated[str, Field(description="Folder of the run; the trained model lies in <output>/model.")]


@frozen
class Training:
    """How long, in what portions, and when to evaluate and save."""

    epochs: Positive = 1.0
    """Passes over the training data (may be fractional)."""
    max_steps: PositiveInt | None = None
    """Make this many optimiser steps at most; `epochs` may end the run before (steps)."""
    batch_size: PositiveInt = 4
    """Times `accumulation`: what each device brings to an optimiser step (sequences; for preferences: pairs)."""
    accumulation: PositiveInt = 1
    """See `batch_size`; how a step is cut into passes follows from `micro_tokens`."""
    micro_tokens: PositiveInt | None = None
    """Most tokens of a forward and backward pass on each device; batch_size · max_length when not given, twice that for pairs
    (tokens)."""
    max_length: PositiveInt = 512
    """Longest prompt + response that is trained on (tokens); longer answers are dropped and counted, never cut."""
    eval_data: Data | None = None
    """Evaluation data; a split by prompt of the training data when not given."""
    eval_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the prompts held out for evaluation when `eval_data` is not given."""
    eval_interval: PositiveInt | None = None
    """Evaluate every so many steps (steps); at the end only when not given."""
    best_metric: str | None = None
    """Keep the weights of the best evaluation by this metric (e.g. eval/loss, eval/accuracy) as the result."""
    save_interval: PositiveInt | None = None
    """Save the model every so many steps, besides the end (steps)."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""

    def pass_tokens(self, sequences=1):
        """Most tokens of a forward and backward pass; sequences: of one example (2 for pairs)."""
        return self.micro_tokens or self.batch_size * self.max_length * sequences


@frozen
class Optimizer:
    """What turns gradients into steps, and its learning-rate schedule."""

    kind: Literal["adamw", "adamw-8bit", "adafactor"] = "adamw"
    """adamw; adamw-8bit, whose states take a quarter (pip install 'saferlhf-fast[8bit]'); or adafactor, whose states take next
    to nothing (ZeRO 0 only)."""
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


@frozen
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
    """Where the frozen models' weights lie: sharded over the devices, or whole on each; auto shards them under ZeRO 3 only."""
    max_skips: PositiveInt = 3
    """Stop, with the batch saved, after this many steps in a row that were left out because a number was not finite (steps)."""
    timeout: Positive = 30.0
    """End the run when a rank has waited this long for the others, naming the one that did not come (minutes)."""
    packing: bool = True
    """Run models on sequences one behind the other, without padding, where the architecture can; false pads."""
    threads: PositiveInt | None = None
    """CPU threads of each process; torch's own choice when not given."""
    config: dict | None = None
    """More DeepSpeed settings, merged over ours (DeepSpeed's own JSON keys)."""


@frozen
class Checkpoint:
    """When the whole state of a run is written to <output>/checkpoints, to go on from with resume=auto."""

    interval: PositiveInt | None = None
    """Write one every so many steps (steps)."""
    minutes: Positive | None = 30.0
    """Write one when the last is this old, at the end of a step (minutes)."""
    keep: PositiveInt = 2
    """Keep this many of the newest ones."""
    keep_best: bool = True
    """Keep the one with the best evaluation too (train.best_metric or evaluation.select; else eval/loss or none)."""
    asynchronous: bool = False
    """Write in the background while training goes on; needs host memory for a copy of the state."""


@frozen
class Lora:
    """Low-rank adapters (peft); off while rank is 0.

    In ppo and ppo-lag all roles then stand on one frozen base: the reference is the base alone, and score
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


@frozen
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
"""Shares of a GPU's memory that rollout engines take when sampling.memory does not say; its help names them too."""


@frozen
class Sampling:
    """How responses are generated. Log-probs are scored under the same temperature, top-p, top-k and penalty."""

    engine: Literal["auto", "generate", "continuous", "vllm", "vllm-server"] = "auto"
    """What generates: transformers' generate or continuous batching, vLLM in this process, or a vLLM server; auto is generate
    on a CPU and continuous on a GPU (docs/rollouts.md)."""
    temperature: Positive = 1.0
    """Sampling temperature; log-probs are scored at the same temperature."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Sample from the most likely tokens that together have this probability; 1 is all of them."""
    top_k: NonNegativeInt = 0
    """Sample from this many most likely tokens; 0 is all of them (tokens)."""
    repetition_penalty: Positive = 1.0
    """Logits of tokens of prompt and response so far are divided (below 0: multiplied) by this; 1 changes nothing."""
    num_return_sequences: PositiveInt = 1
    """Responses sampled for each prompt."""
    stop: list[str] = field(default_factory=list)
    """A response ends with the token that completes one of these texts, besides at its end token."""
    max_new_tokens: PositiveInt | None = None
    """Longest response (tokens); what max_length leaves after the prompt when not given."""
    max_prompt_length: PositiveInt | None = None
    """Prompts longer than this lose their beginning, never the assistant tag; max_length / 2 when not given (tokens)."""
    batch_size: PositiveInt | None = None
    """Prompts generated at once on each device; all of a step's when not given."""
    gather: bool = True
    """Under ZeRO-3, gather the actor's weights once per rollout; false gathers layer by layer for each token, for models
    that do not fit one device whole (generate only)."""
    memory: OpenFraction | None = None
    """Share of a GPU's memory that continuous may take for its cache (of what is free; 0.8 when not given) and vllm for its
    weights and cache (of all; 0.4 when not given)."""
    server: str = "http://127.0.0.1:8000"
    """Address of the server that vllm-server asks."""
    server_weights: str | None = None
    """Folder through which the server gets new weights, under the same path on its machine; a temporary one when not given."""

    def prompt_limit(self, max_length):
        """Longest prompt (tokens). max_length: of prompt and response (tokens)."""
        return self.max_prompt_length or max_length // 2

    def response_limit(self, prompt, max_length):
        """Longest response to a prompt of `prompt` tokens (at least 1 token). max_length: of prompt and
        response (tokens).
        """
        return max(1, min(max_length - prompt, self.max_new_tokens or max_length))

    def memory_share(self, engine):
        """Share of a GPU's memory that "continuous" may take of what is free, or "vllm" of all."""
        return self.memory or MEMORY_SHARES[engine]


@frozen
class Multiplier:
    """The Lagrange multiplier λ and the constraint mean cost ≤ threshold."""

    rule: Literal["exponential", "pid"] = "exponential"
    """exponential: log λ += lr · λ · (J_C − d), the reference's rule; pid: λ = K_p·e + I + K_d·max(0, Δe) with e = J_C − d and
    I = init + K_i·Σe, both between 0 and `max`."""
    init: NonNegative = 1.0
    """λ at the start; of the pid rule its integral I too."""
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


@frozen_keywords
class Constraint:
    """A cost whose mean stays under a threshold."""

    name: str = COST
    """What messages call it; behind the names of its metrics where there are several constraints (letters, digits, _ and -)."""
    cost: Scorer
    """Cost model: a folder or a Hub name, or a scorer."""
    critic: ModelPath | None = None
    """Critic to start from; the cost model when not given."""
    multiplier: Multiplier = field(default_factory=Multiplier)
    """Its λ and its threshold: the settings of multiplier.*."""


@frozen
class PPO:
    """The policy-optimisation step."""

    batch_size: PositiveInt = 16
    """Prompts per step on each device."""
    micro_batch_size: PositiveInt = 16
    """Full-length sequences per forward and backward pass on each device; shorter ones fit in greater number."""
    micro_tokens: PositiveInt | None = None
    """Most tokens of a forward and backward pass; micro_batch_size · max_length when not given (tokens)."""
    epochs: PositiveInt = 1
    """Times that each batch of rollouts is learned from."""
    minibatches: PositiveInt = 1
    """Optimiser steps into which each batch of rollouts is divided."""
    single_pass: bool = True
    """With one optimiser step per batch, train in the forward pass that gives the old log-probs and values, instead of asking
    for them beforehand: less time, but actor and critics hold their activations at once."""
    shared_critic: bool = False
    """One critic with two heads, for reward and cost, instead of two critics: a forward and a backward pass less."""
    old_logp: Literal["trainer", "engine"] = "trainer"
    """Whose log-probs the ratio starts from: the trainer's own, or what the rollout engine said while it sampled."""
    importance_cap: Positive | None = None
    """Truncated importance weights min(π_trainer/π_engine, cap) on the advantages: for engines whose probabilities differ
    from the trainer's, and for overlap."""
    overlap: bool = False
    """Sample and score the next batch while this one is learned from: it is one step stale when its turn comes, which
    importance_cap (or old_logp=engine) corrects. Needs memory for a copy of the policy."""
    prompt_epochs: Positive = 1.0
    """Passes over the prompts."""
    max_steps: PositiveInt | None = None
    """Make this many steps at most; `prompt_epochs` may end the run before (steps)."""
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
    """Each sequence or each token weighs the same in the losses."""
    ptx_coeff: NonNegative = 16.0
    """Weight of the supervised loss on `ptx` data; used when there is some."""
    shaping: NonNegative | None = None
    """ν: maximise R − ν·C with one critic (the paper's reward-shaping baseline); only in the stage ppo."""

    def optimizer_steps(self):
        """Optimiser steps of each trained model on one batch of rollouts."""
        return self.epochs * self.minibatches


@frozen
class Evaluation:
    """Held-out evaluation of a policy during training."""

    data: Data | None = None
    """Evaluation prompts; a held-out share of the prompts when not given, or the first 64 of them where `fraction` is 0."""
    fraction: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the prompts held out when `data` is not given."""
    interval: PositiveInt | None = None
    """Evaluate every so many steps (steps); at the end only when not given."""
    select: bool = False
    """Keep the weights of the best evaluation: highest reward among those whose cost is under the threshold."""
    margin: NonNegative = 0.0
    """With `select`: how far under the threshold the evaluation cost must be (cost model units)."""
