"""A tokenizer for random ids: id i is the word "wi".

Decoding and encoding therefore give back the same ids, and no length changes.
"""

from step_work import BOS, EOS, PAD, UNK


def one_word_an_id(vocabulary):
    """Returns a transformers tokenizer with the special tokens of step_work."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    special = {UNK: "<unk>", BOS: "<s>", EOS: "</s>", PAD: "<pad>"}
    inner = Tokenizer(WordLevel({special.get(i, f"w{i}"): i for i in range(vocabulary)}, unk_token="<unk>"))
    inner.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        padding_side="left",
    )
