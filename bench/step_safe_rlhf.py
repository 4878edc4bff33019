"""The side of bench_step.py that runs the reference implementation, PKU-Alignment/safe-rlhf.

Its own PPOLagTrainer runs on this bench's random models.

The code that runs is safe-rlhf's: `split_rl_micro_batches` (which calls `rollout`, which calls `generate` and
`post_rollout`), `rl_step` and, with PTX data, `ptx_step`, in the order of its `train()`, on its own score
models (AutoModelForScore) and transformers' causal LM. The trainer is created without its constructor, which
reads models and data sets from folders. Engines are DeepSpeed's, with safe-rlhf's configuration template
(`get_deepspeed_train_config`): ZeRO-0 in one process, hybrid engine off (it needs a GPU and inference
kernels), gradient clipping 1.0 as in the template, bf16 on a GPU. Not run: logging, checkpoints, and gradient
checkpointing (safe-rlhf's script switches it on: slower, and less memory than measured here).

Micro-batches have the 16 rows of its script (`--micro`), and the figures depend on this. Smaller
micro-batches pad less, need less memory and score and update faster, but each is generated separately, which
takes longer. With 4, 8, 16 and 32 rows of the CPU work, score and update took 30, 33, 41 and 51 CPU seconds
of one thread, and the peak was 2.3, 3.1, 4.8 and 7.4 GB.

safe-rlhf was written for transformers 4. `stand_in` supplies the names that transformers 5 lacks, before
`import safe_rlhf`, and changes nothing in safe-rlhf; each stand-in has its reason. `import safe_rlhf` finds
it on PYTHONPATH or installed.
"""

import importlib
import importlib.util
import math
import os
import socket
import sys
import time
import types
from collections import deque
from importlib.machinery import ModuleSpec

import step_work
import torch
from step_work import BOS, EOS, PAD, UNK

# ---------------------------------------------------------------- names that transformers 5 lacks


def stand_in():
    """Adds the missing names that safe_rlhf imports to transformers and sys.modules."""
    import accelerate  # noqa: F401  (it looks for wandb when it is imported, so it comes before the empty one below)
    import torch.utils.tensorboard  # noqa: F401
    from transformers import tokenization_utils_base

    # moved to tokenization_utils_base; safe_rlhf.utils and its data sets import them from the old place
    old = importlib.import_module("transformers.tokenization_utils")
    for name in ("BatchEncoding", "PaddingStrategy", "TruncationStrategy"):
        _lend(old, name, getattr(tokenization_utils_base, name))
    # removed; safe-rlhf's GPT-2 and GPT-J score models import both, and call them only in `parallelize()`
    if importlib.util.find_spec("transformers.utils.model_parallel_utils") is None:
        _module("transformers.utils.model_parallel_utils", assert_device_map=None, get_device_map=None)
    # removed from the model files; safe-rlhf's score models use them in docstrings
    for family in (
        "llama",
        "bloom",
        "gemma",
        "gpt2",
        "gpt_neo",
        "gpt_neox",
        "gptj",
        "mistral",
        "opt",
        "phi",
        "qwen2",
    ):
        model = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
        for name in ("_CONFIG_FOR_DOC", f"{family.upper()}_INPUTS_DOCSTRING"):
            _lend(model, name, "LlamaConfig")
    # safe-rlhf's logger imports wandb at the top; nothing is logged here
    if importlib.util.find_spec("wandb") is None:
        _module("wandb")


def _lend(module, name, value):
    if not hasattr(module, name):
        setattr(module, name, value)


def _module(name, **contents):
    module = types.ModuleType(name)
    module.__spec__ = ModuleSpec(name, None)
    vars(module).update(contents)
    sys.modules[name] = module


def importable():
    """Returns None, or the reason why this side cannot run."""
    if importlib.util.find_spec("safe_rlhf") is None:
        return "safe_rlhf is not importable"
    if importlib.util.find_spec("optree") is None:
        return "safe_rlhf needs optree, which is not importable"
    return None


