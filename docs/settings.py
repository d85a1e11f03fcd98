"""Writes the tables of docs/settings.md anew from the code: `python docs/settings.py`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from launch.support import flags, train_flags

PAGE = Path(__file__).with_suffix(".md")
MARK = "<!-- From here on written by docs/settings.py -->\n"


def written(page: str) -> str:
    """Returns `page` with the tables that the code gives."""
    parts = [page.partition(MARK)[0] + MARK]
    for title, rows in flags.described(flags.leaves_of(train_flags.SETTINGS)):
        parts.append(f"\n### {title.rstrip('.')}\n\n| flag | default | what it does |\n|---|---|---|\n")
        for flag, default, text in rows:
            shown = f"`{default}`" if default else ""
            parts.append(f"| `--{flag}` | {shown} | {text.replace('|', '&#124;').replace('<', '&lt;')} |\n")
    return "".join(parts)


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text("utf-8")), "utf-8")
