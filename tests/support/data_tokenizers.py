"""Small tokenizers for the data tests, made on the spot: one token per byte or per character."""

from functools import cache

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from tokenizers import decoders as decoding
from transformers import PreTrainedTokenizerFast

SPECIAL = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] | trim + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA2 = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + m['content'] + ' [/INST]' "
    "}}"
    "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] + ' ' + eos_token }}"
    "{% else %}{{ raise_exception('only user and assistant, please') }}{% endif %}{% endfor %}"
)
THINKING = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' and loop.last %}{{ '<think></think>' }}{% endif %}"
    "{{ m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@cache
def byte_tokenizer(bos=True, template=None, eos="</s>", more=()):
    """One token per byte; any text comes back as it was. `more` are further special tokens."""
    special = list(dict.fromkeys([*SPECIAL, *more]))
    vocabulary = {token: i for i, token in enumerate(special + sorted(pre_tokenizers.ByteLevel.alphabet()))}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoding.ByteLevel()
    return _wrapped(core, bos, template, eos, special)


@cache
def space_tokenizer():
    """One token per character, with SentencePiece's space in front of every text."""
    letters = "▁\n :.?!,abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
    core = Tokenizer(
        models.BPE(
            vocab={token: i for i, token in enumerate([*SPECIAL, *letters])}, merges=[], unk_token="<unk>"
        )
    )
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.decoder = decoding.Sequence([decoding.Replace("▁", " "), decoding.Fuse(), decoding.Strip(" ", 1, 0)])
    return _wrapped(core, True, None, "</s>")


def _wrapped(core, bos, template, eos, special=SPECIAL):
    core.add_special_tokens(special)
    if bos:
        core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    made = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>" if bos or template else None,
        eos_token=eos,
        unk_token="<unk>",
        pad_token="<unk>",
    )
    made.chat_template = template
    return made