def average_where_gloo_cannot():
    """Replaces `ReduceOp.AVG`, which gloo refuses, by a sum that is divided by the number of processes."""
    import torch.distributed as dist

    def wrapped(call):
        def reduce(tensor, *args, op=dist.ReduceOp.SUM, **more):
            if op != dist.ReduceOp.AVG:
                return call(tensor, *args, op=op, **more)
            done = call(tensor, *args, op=dist.ReduceOp.SUM, **more)
            tensor /= dist.get_world_size()
            return done

        return reduce

    if not torch.cuda.is_available():
        dist.reduce, dist.all_reduce = wrapped(dist.reduce), wrapped(dist.all_reduce)


# ---------------------------------------------------------------- safe-rlhf's trainer on this bench's models


def score_model(shape, seed, kind, device):
    """Returns safe-rlhf's AutoModelForScore with the bench's random backbone and head.

    The bias is 0 and there is no normaliser, as in this library's score models.
    """
    from safe_rlhf.models import AutoModelForScore

    config = shape.config()
    with torch.device(device):
        model = AutoModelForScore.from_config(config, score_type=kind, do_normalize=False)
    backbone, head = step_work.backbone(shape, seed, device)
    model.model.load_state_dict(backbone.state_dict())
    with torch.no_grad():
        model.score_head.weight.copy_(head)
        model.score_head.bias.zero_()
    return model


def make_trainer(work, recipe, device):
    """Returns safe-rlhf's PPOLagTrainer with everything that its methods read, without its constructor.

    recipe: `micro` (per_device_train_batch_size), `prompts` per step, `ptx`.
    """
    import deepspeed
    from safe_rlhf.algorithms.ppo_lag.trainer import PPOLagTrainer
    from safe_rlhf.configs import ADAM_BETAS, get_deepspeed_eval_config, get_deepspeed_train_config
    from safe_rlhf.utils import get_optimizer_grouped_parameters
    from transformers import GenerationConfig

    shape, micro = work.shape, min(recipe["micro"], len(work.prompts))
    accumulation = math.ceil(len(work.prompts) / micro)
    trainer = PPOLagTrainer.__new__(PPOLagTrainer)
    trainer.args = types.SimpleNamespace(
        device=device,
        per_device_train_batch_size=micro,
        num_return_sequences=1,
        actor_gradient_checkpointing=False,
        critic_gradient_checkpointing=False,
        gradient_accumulation_steps=accumulation,
    )
    trainer.tokenizer = types.SimpleNamespace(
        pad_token_id=PAD, unk_token_id=UNK, bos_token_id=BOS, eos_token_id=EOS
    )
    trainer.reward_tokenizer = trainer.cost_tokenizer = trainer.tokenizer
    trainer.global_step, trainer.use_ptx = 0, recipe["ptx"]
    bf16 = shape.dtype == "bfloat16"
    train = get_deepspeed_train_config(
        micro_batch_size_per_gpu=micro, gradient_accumulation_steps=accumulation, stage=0, bf16=bf16
    )
    evaluate = get_deepspeed_eval_config(stage=0, bf16=bf16)
    evaluate["train_batch_size"] = 1

    def trained(model, rate, decay, config):
        # safe-rlhf's FusedAdam is a CUDA extension that is compiled at first use; torch's fused AdamW has
        # the same rule.
        adam = torch.optim.AdamW(
            get_optimizer_grouped_parameters(model, decay), lr=rate, betas=ADAM_BETAS, fused=True
        )
        return deepspeed.initialize(model=model, optimizer=adam, config=config)[0]

    def frozen(model):
        engine = deepspeed.initialize(model=model, config=evaluate)[0]
        engine.eval()
        return engine

    twice = {
        **train,
        "train_batch_size": train["train_batch_size"] * 2,
        "gradient_accumulation_steps": accumulation * 2,
    }
    where = device if device.type == "cuda" else "cpu"
    trainer.actor_model = trained(
        step_work.causal_lm(shape, 0, where), 1e-5, 0.01, twice if recipe["ptx"] else train
    )
    trainer.actor_reference_model = frozen(step_work.causal_lm(shape, 0, where))
    trainer.reward_critic_model = trained(score_model(shape, 1, "critic", where), 5e-6, 0.0, train)
    trainer.reward_model = frozen(score_model(shape, 1, "reward", where))
    trainer.cost_critic_model = trained(score_model(shape, 2, "critic", where), 5e-6, 0.0, train)
    trainer.cost_model = frozen(score_model(shape, 2, "cost", where))
    trainer.generation_config = GenerationConfig(
        max_length=work.longest,
        num_return_sequences=1,
        temperature=1.0,
        top_p=1.0,
        repetition_penalty=1.0,
        do_sample=True,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )
    trainer.kl_coeff, trainer.clip_range_ratio, trainer.clip_range_score, trainer.clip_range_value = (
        0.01,
        0.2,
        50.0,
        5.0,
    )
    trainer.ptx_coeff, trainer.gamma, trainer.gae_lambda = 16.0, 1.0, 0.95
    trainer.log_lambda = torch.nn.Parameter(torch.tensor(0.0, device=device))
    trainer.log_lambda_max = math.log(5.0)
    trainer.log_lambda_optimizer = torch.optim.SGD([trainer.log_lambda], lr=0.1)
    trainer.lambda_update_delay_steps, trainer.threshold = 0, 0.0
    trainer.episode_costs = deque(maxlen=1024)
    return trainer


