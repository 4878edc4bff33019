"""Settings of the moderator: training it, measuring it, and judging texts with it. No torch."""

from dataclasses import field
from typing import Annotated, Literal

from pydantic import Field

from .sections import Checkpoint, Logging, Lora, Optimizer, Training
from .setting_types import (
    Data,
    Fraction,
    ModelPath,
    NonNegative,
    NonNegativeInt,
    OpenFraction,
    Output,
    Positive,
    PositiveInt,
    settings_class,
)
from .stage_config import StageConfig

Preset = Literal["strict", "balanced", "permissive"]


@settings_class(frozen=True)
class Thresholds:
    """From which probability on an output is flagged; tuned on the evaluation data after training."""

    by: Literal["f1", "fpr"] = "f1"
    """The preset balanced: f1 (the largest F1), or fpr (the false-positive rate `fpr`)."""
    fpr: OpenFraction = 0.05
    """False-positive rate of balanced, with by=fpr."""
    strict_fpr: OpenFraction = 0.1
    """False-positive rate of the preset strict, which flags at least what balanced does."""
    permissive_fpr: OpenFraction = 0.01
    """False-positive rate of the preset permissive, which flags at most what balanced does."""
    per_source: bool = False
    """Thresholds for each source of the data too, where it has enough labels: policies of labels differ."""


@settings_class(frozen=True, kw_only=True)
class ModerationConfig(StageConfig):
    """moderation train: a moderator that tells harm categories, severity 0 to 3, unsafe and refusal."""

    model: ModelPath
    """Backbone to start from, a decoder or an encoder: a folder or a Hub name."""
    data: Data
    """Labelled answers: a path, a Hub name, or a list of sources."""
    output: Output
    label_set: str | None = None
    """Label set of the categories (pku, beavertails, openai, … or a name in the data); when not given the one
    of the data. Categories of other sets are unknown to the moderator."""
    pooling: Literal["last", "cls", "mean"] | None = None
    """The state that the heads read: of the last token, the first, or the mean of all; when not given last
    for decoders, mean (or what its config says) for encoders."""
    features: Literal["none", "ngrams"] = "none"
    """ngrams: hashed words (1, 2) and characters (2 to 5) of prompt and response beside the pooled state
    (needs scikit-learn)."""
    buckets: Annotated[int, Field(ge=1 << 8, le=1 << 24)] = 1 << 18
    """Buckets of the hashed n-grams."""
    ngram_learning_rate: Positive = 0.03
    """Peak learning rate of the n-grams' weights; it follows the schedule of optim.learning_rate."""
    weight_cap: Annotated[float, Field(ge=1)] = 10.0
    """A positive weighs negatives / positives in the loss, but at most this; probabilities are corrected for
    it."""
    source_heads: bool = False
    """Heads of its own for each source of the data; a text without a source gets their mean."""
    train_backbone: bool = True
    """false: the backbone stays as it is, and its pooled states are computed once."""
    overlap: Literal["refuse", "drop", "keep"] = "refuse"
    """Evaluation rows (train.eval_data) that are also training rows: refuse them, drop them, or keep them
    with a warning."""
    thresholds: Thresholds = field(default_factory=Thresholds)
    train: Training = field(default_factory=lambda: Training(epochs=3, batch_size=16))
    optim: Optimizer = field(default_factory=lambda: Optimizer(weight_decay=0.01))
    lora: Lora = field(default_factory=Lora)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    log: Logging = field(default_factory=Logging)


@settings_class(frozen=True, kw_only=True)
class ModerationEvaluateConfig:
    """moderation evaluate: how good a moderator is on labelled answers, as tables and a page."""

    model: ModelPath
    """Moderator: a folder that `moderation train` wrote, or a Hub name."""
    data: Data
    """Labelled answers: a path, a Hub name, or a list of sources."""
    output: str | None = None
    """Folder for quality.json, predictions.jsonl and quality.html; only printed when not given."""
    overwrite: bool = False
    """Replace an existing output folder."""
    preset: Preset = "balanced"
    """Thresholds: strict, balanced or permissive."""
    threshold: Fraction | None = None
    """One probability from which every output is flagged, in place of the preset."""
    prompt_only: bool = True
    """Print as a control what TF-IDF on the prompts alone predicts (needs scikit-learn)."""
    seed: NonNegativeInt = 42
    """Seed of simulated intervals, and of the rows that sources with a count draw."""
    batch_tokens: PositiveInt = 8192
    """Most tokens of a forward pass."""
    trust_remote_code: bool = False
    """Run Python code from the model's folder or Hub repository."""
    allow_pickle: bool = False
    """Read .bin files (pickles) where a model has no .safetensors; only tensors are read from them."""


@settings_class(frozen=True, kw_only=True)
class ModerationClassifyConfig:
    """moderation classify: judges answers of files or of standard input, one JSON line for each."""

    model: ModelPath
    """Moderator: a folder that `moderation train` wrote, or a Hub name."""
    input: str | list[str] = "-"
    """Files of rows with `prompt` and `response`, or `text`; - is standard input, JSON lines."""
    output: str = "-"
    """File for the JSON lines; - is standard output. A file that is there already is continued."""
    overwrite: bool = False
    """Begin an existing output file anew."""
    preset: Preset = "balanced"
    """Thresholds: strict, balanced or permissive."""
    source: str | None = None
    """The source whose heads or thresholds judge, where the moderator has such."""
    stream: bool = False
    """Also the scores after every `every` tokens of a response, so that generation could be stopped."""
    every: PositiveInt = 16
    """See `stream` (tokens)."""
    text: bool = False
    """Write prompt and response beside the scores."""
    batch_tokens: PositiveInt = 8192
    """Most tokens of a forward pass."""
    trust_remote_code: bool = False
    """Run Python code from the model's folder or Hub repository."""
    allow_pickle: bool = False
    """Read .bin files (pickles) where a model has no .safetensors; only tensors are read from them."""


@settings_class(frozen=True, kw_only=True)
class ModerationServeConfig:
    """moderation serve: a moderator behind HTTP, as OpenAI's moderations endpoint and for pairs."""

    model: ModelPath
    """Moderator: a folder that `moderation train` wrote, or a Hub name."""
    host: str = "127.0.0.1"
    """Address to listen on; others than 127.0.0.1 can be reached from elsewhere."""
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    """Port to listen on; 0 takes a free one, which is printed."""
    token_file: str | None = None
    """File with a bearer token that every request but /health needs."""
    preset: Preset = "balanced"
    """Thresholds: strict, balanced or permissive."""
    max_body: PositiveInt = 2_097_152
    """Most bytes of a request; more get a 413."""
    max_inputs: PositiveInt = 256
    """Most texts of a request to /v1/moderations."""
    queue_size: PositiveInt = 1024
    """Most texts that wait; more get a 429."""
    batch_tokens: PositiveInt = 8192
    """Most tokens of a forward pass, and those with which a batch is full."""
    wait_ms: NonNegative = 5.0
    """How long a text waits for others to be judged with it."""
    drain_seconds: PositiveInt = 30
    """How long requests may still take after SIGTERM."""
    trust_remote_code: bool = False
    """Run Python code from the model's folder or Hub repository."""
    allow_pickle: bool = False
    """Read .bin files (pickles) where a model has no .safetensors; only tensors are read from them."""
