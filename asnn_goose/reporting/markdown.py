"""Numbers and tables as markdown text."""

import re
from collections.abc import Iterable, Sequence

_PREFIXES = {-15: "f", -12: "p", -9: "n", -6: "µ", -3: "m", 0: "", 3: "k", 6: "M", 9: "G", 12: "T"}


def number(value: float, digits: int = 4) -> str:
    """`value` with `digits` significant digits, in full from 1e-4 to below 1e9, thousands separated by commas."""
    if value == 0:
        return "0"
    decimals = digits - 1 - _exponent(value, digits)
    if decimals > digits + 3 or abs(value) >= 1e9:
        return f"{value:.{digits - 1}e}"
    return f"{value:,.{max(decimals, 0)}f}"


def _exponent(value: float, digits: int) -> int:
    """Power of ten of the value once it is rounded: 9.9999 has two digits before the point."""
    return int(f"{value:.{digits - 1}e}".partition("e")[2])


def integer(value: float) -> str:
    """A count, thousands separated by commas."""
    return f"{value:,.0f}"


def counted(count: int, noun: str) -> str:
    """1 run, 2 runs."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def enumeration(names: Sequence[str]) -> str:
    """a; a and b; a, b and c."""
    return " and ".join([", ".join(names[:-1]), names[-1]]) if len(names) > 1 else names[0]


def in_words(name: str) -> str:
    """A name of the code as a reader says it."""
    return name.replace("_", " ")


def percent(fraction: float) -> str:
    """A share of 1 as per cent with one decimal, two significant digits below one per cent."""
    return "0 %" if fraction == 0 else f"{100 * fraction:.1f} %" if abs(fraction) >= 0.01 else f"{100 * fraction:.2g} %"


def quantity(value: float, unit: str = "") -> str:
    """Three digits of `value` with the decimal prefix that leaves some before the point: 1.23e-5 J is 12.3 µJ."""
    exponent = 0 if value == 0 else min(max(3 * (_exponent(value, 3) // 3), -15), 12)
    return f"{number(value / 10.0**exponent, 3)} {_PREFIXES[exponent]}{unit}".rstrip()


def mebibytes(value: float) -> str:
    """Bytes in MiB, from 1024 MiB on in GiB."""
    return f"{value / 2**30:.2f} GiB" if value >= 2**30 else f"{value / 2**20:,.0f} MiB"


def duration(seconds: float) -> str:
    """Seconds as a reader says them: 8.4 s, 7 min 10 s, 3 h 05 min."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    hours, minutes = whole // 3600, whole % 3600 // 60
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {whole % 60:02d} s"


def branches(keys: Iterable[str]) -> list[str]:
    """Dotted keys as code; several of one branch, such as distillation.curriculum, as that branch and a star."""
    found: dict[str, list[str]] = {}
    for key in keys:
        found.setdefault(".".join(key.split(".")[:2]), []).append(key)
    return [f"`{below[0]}`" if len(below) == 1 else f"`{branch}.*`" for branch, below in found.items()]


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table; columns of mostly numbers, but not the first, are set to the right. Empty ones are dropped."""
    kept = [i for i in range(len(header)) if any(row[i] for row in rows)]
    aligned = ["---:" if i and _are_numbers([row[i] for row in rows if row[i]]) else "---" for i in kept]
    lines = [[header[i] for i in kept], aligned]
    lines += [[row[i].replace("|", "\\|").replace("\n", " ") for i in kept] for row in rows]
    return ["| " + " | ".join(line) + " |" for line in lines]


def _are_numbers(cells: Sequence[str]) -> bool:
    return 2 * sum(re.match(r"[-+]?\.?\d", cell) is not None for cell in cells) > len(cells)


def fenced(text: str, language: str = "") -> list[str]:
    """Lines of a code block that no run of backticks in `text` can end."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return [fence + language, *text.rstrip("\n").split("\n"), fence]
