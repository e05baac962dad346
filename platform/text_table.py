"""Plain text tables for terminals and log files: numbers to the right, the rest to the left."""

from __future__ import annotations

from collections.abc import Sequence

LONGEST_CELL = 100


def text_table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Rows under their column names, aligned with spaces; whole numbers get thousands separators."""
    texts = [[_shown(value) for value in row] for row in rows]
    widths = [max([len(name), *(len(row[i]) for row in texts)]) for i, name in enumerate(columns)]
    right = [bool(rows) and all(_is_number(row[i]) for row in rows) for i in range(len(columns))]
    lines = [list(columns), ["-" * width for width in widths], *texts]
    return "\n".join(
        "  ".join(
            text.rjust(width) if to_right else text.ljust(width)
            for text, width, to_right in zip(line, widths, right, strict=True)
        ).rstrip()
        for line in lines
    )


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _shown(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    text = f"{value:,.4g}" if isinstance(value, float) else str(value)
    # What stands in a file's metadata must not move the cursor or break the line.
    text = "".join(character if character.isprintable() else " " for character in text)
    return text if len(text) <= LONGEST_CELL else f"{text[: LONGEST_CELL - 1]}…"
