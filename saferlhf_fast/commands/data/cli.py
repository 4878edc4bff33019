"""The command line of `saferlhf-fast data inspect | convert | split`."""

from collections.abc import Sequence

from saferlhf_fast.commands.data import convert, inspect, split
from saferlhf_fast.commands.data.options import ConvertOptions, InspectOptions, SplitOptions, parse
from saferlhf_fast.errors import UserError

HELP = """usage: saferlhf-fast data inspect SOURCE… [model=DIR] [against=SOURCE] [near=0.8] [output=FOLDER]
       saferlhf-fast data convert SOURCE… to=FORM output=FILE [by=better|safer]
       saferlhf-fast data split   SOURCE… output=FOLDER [test=0.1] [validation=0] [near=0.8]

A SOURCE is a file (.jsonl, .json, .csv, .parquet, .gz of these), a folder of files, or a data set of the Hub.

  inspect   counts, category × severity table, lengths, agreement of better and safer, duplicates and
            contradictions, on the screen and as a page in FOLDER (inspection.html). Lengths are measured on a
            random sample of 20,000 rows: in tokens with model=DIR, else in characters; lengths=all measures
            every row. against=SOURCE counts what another source has too, such as a test set. near=0.8 also
            counts prompts that share 80 % of their text with another one
  convert   writes another form: {forms}.
            Labels that the form does not hold are counted, and so are categories of harm without an exact
            counterpart, on the way there and back. by chooses the preference of single and trl-preference
  split     writes train.jsonl, test.jsonl and validation.jsonl; equal and nearly equal prompts are on one
            side. near=1 looks at equal prompts only. CSV files give CSV files

options of all three:
  form=NAME       how the rows are read; auto (the default) looks at the columns
  strict=true     stop at the first row that cannot be used; otherwise it is counted with its reason, written
                  to a side file with its line, and skipped
  overwrite=true  replace an output that exists
  seed=0          seed of the sample and of the sides

examples:
  saferlhf-fast data inspect train.jsonl against=test.jsonl model=meta-llama/Llama-3.2-1B
  saferlhf-fast data inspect PKU-Alignment/PKU-SafeRLHF
  saferlhf-fast data convert train.jsonl to=beavertails output=beavertails.jsonl
  saferlhf-fast data convert train.jsonl to=trl-preference by=safer output=safer.jsonl
  saferlhf-fast data split all.jsonl output=parts test=0.1 validation=0.05

docs/data.md shows the forms."""


def help_text() -> str:
    """Returns what `data --help` prints."""
    names, lines = list(convert.WRITERS), [""]
    for name in names:
        if len(lines[-1]) + len(name) > 85:
            lines.append("")
        lines[-1] += f"{name}, "
    return HELP.format(forms=("\n" + " " * 12).join(line.rstrip() for line in lines).rstrip(","))


def main(words: Sequence[str]) -> None:
    """Runs one of the commands.

    Args:
        words: What follows `data` on the command line.

    Raises:
        UserError: A word is wrong, or a source cannot be used.
    """
    action, rest = (words[0], words[1:]) if words else ("", ())
    if action == "inspect":
        inspecting = InspectOptions()
        parse("data inspect", inspecting, rest)
        inspect.inspect(inspecting)
    elif action == "convert":
        converting = ConvertOptions()
        parse("data convert", converting, rest)
        convert.convert(converting)
    elif action == "split":
        splitting = SplitOptions()
        parse("data split", splitting, rest)
        split.split(splitting)
    else:
        raise UserError(f"data: expected inspect, convert or split, got {action or 'nothing'}; data --help")
