"""Rollout engines: prompts in, responses of the current policy out.

One interface, several engines (docs/rollouts.md).

    generator = open_generator(actor, tokenizer, ends, sampling)
    responses = generator.generate(prompts, seeds, limits)    # lists of ids, one seed and one limit each ->
    [Response] generator.refresh()                                       # the weights have changed: an engine
    with its own takes them generator.close()

Order is kept. A sequence's sample depends on its prompt, its seed and the weights; on what else is sampled
beside it only through the last bits of logits (vLLM: as far as vLLM keeps to that). A response holds at most
its limit of tokens, the end token or the tokens of a stop string included. Every rank calls `generate` and
`refresh`, if with no prompts. Log-probs are those of the distribution that was sampled: temperature, top-k,
top-p and repetition penalty as in models/sampling_distribution.py, which scoring uses too.
"""

from ...runtime import engine


def open_generator(actor, tokenizer, ends, sampling):
    """-> the engine that `sampling.engine` names.

    actor: an engine.Engine or engine.Frozen that holds a Policy · ends: ids that end a response. UserError
    when the engine cannot run here.
    """
    name = engine_name(sampling, actor.module.lm, engine.device().type, actor.sharded)
    if name == "generate":
        from .hf_generate import Generate as Chosen
    elif name == "continuous":
        from .continuous import Continuous as Chosen
    elif name == "vllm":
        from .vllm_local import LocalVLLM as Chosen
    elif name == "vllm-server":
        from .vllm_server import ServedVLLM as Chosen
    else:
        raise ValueError(
            f"sampling.engine: expected auto, generate, continuous, vllm or vllm-server, got {name}"
        )
    return Chosen(actor, tokenizer, ends, sampling)


def engine_name(sampling, lm, device, sharded):
    """-> the name of the engine that samples; `auto` is continuous batching on a GPU where the model allows
    it, else generate.

    lm: the actor's causal LM, whose weights are not looked at (saferlhf-fast plan asks with one on the meta
    device) · device: "cuda" or "cpu" · sharded: whether the actor's weights are, by ZeRO-3.
    """
    if sampling.engine != "auto":
        return sampling.engine
    if device != "cuda" or (sharded and not sampling.gather):
        return "generate"
    from .continuous import refusal

    return "generate" if refusal(lm) else "continuous"
