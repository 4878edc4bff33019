"""What `forked` imports before it forks: the modules that the programs of the tests import sooner or later.

Environments of other libraries lack some of the packages; a program there imports what it needs itself.
"""

import contextlib
import importlib
import os
import warnings

MODULES = (
    "torch",
    "datasets",
    "deepspeed",
    "peft",
    "transformers",
    "saferlhf_fast.cli",
    "saferlhf_fast.commands.run",
    "saferlhf_fast.training.dpo",
    "saferlhf_fast.training.ppo_lag",
    "saferlhf_fast.training.preference",
    "saferlhf_fast.training.sft",
)

os.environ.setdefault("DS_ACCELERATOR", "cpu")  # as the engine sets it; DeepSpeed reads it at its import
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    for module in MODULES:
        with contextlib.suppress(ModuleNotFoundError):
            importlib.import_module(module)
    with contextlib.suppress(ModuleNotFoundError):
        # transformers imports these when they are asked for
        from transformers import LlamaForCausalLM, PreTrainedTokenizerFast  # noqa: F401
