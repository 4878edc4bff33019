"""The work of bench_step.py, the same for every side.

It has models from seeds, and prompts and responses with real lengths and random ids.

Lengths are those of rows of PKU-SafeRLHF (`--data`): a prompt in safe-rlhf's template, and one of its two
responses. A length in words is converted at 4 tokens for 3 words, which is about what English needs with a
vocabulary of 32,000. `--lengths tokens` counts with the tokenizer in `--tokenizer` instead (the 512 pieces of
stories260k: 3.5 tokens per word). The texts have no other use: ids and weights are random, so speed and
memory are measured, never quality.

Left out: records shorter than a word, and the time to read a data set.
"""

import gzip
import json
import math
import os
import random
from dataclasses import asdict, dataclass
from pathlib import Path

ROWS = "data/preference/pku_saferlhf_safe_over_unsafe.jsonl.gz"
TOKENIZER = "models/stories260k"

# ids that occur in no prompt and no response, except for the one EOS at a response's end
UNK, BOS, EOS, PAD = 0, 1, 2, 3
FIRST = 4
# length of "BEGINNING OF CONVERSATION: USER: … ASSISTANT:" in Llama's tokens, <s> included
TEMPLATE_TOKENS = 18
TEMPLATE = "BEGINNING OF CONVERSATION: USER: {} ASSISTANT:"
TOKENS_PER_WORD = 4 / 3


class Lacking(Exception):
    """Something that the measurement needs is missing; the text says what."""


@dataclass(frozen=True)
class Shape:
    """A model: layers, widths, heads, vocabulary, and the dtype in which it is measured.

    family: a transformers model_type.
    """

    family: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    vocabulary: int
    dtype: str = "float32"
    tied: bool = False
    head_dim: int = 0  # 0: hidden / heads

    def config(self):
        """Returns a transformers config with SDPA attention and no dropout (the defaults)."""
        import transformers

        kind = {"llama": transformers.LlamaConfig, "qwen2": transformers.Qwen2Config}[self.family]
        more = {"head_dim": self.head_dim} if self.head_dim else {}
        return kind(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            max_position_embeddings=2048,
            tie_word_embeddings=self.tied,
            bos_token_id=BOS,
            eos_token_id=EOS,
            pad_token_id=PAD,
            **more,
        )


SHAPES = {
    "tiny": Shape("llama", 2, 32, 48, 4, 4, 64),
    "tiny-lora": Shape("llama", 2, 32, 48, 4, 4, 64),
    "cpu-small": Shape("llama", 4, 256, 688, 8, 8, 32000),
    "0.5b": Shape("qwen2", 24, 896, 4864, 14, 2, 151936, "bfloat16", tied=True),
    "1.5b": Shape("qwen2", 28, 1536, 8960, 12, 2, 151936, "bfloat16", tied=True),
    "8b-lora": Shape("llama", 32, 4096, 14336, 32, 8, 128256, "bfloat16"),
}

# Settings of saferlhf-fast: the most tokens of a pass where it is not the recipe's 16 x 512, and the rank of
# adapters on one shared base.
MICRO_TOKENS = {"cpu-small": 1024, "8b-lora": 2048}
RANKS = {"8b-lora": 16, "tiny-lora": 2}


@dataclass(frozen=True)
class Work:
    """Prompts and responses as ids. A response's length counts its end token."""

    prompts: list
    responses: list
    model: str

    @property
    def shape(self):
        return SHAPES[self.model]

    @property
    def limits(self):
        """Response tokens of each prompt."""
        return [len(ids) for ids in self.responses]

    @property
    def tokens(self):
        """Response tokens of all."""
        return sum(self.limits)

    @property
    def longest(self):
        """Longest prompt + longest response: the width of a padded batch of all rows."""
        return max(map(len, self.prompts)) + max(self.limits)

    def useful(self, micro):
        """Share of tokens that are not padding, in padded micro-batches of `micro` rows."""
        rows = list(zip(map(len, self.prompts), self.limits))
        real = sum(map(sum, rows))
        microbatches = [rows[at : at + micro] for at in range(0, len(rows), micro)]
        return real / sum(
            len(microbatch) * (max(p for p, _ in microbatch) + max(r for _, r in microbatch))
            for microbatch in microbatches
        )


