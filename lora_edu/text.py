"""What the package says of names, whole numbers, bytes and ranks, in one wording. Python's own library only.

Not for the words of one module: its errors and sentences stay with it.
"""

import operator
from collections.abc import Iterable


def printable(value: object, most: int = 120) -> str:
    """A name or value out of a file, safe to print: no control characters, at most `most` letters and an ellipsis."""
    text = "".join(each if each.isprintable() else "?" for each in str(value))
    return text if len(text) <= most else f"{text[:most]}…"


def format_bytes(number: float) -> str:
    """Bytes to three digits in units of 1000: 840 B, 4.21 MB (a MB is 10⁶ bytes; the MiB of 2²⁰ is 4.9 % more)."""
    if number < 999.5:
        return f"{number:.0f} B"
    units = {"kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}
    unit, size = next(((unit, size) for unit, size in units.items() if number < 999.5 * size), ("TB", 1e12))
    return f"{number / size:.3g} {unit}" if number < 999.5 * size else f"{number / size:,.0f} {unit}"


def nearest(name: str, known: Iterable[str], cutoff: float = 0.5) -> list[str]:
    """At most three of the known names that resemble `name`, the closest first; upper and lower case count alike.

    cutoff: the least resemblance, 0 (always three) to 1 (equal), as in difflib.
    """
    import difflib  # here, because it costs as much as the whole of `counting`, which imports this module

    spelt = {each.lower(): each for each in known}
    return [spelt[each] for each in difflib.get_close_matches(name.lower(), spelt, n=3, cutoff=cutoff)]


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of an error's first sentence: '; did you mean query or key?', or '.' where nothing is near."""
    close = nearest(name, known)
    return f"; did you mean {' or '.join(close)}?" if close else "."


def whole_number(name: str, value: object, least: int = 1) -> int:
    """`value` as an int; a ValueError that names it where it is no whole number or too small."""
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, bool) or number < least:
        raise ValueError(f"{name} must be a whole number, {least} or more; got {value!r}")
    return number


def check_rank(rank: int, shape: tuple[int, int], what: str = "weight", bounded: bool = True) -> int:
    """The rank as an int, if a rows × columns matrix can have it; `what` names the matrix in the error.

    Unless `bounded` a rank above the smaller side passes too. Raises ValueError.
    """
    rows, columns = shape
    smaller = min(rows, columns)
    try:
        whole = None if isinstance(rank, bool) else operator.index(rank)
    except TypeError:
        whole = None
    if whole is None:
        raise ValueError(f"rank must be a whole number; got {rank!r}")
    if whole < 1 or (bounded and whole > smaller):
        raise ValueError(
            f"rank must be between 1 and {smaller} (the smaller side of the {rows} × {columns} {what}); got {whole}"
        )
    return whole
