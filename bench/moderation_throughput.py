"""How many pairs a moderator judges in a second, against the bare forward of its backbone.

    python bench/moderation_throughput.py BACKBONE FILE [--pairs 128] [--rounds 5]

The moderator has untrained heads on the backbone, which costs what trained ones do. It is timed with all that
a call does: tokenising, packing, backbone, heads, verdicts. The bare forward gets the same tokens in padded
batches of rows of like length, made beforehand. Both take turns; seconds are those of the processor (one
thread), so other work on the machine counts little. It prints one line of a table: backbone, pairs, tokens,
share of padding, pairs/s of the moderator and of the bare forward, their ratio and its range.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch
from transformers import AutoModel

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from saferlhf_fast.data.harm_taxonomy import PKU
from saferlhf_fast.models.encoders import reads_pairs
from saferlhf_fast.models.moderator_files import moderator_from_backbone
from saferlhf_fast.models.moderator_spec import Calibration, ModeratorSpec
from saferlhf_fast.models.tokenizer import load_tokenizer
from saferlhf_fast.moderation import Moderator
from saferlhf_fast.moderation.classify import read_items


def parsed():
    """The arguments."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("backbone", help="folder of a decoder or an encoder")
    parser.add_argument("file", help="JSON lines with prompt and response")
    parser.add_argument("--pairs", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch-tokens", type=int, default=4096)
    return parser.parse_args()


def padded_batches(encoded, batch_tokens):
    """Padded batches of rows of like length, so that little is padding: [(ids_BT, mask_BT)]."""
    groups = []
    for item in sorted(encoded, key=lambda item: len(item.ids)):
        if not groups or (len(groups[-1]) + 1) * len(item.ids) > batch_tokens:
            groups.append([])
        groups[-1].append(item.ids)
    batches = []
    for group in groups:
        ids_BT = torch.zeros(len(group), len(group[-1]), dtype=torch.long)
        mask_BT = torch.zeros_like(ids_BT)
        for b, ids in enumerate(group):
            ids_BT[b, : len(ids)] = torch.tensor(ids)
            mask_BT[b, : len(ids)] = 1
        batches.append((ids_BT, mask_BT))
    return batches


def seconds_of(work):
    """Processor seconds of a call."""
    started = time.process_time()
    work()
    return time.process_time() - started


def main():
    """Measures and prints."""
    args = parsed()
    torch.set_num_threads(1)
    pairs = reads_pairs(args.backbone, False)
    spec = ModeratorSpec(
        "pku", PKU, refusal=True, max_length=512, pairs=pairs, pooling="mean" if pairs else "last"
    )
    model = moderator_from_backbone(args.backbone, spec).eval()
    tokenizer = load_tokenizer(args.backbone, pairs=pairs)
    moderator = Moderator(model, tokenizer, Calibration(), args.batch_tokens)
    items = [item for item, _ in zip(read_items(args.file), range(args.pairs)) if item.error is None]
    prompts, responses = [item.prompt for item in items], [item.response for item in items]
    encoded = moderator.encode(prompts, responses)
    batches = padded_batches(encoded, args.batch_tokens)
    bare = AutoModel.from_pretrained(args.backbone, dtype=torch.float32).eval()

    def forward():
        with torch.inference_mode():
            for ids_BT, mask_BT in batches:
                bare(input_ids=ids_BT, attention_mask=mask_BT)

    def judge():
        moderator(prompts, responses)

    forward(), judge()
    rounds = [(seconds_of(judge), seconds_of(forward)) for _ in range(args.rounds)]
    ratios = sorted(plain / ours for ours, plain in rounds)
    ours, plain = (len(items) / statistics.median(column) for column in zip(*rounds))
    tokens = sum(len(item.ids) for item in encoded)
    padding = 1 - tokens / sum(ids_BT.numel() for ids_BT, _ in batches)
    print(
        f"| {Path(args.backbone).name} | {len(items)} | {tokens} | {padding:.1%} | {ours:.2f} | {plain:.2f} "
        f"| {statistics.median(ratios):.3f} ({ratios[0]:.3f} to {ratios[-1]:.3f}) |"
    )


if __name__ == "__main__":
    main()