def under_data(name):
    """Returns the path of `name` in the folder SAFERLHF_DATA, or None if the variable is not set."""
    folder = os.environ.get("SAFERLHF_DATA")
    return Path(folder) / name if folder else None


def read_rows(path=None):
    """Returns [(prompt, first response, second response)] of a PKU-SafeRLHF file.

    It raises Lacking if the file is missing.
    """
    path = Path(path) if path else under_data(ROWS)
    if path is None or not path.exists():
        raise Lacking(
            f"no real lengths: {Path(path or ROWS).name} is not there; --data names such a file, or "
            f"SAFERLHF_DATA the "
            f"folder that holds {ROWS}"
        )
    opened = gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else open(path, encoding="utf-8")
    with opened as file:
        records = [json.loads(line) for line in file if line.strip()]
    names = [("safe_response", "unsafe_response"), ("response_0", "response_1")]
    columns = next((pair for pair in names if records and pair[0] in records[0]), None)
    if columns is None:
        fields = sorted(records[0]) if records else "none"
        raise Lacking(f"{path.name}: expected records with a prompt and two responses, got {fields}")
    return [(record["prompt"], *(record[name] for name in columns)) for record in records]


def word_lengths(prompt, response):
    """Returns the tokens of a prompt in its template and of a response with its end token."""

    def tokens(text):
        return max(1, math.ceil(len(text.split()) * TOKENS_PER_WORD))

    return TEMPLATE_TOKENS + tokens(prompt), tokens(response) + 1


def token_lengths(path=None):
    """Returns a function like word_lengths that counts with the tokenizer of a folder."""
    path = Path(path) if path else under_data(TOKENIZER)
    if path is None or not path.is_dir():
        raise Lacking(
            f"no tokenizer: {Path(path or TOKENIZER).name} is not there; --tokenizer names its folder, or "
            f"SAFERLHF_DATA the folder that holds {TOKENIZER}"
        )
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(path))
    tokenizer.model_max_length = 1 << 30

    def count(text, special):
        return len(tokenizer(text, add_special_tokens=special)["input_ids"])

    return lambda prompt, response: (count(TEMPLATE.format(prompt), True), max(1, count(response, False)) + 1)


def make_work(model, count, *, seed=8, data=None, lengths="words", tokenizer=None, max_length=512):
    """`count` prompts with their responses. The same arguments give the same ids, and a larger count keeps
    the first ones.

    Rows are drawn without repetition (as long as there are enough), the answer by chance; max_length cuts
    responses.
    """
    rows = read_rows(data)
    draw = random.Random(seed)
    order = []
    while len(order) < count:
        order += draw.sample(range(len(rows)), len(rows))
    measure = token_lengths(tokenizer) if lengths == "tokens" else word_lengths
    prompts, responses = [], []
    for index in order[:count]:
        prompt, *answers = rows[index]
        p, r = measure(prompt, draw.choice(answers))
        p = min(p, max_length // 2)

        def ids(n):
            return [draw.randrange(FIRST, SHAPES[model].vocabulary) for _ in range(n)]

        prompts.append([BOS, *ids(p - 1)])
        responses.append([*ids(min(r, max_length - p) - 1), EOS])
    return Work(prompts, responses, model)


def write_work(work, path):
    Path(path).write_text(json.dumps(asdict(work)))


def load_work(path):
    return Work(**json.loads(Path(path).read_text()))


# ---------------------------------------------------------------- models


def causal_lm(shape, seed=0, device="cpu"):
    """Returns a random causal LM in fp32, the same on every side.

    The reference has the same weights as the actor, as at the start of a run.
    """
    import torch
    import transformers

    torch.manual_seed(seed)
    with torch.device(device):
        return transformers.AutoModelForCausalLM.from_config(shape.config(), dtype=torch.float32)


def backbone(shape, seed, device="cpu"):
    """Returns a random backbone in fp32 and the weight [1, hidden] of its head.

    seed: 1 for the reward model, 2 for the cost model.
    """
    import torch
    import transformers

    torch.manual_seed(seed)
    with torch.device(device):
        model = transformers.AutoModel.from_config(shape.config(), dtype=torch.float32)
        return model, torch.randn(1, shape.hidden) * 0.02
