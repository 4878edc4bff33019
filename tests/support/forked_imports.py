"""The modules that `forked` imports before it forks: those that the programs of the tests need."""

import os
import warnings

os.environ.setdefault(
    "DS_ACCELERATOR", "cpu"
)  # as the engine sets it; DeepSpeed reads it when it is imported
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import datasets  # noqa: F401
    import deepspeed  # noqa: F401
    import peft  # noqa: F401
    import transformers  # noqa: F401
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast  # noqa: F401

    import saferlhf_fast  # noqa: F401
    from saferlhf_fast import cli  # noqa: F401
    from saferlhf_fast.commands import run  # noqa: F401
    from saferlhf_fast.training import dpo, ppo_lag, preference, sft  # noqa: F401
