"""The fused linear log-prob in your own SFT or DPO loop, beside the plain way: same losses, less memory.

    python examples/custom_trainer.py               # DPO from random weights, 32,000 words; takes seconds
    python examples/custom_trainer.py --loss sft
    python examples/custom_trainer.py --model DIR --data FILE.jsonl  # {"prompt", "chosen", "rejected"} a line

The plain way is log_softmax over the logits of every position, then gather. The fused way takes the
backbone's hidden states of the response positions (`pack`) and the head's weight (`linear_logprob`), and sums
over rows again (`unpack`): logits exist in chunks alone, 64 MiB on a CPU, 1 GiB on a GPU. Both train the same
model from the same weights; the table is measured while it runs. Nothing else in the loop changes.

Shapes: B rows, L tokens, N response tokens of all rows, packed; H hidden, V vocabulary.
"""

import argparse
import copy
import time
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from arguments import number, rows_of
from torch.nn import functional as F

from saferlhf_fast import linear_logprob, pack, unpack

Batch: TypeAlias = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # ids_BL, mask_BL, response_BL


def plain_logp(
    lm: Any, ids_BL: torch.Tensor, mask_BL: torch.Tensor, response_BL: torch.Tensor
) -> torch.Tensor:
    """Sum of each row's response log-probs, [B]: logits and log-softmax of every position, then gather."""
    logits_BLV = lm(input_ids=ids_BL, attention_mask=mask_BL).logits.float()
    logp_BL = logits_BLV[:, :-1].log_softmax(-1).gather(-1, ids_BL[:, 1:, None]).squeeze(-1)
    return (logp_BL * response_BL[:, 1:]).sum(1)


def fused_logp(
    lm: Any, ids_BL: torch.Tensor, mask_BL: torch.Tensor, response_BL: torch.Tensor
) -> torch.Tensor:
    """The same sums without logits, from hidden states before response tokens and the head's weight."""
    hidden_BLH = lm.base_model(input_ids=ids_BL, attention_mask=mask_BL).last_hidden_state
    (hidden_NH, ids_N), cu_seqlens = pack((hidden_BLH[:, :-1], ids_BL[:, 1:]), response_BL[:, 1:])
    head = lm.get_output_embeddings()
    logp_N = linear_logprob(hidden_NH, head.weight, ids_N, bias=head.bias)
    return unpack(logp_N, cu_seqlens).sum(1)  # rows again, zeros behind their tokens


def train(
    lm: Any, batches: list[Batch], logp: Callable[..., torch.Tensor], args: argparse.Namespace
) -> tuple[list[float], float, int]:
    """The loop, which is the same for either `logp`.

    Args:
        lm: a causal LM.
        batches: one for each step; for DPO the chosen rows come first, then the rejected ones.
        logp: `plain_logp` or `fused_logp`.
        args: loss, lr and beta.

    Returns:
        (losses, median seconds of a step, peak bytes of a step).
    """
    reference = copy.deepcopy(lm).requires_grad_(False) if args.loss == "dpo" else None
    optimizer = torch.optim.AdamW(lm.parameters(), lr=args.lr, weight_decay=0.0)
    losses, seconds = [], []

    def step(batch: Batch) -> float:
        logp_B = logp(lm, *batch)
        if reference is None:
            loss = -logp_B.sum() / batch[2].sum()
        else:
            with torch.no_grad():
                ref_logp_B = logp(reference, *batch)
            chosen, rejected = (logp_B - ref_logp_B).chunk(2)
            loss = -F.logsigmoid(args.beta * (chosen - rejected)).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    for batch in batches:
        began = time.perf_counter()
        losses.append(step(batch))
        seconds.append(time.perf_counter() - began)
    return losses, sorted(seconds)[len(seconds) // 2], peak_bytes(lambda: step(batches[-1]))


def peak_bytes(call: Callable[[], object]) -> int:
    """Most bytes that torch holds at once during call() beyond those it held before."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(profile_memory=True) as profile:
        call()
    current = most = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            current += event.nbytes()
            most = max(most, current)
    return most


def toy(args: argparse.Namespace) -> tuple[Any, list[Batch]]:
    """A tiny Llama with a large vocabulary; chosen responses count upwards, rejected ones are random."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=args.vocabulary,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=256,
    )
    start = torch.randint(10, 1000, (args.steps, args.rows, 1))
    upwards = start + torch.arange(args.length)
    random = torch.randint(10, args.vocabulary, upwards.shape)
    random[:, :, :4] = upwards[:, :, :4]  # the prompt
    ids = torch.cat([upwards, random], 1) if args.loss == "dpo" else upwards
    response = torch.zeros_like(ids, dtype=torch.bool)
    response[:, :, 4:] = True
    return LlamaForCausalLM(config), [(i, torch.ones_like(i), r) for i, r in zip(ids, response)]


