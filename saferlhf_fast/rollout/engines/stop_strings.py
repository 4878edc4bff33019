"""Stop strings: a response ends with the token that completes one of some texts."""


class StopStrings:
    """Looks for texts at the end of a response. Without any, it finds nothing and decodes nothing."""

    def __init__(self, tokenizer, strings):
        self.tokenizer, self.strings = tokenizer, tuple(strings)
        # A token stands for one byte at least; a few more, for those that stand for none (specials).
        self.window = max((len(text.encode()) for text in self.strings), default=0) + 8

    def __bool__(self):
        return bool(self.strings)

    def completed(self, ids):
        """True when the last of the ids, or one shortly before, completes a text; looks at the end alone."""
        text = self.tokenizer.decode(ids[-self.window :])
        return any(string in text for string in self.strings)

    def length(self, ids):
        """Ids up to and including the first that completes a text; None when none does."""
        return (
            next((n for n in range(1, len(ids) + 1) if self.completed(ids[:n])), None)
            if self.strings
            else None
        )
