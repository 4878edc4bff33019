"""Keeps other libraries' warnings off the terminal of a run: its user can do nothing about them.

What a user must know, this package says itself. `python -W default` shows the warnings again. DeepSpeed's log
is in deepspeed_library.py.
"""

import logging
import sys
import warnings

LIBRARIES = (
    *("accelerate", "bitsandbytes", "datasets", "filelock", "fsspec", "httpx", "huggingface_hub", "jinja2"),
    *("kernels", "matplotlib", "omegaconf", "peft", "pydantic", "safetensors", "tensorboard", "tokenizers"),
    *("torch", "torchao", "transformers", "triton", "urllib3"),
)


def quiet_libraries() -> None:
    """Shows errors alone of what other libraries log, and none of their warnings."""
    if sys.warnoptions:
        return
    for name in LIBRARIES:
        logger = logging.getLogger(name)
        if logger.level in (logging.NOTSET, logging.WARNING):
            logger.setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=rf"({'|'.join(LIBRARIES)}|deepspeed)(\.|$)")
