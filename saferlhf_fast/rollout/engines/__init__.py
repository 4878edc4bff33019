"""Rollout engines: prompts in, responses of the current policy out.

One interface, several engines (docs/rollouts.md).

    generator = open_generator(actor, tokenizer, ends, sampling)
    responses = generator.generate(prompts, seeds, limits)    # ids, a seed and a limit for each sequence
    generator.refresh()                                       # after an update of the weights
    generator.close()

The order is kept. A sequence's sample depends on its prompt, its seed and the weights; the other sequences of
a batch change it only through the last bits of logits (vLLM: as far as vLLM ensures that). Every rank calls
`generate` and `refresh`, even without prompts. Log-probs are those of the distribution that was sampled, with
temperature, top-k, top-p and repetition penalty as in models/sampling_distribution.py; scoring uses it too.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

from ...runtime import engine

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ...config.sections import Sampling
    from ..types import Response


class SamplingActor(Protocol):
    """What an engine samples with: an engine.Engine or engine.Frozen of a Policy, or a copy of its policy."""

    @property
    def module(self) -> Any:
        """The policy; the engine reads its `lm`."""

    @property
    def sharded(self) -> bool:
        """Whether ZeRO-3 has sharded the weights."""


class RolloutEngine(Protocol):
    """The interface of all engines."""

    def generate(
        self, prompts: Sequence[list[int]], seeds: Sequence[int], limits: Sequence[int]
    ) -> "list[Response]":
        """Samples one response for each prompt.

        Args:
            prompts: Token ids.
            seeds: One for each prompt.
            limits: Most tokens of each response, its end token or the tokens of a stop string included.

        Returns:
            The responses, in order.
        """

    def refresh(self) -> None:
        """Takes the new weights after an update, where the engine has a copy of its own."""

    def close(self) -> None:
        """Frees what the engine holds."""


def open_generator(
    actor: SamplingActor,
    tokenizer: "PreTrainedTokenizerBase",
    ends: Sequence[int | str],
    sampling: "Sampling",
) -> RolloutEngine:
    """Opens the engine that `sampling.engine` names.

    Args:
        actor: The policy that samples.
        tokenizer: Its tokenizer.
        ends: Ids that end a response, and end marks of several tokens, which end it when they are complete.
        sampling: The engine, the distribution and its limits.

    Returns:
        The engine.

    Raises:
        UserError: The engine cannot run here.
    """
    name = engine_name(sampling, actor.module.lm, engine.device().type, actor.sharded)
    if name == "generate":
        from .hf_generate import Generate

        return Generate(actor, tokenizer, ends, sampling)
    if name == "continuous":
        from .continuous import Continuous

        return Continuous(actor, tokenizer, ends, sampling)
    if name == "vllm":
        from .vllm_local import LocalVLLM

        return LocalVLLM(actor, tokenizer, ends, sampling)
    if name == "vllm-server":
        from .vllm_server import ServedVLLM

        return ServedVLLM(actor, tokenizer, ends, sampling)
    raise ValueError(f"sampling.engine: expected auto, generate, continuous, vllm or vllm-server, got {name}")


def engine_name(sampling: "Sampling", lm: "PreTrainedModel", device: str, sharded: bool) -> str:
    """The name of the engine that samples.

    Args:
        sampling: Its `engine`; auto is continuous batching on a GPU where the model allows it, else generate.
        lm: The actor's causal LM; its weights are not read (saferlhf-fast plan has it on the meta device).
        device: "cuda" or "cpu".
        sharded: Whether ZeRO-3 has sharded the actor's weights.

    Returns:
        The name.
    """
    if sampling.engine != "auto":
        return sampling.engine
    if device != "cuda" or (sharded and not sampling.gather):
        return "generate"
    from .continuous import refusal

    return "generate" if refusal(lm) else "continuous"