class Ends:
    """A logits processor that ends each row exactly at its own length, which makes the token counts equal.

    `begin` chooses the rows of the micro-batch among `limits`. A call does one masked write of [b, 3] and one
    of the rows that end.
    """

    def __init__(self, limits, device):
        self.limits = torch.tensor(limits, device=device)
        self.start = None

    def begin(self, rows, width):
        self.rows, self.start = self.limits[rows], width

    def __call__(self, ids, scores):
        scores[:, [UNK, EOS, PAD]] = float("-inf")
        ending = (self.rows == ids.shape[1] - self.start + 1)[:, None]
        scores.masked_fill_(ending, float("-inf"))
        scores[:, EOS] = torch.where(ending[:, 0], 0.0, scores[:, EOS])
        return scores


class Side:
    """The measured side.

    `step()` returns the seconds of rollout, score and update of one whole step; `check()` returns sums to
    compare with other sides.
    """

    def __init__(self, work, recipe):
        import deepspeed
        from transformers import LogitsProcessorList

        self.device = torch.device("cuda" if recipe["device"] == "cuda" else "cpu")
        average_where_gloo_cannot()
        if not torch.cuda.is_available():
            # Compiling the shared-memory collectives takes half a minute, and one process does not need them.
            vars(deepspeed.ops).setdefault("__compatible_ops__", {})["deepspeed_shm_comm"] = False
        alone()
        deepspeed.init_distributed(
            dist_backend="nccl" if self.device.type == "cuda" else "gloo", verbose=False
        )
        self.work, self.trainer = work, make_trainer(work, recipe, self.device)
        self.ends, self.row = Ends(work.limits, self.device), 0
        self.batch = {"input_ids": left(work.prompts, self.device)}
        self.batch["attention_mask"] = self.batch["input_ids"].ne(PAD)
        self.ptx = supervised(work, self.device) if recipe["ptx"] else None
        self.seconds = {}
        lm, trainer = self.trainer.actor_model.module, self.trainer
        own_generate, own_post = lm.generate, trainer.post_rollout

        def generate(**inputs):
            rows = len(inputs["input_ids"])
            self.ends.begin(slice(self.row, self.row + rows), inputs["input_ids"].shape[1])
            self.row += rows
            return self.timed(
                "rollout", own_generate, **inputs, logits_processor=LogitsProcessorList([self.ends])
            )

        def post_rollout(*args, **more):
            return self.timed("score", own_post, *args, **more)

        lm.generate, trainer.post_rollout = generate, post_rollout

    def timed(self, name, call, *args, **more):
        start = now(self.device)
        result = call(*args, **more)
        self.seconds[name] = self.seconds.get(name, 0.0) + now(self.device) - start
        return result

    def step(self):
        """Runs one round of safe-rlhf's `train()` and returns {rollout, score, update: seconds, tokens}."""
        self.seconds, self.row = {}, 0
        self.trainer.set_eval()
        microbatches = self.trainer.split_rl_micro_batches(self.batch)
        self.update(microbatches)
        mask = torch.cat(
            [
                microbatch["attention_mask"][:, microbatch["prompt"].shape[1] :].sum(-1)
                for microbatch in microbatches
            ]
        )
        return {**self.seconds, "tokens": int(mask.sum())}

    def update(self, microbatches):
        ptx_microbatches = (
            self.trainer.split_ptx_micro_batches(self.ptx) if self.ptx else [None] * len(microbatches)
        )
        self.trainer.set_train()
        losses = []
        for microbatch, ptx_microbatch in zip(microbatches, ptx_microbatches):
            losses.append(self.timed("update", self.trainer.rl_step, microbatch))
            if ptx_microbatch is not None:
                self.timed("update", self.trainer.ptx_step, ptx_microbatch)
            self.trainer.global_step += 1
        return losses

    def check(self):
        """Scores and updates once on the stored responses and returns sums to compare with other sides.

        It is also the warm-up: `rollout` runs on two prompts only, which saves the minute of a whole step.
        """
        self.trainer.set_eval()
        self.row = 0
        self.trainer.rollout({name: tensor[:2] for name, tensor in self.batch.items()})
        self.seconds, microbatches, micro = {}, [], self.trainer.args.per_device_train_batch_size
        self.trainer.set_eval()
        width = max(self.work.limits)
        responses = torch.tensor(
            [ids + [PAD] * (width - len(ids)) for ids in self.work.responses], device=self.device
        )
        prompts = self.batch["input_ids"]
        for at in range(0, len(prompts), micro):
            rows = slice(at, at + micro)
            used = max(self.work.limits[rows])
            sequence = torch.cat([prompts[rows], responses[rows, :used]], 1)
            microbatches.append(
                self.trainer.post_rollout(prompts[rows], sequence, sequence.ne(PAD) & sequence.ne(UNK))
            )
        start = prompts.shape[1] - 1

        def total(name):
            return sum(
                (microbatch[name] * microbatch["attention_mask"][:, 1:])[:, start:].double().sum().item()
                for microbatch in microbatches
            )

        sums = {
            "logp": total("log_probs"),
            "ref_logp": total("ref_log_probs"),
            "reward_values": total("reward_values"),
            "reward": sum(microbatch["reward"].sum().item() for microbatch in microbatches),
            "cost": sum(microbatch["cost"].sum().item() for microbatch in microbatches),
            "cost_values": total("cost_values"),
        }
        losses = self.update(microbatches)
        for name in ("reward_critic_loss", "cost_critic_loss"):
            sums[name] = sum(loss[f"train/{name}"] for loss in losses) / len(losses)
        return sums


def alone():
    """Tells DeepSpeed that this is the only process; otherwise it searches for mpi4py."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ.update(
        RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )


def left(prompts, device):
    """Returns prompts [B, P], padded on the left as by safe-rlhf's collator."""
    width = max(map(len, prompts))
    return torch.tensor([[PAD] * (width - len(ids)) + ids for ids in prompts], device=device)


def supervised(work, device):
    """Returns PTX data: the stored prompts and responses, padded on the right."""
    rows = [p + r for p, r in zip(work.prompts, work.responses)]
    width = max(map(len, rows))
    ids = torch.tensor([row + [PAD] * (width - len(row)) for row in rows], device=device)
    labels = torch.tensor(
        [
            [-100] * len(p) + r + [-100] * (width - len(p) - len(r))
            for p, r in zip(work.prompts, work.responses)
        ],
        device=device,
    )
    return {"input_ids": ids, "labels": labels, "attention_mask": ids.ne(PAD)}


def now(device):
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()
