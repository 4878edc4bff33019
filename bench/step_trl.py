"""The side of bench_step.py that runs TRL: GRPOTrainer, driven by its `train()`.

It is the trainer of TRL 1.16 that is closest to PPO-Lag; TRL's PPO trainer was removed.

Compared with a PPO-Lag step it has no critics (no value pass and no value loss: two of the three trained
models), no GAE, no λ (the cost model is a second reward function with weight −1), and no per-token
advantages. It needs no pass for old log-probs, because generations and updates alternate. It has the actor, a
reference (beta 0.01), a reward and a cost model, its memory-saving chunked log-probs, padding, and the
Trainer around it (clipping, AdamW, callbacks). So its times are a lower bound of what a PPO-Lag step would
take in TRL, not a like-for-like comparison.

The work is the same as on the other sides: each prompt occurs once (the sampler repeats prompts for groups; a
group here is two neighbours, which changes no arithmetic), rows end at their own lengths, and reward models
read texts through a tokenizer with one word per id, so that token counts are equal. TRL is not changed.
"""

import importlib.util
import os
import tempfile

import step_work
import torch
from step_safe_rlhf import Ends, now
from step_words import one_word_an_id


def importable():
    """Returns None, or the reason why this side cannot run."""
    for name in ("trl", "accelerate", "datasets"):
        if importlib.util.find_spec(name) is None:
            return f"{name} is not importable"
    return None


def reward_model(shape, seed, device):
    """Returns transformers' sequence classifier with one label on the bench's random backbone and head."""
    from transformers import AutoModelForSequenceClassification

    config = shape.config()
    config.num_labels = 1
    with torch.device(device):
        model = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
    backbone, head = step_work.backbone(shape, seed, device)
    model.model.load_state_dict(backbone.state_dict())
    with torch.no_grad():
        model.score.weight.copy_(head)
    return model.to(getattr(torch, shape.dtype))


class Side:
    """The measured side: `step()` returns the seconds of rollout, score and update of one whole step."""

    def __init__(self, work, recipe):
        os.environ.setdefault("WANDB_MODE", "disabled")
        from datasets import Dataset
        from transformers import LogitsProcessorList, TrainerCallback
        from trl import GRPOConfig, GRPOTrainer

        self.device = torch.device(recipe["device"])
        self.seconds, self.tokens = {}, 0
        shape, count, micro = work.shape, len(work.prompts), min(recipe["micro"], len(work.prompts))
        if count % micro or micro % 2:
            raise step_work.Lacking(
                f"GRPO takes whole micro-batches of an even size, got {count} prompts by {micro}"
            )
        tokenizer = one_word_an_id(shape.vocabulary)
        prompts = [" ".join(tokenizer.convert_ids_to_tokens(ids)) for ids in work.prompts]
        self.folder = tempfile.TemporaryDirectory()
        path = os.path.join(self.folder.name, "policy")
        lm = step_work.causal_lm(shape, 0).to(getattr(torch, shape.dtype))
        lm.save_pretrained(path)  # GRPOTrainer reads the reference from a folder
        del lm
        args = GRPOConfig(
            output_dir=self.folder.name,
            per_device_train_batch_size=micro,
            gradient_accumulation_steps=count // micro,
            num_generations=2,
            max_completion_length=max(work.limits),
            beta=0.01,
            learning_rate=1e-5,
            max_grad_norm=1.0,
            max_steps=recipe["warmup"] + recipe["repeat"],
            bf16=shape.dtype == "bfloat16",
            use_cpu=self.device.type == "cpu",
            gradient_checkpointing=False,
            reward_weights=[1.0, -1.0],
            save_strategy="no",
            report_to="none",
            logging_steps=10**6,
            disable_tqdm=True,
            model_init_kwargs={"dtype": shape.dtype},
            seed=0,
        )
        where = "cuda" if self.device.type == "cuda" else "cpu"
        self.trainer = GRPOTrainer(
            model=path,
            args=args,
            processing_class=tokenizer,
            train_dataset=Dataset.from_dict({"prompt": prompts}),
            reward_funcs=[reward_model(shape, seed, where) for seed in (1, 2)],
            reward_processing_classes=[tokenizer] * 2,
        )
        self.trainer._get_train_sampler = lambda dataset=None: (
            list(range(count)) * (count // micro) * args.max_steps
        )
        self._wrap(Ends(work.limits, self.device), LogitsProcessorList, TrainerCallback)
        self.steps = []

    def _wrap(self, ends, processors, callback):
        """Adds clocks around generation and scoring, and passes the row lengths to `generate`."""
        trainer, lm = self.trainer, self.trainer.model
        turn, scored, generate = (
            trainer._generate_single_turn,
            trainer._generate_and_score_completions,
            lm.generate,
        )

        def with_ends(**inputs):
            ends.begin(slice(None), inputs["input_ids"].shape[1])
            return generate(**inputs, logits_processor=processors([ends]))

        def timed_turn(*args, **more):
            start = now(self.device)
            ids, logp = turn(*args, **more)
            self.seconds["rollout"] = now(self.device) - start
            self.tokens = sum(map(len, ids))
            return ids, logp

        def timed_score(inputs):
            start = now(self.device)
            result = scored(inputs)
            self.seconds["score"] = now(self.device) - start - self.seconds["rollout"]
            return result

        lm.generate, trainer._generate_single_turn, trainer._generate_and_score_completions = (
            with_ends,
            timed_turn,
            timed_score,
        )
        side = self

        class Clock(callback):
            def on_step_begin(self, *args, **more):
                side.start = now(side.device)

            def on_step_end(self, *args, **more):
                step_seconds = now(side.device) - side.start
                split = dict(side.seconds)
                side.steps.append(
                    {**split, "update": step_seconds - sum(split.values()), "tokens": side.tokens}
                )

        trainer.add_callback(Clock())

    def check(self):
        """Returns nothing: the numbers belong to another objective."""
        return {}

    def step(self):
        """Returns the next of the steps that `train()` made."""
        if not self.steps:
            self.trainer.train()
        return self.steps.pop(0)
