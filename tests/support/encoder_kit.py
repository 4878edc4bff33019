"""Tiny random encoders of six families with tokenizers of their own kind: WordPiece, BPE and Unigram."""

import string
from functools import cache

from kit import WORDS

FAMILIES = ("bert", "minilm", "roberta", "xlm-roberta", "deberta-v3", "modernbert")
LETTERS = string.ascii_letters + string.digits + ".:,!?"


@cache
def encoder_tokenizer(family):
    """The tokenizer of a family, made on the spot."""
    return {
        "bert": word_piece,
        "minilm": word_piece,
        "roberta": byte_pairs,
        "modernbert": byte_pairs_with_cls,
    }.get(family, unigram)(family)


def word_piece(_family):
    from transformers import BertTokenizer

    words = [word for word in WORDS if word.islower()]
    pieces = [*LETTERS.lower(), *(f"##{c}" for c in LETTERS.lower()), *words]
    return BertTokenizer(
        vocab=_ids("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *pieces), do_lower_case=True
    )


def byte_pairs(_family):
    from tokenizers import pre_tokenizers
    from transformers import RobertaTokenizer

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ġ", "y"), ("Ġy", "e"), ("Ġye", "s")]
    return RobertaTokenizer(
        vocab=_ids("<s>", "<pad>", "</s>", "<unk>", "<mask>", *alphabet, *(a + b for a, b in merges)),
        merges=merges,
    )


def byte_pairs_with_cls(_family):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocab = _ids("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *sorted(pre_tokenizers.ByteLevel.alphabet()))
    core = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {
        name: f"[{name[:-6].upper()}]"
        for name in ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
    }
    return PreTrainedTokenizerFast(
        tokenizer_object=core, model_input_names=["input_ids", "attention_mask"], **names
    )


def unigram(family):
    from transformers import DebertaV2Tokenizer, XLMRobertaTokenizer

    pieces = [*(f"▁{word}" for word in WORDS), "▁", *LETTERS]
    scored = [(piece, -1.0 - len(pieces) / (1 + len(piece))) for piece in pieces]
    if family == "xlm-roberta":
        first = ["<s>", "<pad>", "</s>", "<unk>"]
        return XLMRobertaTokenizer(vocab=[*((piece, 0.0) for piece in first), *scored, ("<mask>", 0.0)])
    first = ["[PAD]", "[CLS]", "[SEP]", "[UNK]"]
    return DebertaV2Tokenizer(vocab=[*((piece, 0.0) for piece in first), *scored, ("[MASK]", 0.0)], unk_id=3)


def _ids(*pieces):
    return {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}


def make_encoder(folder, family, seed=0, head=False, **settings):
    """Writes a 2-layer encoder as its masked language model (MiniLM: the base alone) with its tokenizer.

    head: it is written as a sequence-classification model of one label. Returns the folder as a string.
    """
    import torch
    import transformers

    tokenizer = encoder_tokenizer(family)
    name = {
        "bert": "Bert",
        "minilm": "Bert",
        "roberta": "Roberta",
        "xlm-roberta": "XLMRoberta",
        "deberta-v3": "DebertaV2",
        "modernbert": "ModernBert",
    }[family]
    common = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "max_position_embeddings": 130,
        "initializer_range": 0.2,
        "pad_token_id": tokenizer.pad_token_id,
    }
    own = {
        "roberta": {"type_vocab_size": 1},
        "xlm-roberta": {"type_vocab_size": 1},
        "deberta-v3": {
            "type_vocab_size": 0,
            "relative_attention": True,
            "position_buckets": 16,
            "norm_rel_ebd": "layer_norm",
            "share_att_key": True,
            "pos_att_type": ["p2c", "c2p"],
            "position_biased_input": False,
        },
        "modernbert": {
            "local_attention": 8,
            "cls_token_id": tokenizer.cls_token_id,
            "sep_token_id": tokenizer.sep_token_id,
            "bos_token_id": tokenizer.cls_token_id,
            "eos_token_id": tokenizer.sep_token_id,
        },
    }.get(family, {})
    config = getattr(transformers, f"{name}Config")(**{**common, **own, **settings})
    torch.manual_seed(seed)
    if head:
        config.num_labels = 1
    kind = "ForSequenceClassification" if head else "Model" if family == "minilm" else "ForMaskedLM"
    getattr(transformers, name + kind)(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def class_scores(folder, prompts, responses):
    """The scores of pairs by transformers alone."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    assert model.config.num_labels == 1
    with torch.no_grad():
        return model(**tokenizer(prompts, responses, return_tensors="pt", padding=True)).logits[:, 0]
