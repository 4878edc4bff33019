"""docs/contradictions.md as config/contradictions.py has it: `python tests/support/contradictions_page.py`
writes it anew.

A row is a setting, the stage in which it is refused when that is one of the table's stages alone, and the
message.
"""

import re
from pathlib import Path

PAGE = Path(__file__).resolve().parents[2] / "docs" / "contradictions.md"
HEAD = """# Settings that do not go together

A stage checks its settings before it loads anything. It reports the first row of this page, from the top,
that applies to its settings, with this message. In a message, ‹max_length› stands for the value of
max_length, and ‹got› for the given value. `saferlhf-fast ppo-lag --help` explains the settings themselves.
The tables are in `saferlhf_fast/config/contradictions.py`; `python tests/support/contradictions_page.py`
writes this page from them.
"""


def page():
    """-> the whole page as text."""
    from saferlhf_fast.config import contradictions
    from saferlhf_fast.config.stage_table import stages_of

    optimisers = (
        "Optimisers (critic_optim as optim)",
        stages_of("supervised", "ppo"),
        contradictions.OPTIMIZER,
    )
    parts = [HEAD]
    for title, stages, rows in (*contradictions.TABLES, optimisers):
        parts.append(f"\n## {title}\n\nStages: {', '.join(stages)}.\n\n| setting | message |\n|---|---|\n")
        for row in rows:
            only = f" ({row.only})" if row.only else ""
            parts.append(
                f"| `{_template(row.key.replace('{at}', 'optim'))}`{only} | {_template(row.message)} |\n"
            )
    return "".join(parts)


def _template(text):
    """{cfg.ppo.batch_size} -> ‹ppo.batch_size›"""
    return re.sub(r"\{(?:cfg\.)?([\w.]+)(?::\w+)?\}", r"‹\1›", text)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