def real(args: argparse.Namespace) -> tuple[Any, list[Batch]]:
    """A model from a folder or the Hub, and pairs from a file of JSON lines."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    keys = ("chosen", "rejected") if args.loss == "dpo" else ("chosen",)
    rows = rows_of(args.data, "prompt", *keys)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    device = "cuda" if torch.cuda.is_available() else "cpu"

    def encoded(row: dict[str, str], key: str) -> tuple[list[int], list[int]]:
        prompt = tokenizer(row["prompt"]).input_ids
        return prompt, tokenizer(row[key], add_special_tokens=False).input_ids + [tokenizer.eos_token_id]

    batches = []
    for step in range(args.steps):
        chosen = [rows[(step * args.rows + i) % len(rows)] for i in range(args.rows)]
        pairs = [encoded(row, key) for key in keys for row in chosen]
        longest = max(len(prompt) + len(answer) for prompt, answer in pairs)
        ids = torch.zeros(len(pairs), longest, dtype=torch.long)
        mask, response = torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.bool)
        for i, (prompt, answer) in enumerate(pairs):
            length = len(prompt) + len(answer)
            ids[i, :length] = torch.tensor(prompt + answer)
            mask[i, :length], response[i, len(prompt) : length] = 1, True
        batches.append((ids.to(device), mask.to(device), response.to(device)))
    return AutoModelForCausalLM.from_pretrained(args.model).to(device), batches


def main() -> None:
    """Trains twice from the same weights, the plain and the fused way, and prints time and memory of each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="a causal LM; without it a tiny one is made")
    parser.add_argument("--data", help="JSON lines with prompt, chosen and (for dpo) rejected")
    parser.add_argument("--loss", choices=("sft", "dpo"), default="dpo")
    parser.add_argument("--beta", type=number(float, 0), default=0.1)
    parser.add_argument("--steps", type=number(int, 1), default=5)
    parser.add_argument("--rows", type=number(int, 1), default=8, help="prompts of a step")
    parser.add_argument("--lr", type=number(float, 0), default=1e-3)
    parser.add_argument("--vocabulary", type=number(int, 1), default=32_000, help="of the tiny model")
    parser.add_argument(
        "--length", type=number(int, 5, 256), default=64, help="tokens of the tiny model's rows"
    )
    args = parser.parse_args()
    if args.model and not args.data:
        parser.error("--model needs --data")
    least = 1000 + args.length  # the toy's responses count upwards from 10 … 999
    if not args.model and args.vocabulary < least:
        parser.error(
            f"--vocabulary: expected {least} or more for rows of {args.length} tokens, got {args.vocabulary}"
        )
    torch.manual_seed(0)
    try:
        lm, batches = (real if args.model else toy)(args)
    except (OSError, KeyError, ValueError) as error:
        # A path or a file with other contents than expected.
        parser.exit(2, f"error: {' '.join(str(error).split())}\n")
    print(
        f"{args.loss}, {batches[0][0].numel()} tokens a step, {lm.get_output_embeddings().weight.shape[0]} "
        f"words"
    )
    print("way      first loss   last loss   s/step   peak MiB of a step")
    results = {}
    for name, logp in (("plain", plain_logp), ("fused", fused_logp)):
        losses, seconds, peak = results[name] = train(copy.deepcopy(lm), batches, logp, args)
        print(f"{name:8} {losses[0]:10.4f} {losses[-1]:11.4f} {seconds:8.2f} {peak / 2**20:20.0f}")
    plain, fused = results["plain"], results["fused"]
    gap = max(abs(a - b) for a, b in zip(plain[0], fused[0]))
    print(f"largest difference of a loss {gap:.1e}; memory {plain[2] / fused[2]:.1f} times less")


if __name__ == "__main__":
    main()
