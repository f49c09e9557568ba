"""Numbers as a person reads them. A missing number is a dash, never a zero."""

from __future__ import annotations

import datetime

MISSING = "–"
MINUS = "\N{MINUS SIGN}"


def format_percent(value: float | None, decimals: int = 1) -> str:
    """A fraction as per cent: .8412 → `84.1%`. Only all of them are `100.0%`."""
    if value is None:
        return MISSING
    text = f"{100 * value:.{decimals}f}%"
    rounded_up = value < 1 and text == f"{100:.{decimals}f}%"
    return f">{100 - 10**-decimals:.{decimals}f}%" if rounded_up else text


def capitalized(text: str) -> str:
    """With a capital first letter; the others stay (R², samples F1)."""
    return text[:1].upper() + text[1:]


def format_points(value: float | None) -> str:
    """A difference of two fractions in percentage points, with its sign: -.003 → `−0.3 pt`."""
    return MISSING if value is None else f"{signed(100 * value)} pt"


def format_interval(interval: tuple[float, float] | None) -> str:
    """An interval of differences in percentage points."""
    return MISSING if interval is None else f"{signed(100 * interval[0])} … {signed(100 * interval[1])} pt"


def signed(value: float) -> str:
    """One decimal and a sign; zero has none."""
    text = f"{value:+.1f}"
    return "0.0" if float(text) == 0 else text.replace("-", MINUS)


def format_number(value: float | None, digits: int = 3) -> str:
    """`digits` significant digits; very small and very large numbers in scientific notation."""
    if value is None:
        return MISSING
    if value == 0:
        return "0"
    if not 1e-3 <= abs(value) < 1e7:
        mantissa, _, exponent = f"{value:.{digits - 1}e}".partition("e")
        mantissa = mantissa.rstrip("0").rstrip(".") if "." in mantissa else mantissa
        return f"{mantissa}e{int(exponent)}".replace("-", MINUS)
    if abs(value) >= 10 ** (digits - 1):
        return f"{value:,.0f}".replace("-", MINUS)
    text = f"{value:.{digits}g}"
    return text.replace("-", MINUS)


def format_ms(value: float | None) -> str:
    """Milliseconds."""
    return MISSING if value is None else f"{format_number(value)} ms"


def format_ratio(value: float | None) -> str:
    """A factor: 3.08 → `3.1×`."""
    return MISSING if value is None else f"{value:.{1 if value >= 1.05 or value < 0.1 else 2}f}×"


def format_bytes(value: float | None) -> str:
    """Bytes in decimal units: 13 600 000 → `13.6 MB`."""
    if value is None:
        return MISSING
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= size:
            return f"{value / size:.{2 if value < 10 * size and unit == 'GB' else 1}f} {unit}"
    return f"{value:.0f} B"


def format_time(value: object) -> str:
    """An ISO time as a person writes it: `2026-11-24 02:44 UTC`. Anything else stays as it is."""
    try:
        moment = datetime.datetime.fromisoformat(str(value))
    except ValueError:
        return str(value)
    return f"{moment:%Y-%m-%d %H:%M} {moment.tzname() or ''}".strip()


def format_duration(seconds: float | None) -> str:
    """Seconds as `0.8 s`, `42 s` or `3 min 12 s`."""
    if seconds is None:
        return MISSING
    if 0 < seconds < 10 and seconds != int(seconds):
        return f"{seconds:.1f} s"
    if round(seconds) < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s" if rest else f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60:02d} min"
