"""Numbers with an exact meaning: eps as it was published, how far a run has come, and values that change on the way.

Imports no torch, so that settings can be read and refused before anything heavy is loaded.
"""

from __future__ import annotations

import math
import re
from fractions import Fraction
from itertools import pairwise
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import AfterValidator, BeforeValidator, Field

# How far outside the ball float32 may put an honest example: two units in the last place at 1.0.
TOLERANCE = 2.0**-22


def number(text: object) -> float:
    """`0.031`, `"8/255"` or `4` as a float; refuses what is not a finite number.

    >>> number("8/255")
    0.03137254901960784
    """
    if isinstance(text, bool) or not isinstance(text, (int, float, str)):
        raise ValueError(f"{text!r} is not a number: write 0.031 or 8/255")
    try:
        value = float(_fraction(text)) if isinstance(text, str) and "/" in text else float(text)
    except ZeroDivisionError:
        raise ValueError(f"{text!r} divides by zero: write 0.031 or 8/255") from None
    except (ValueError, OverflowError):
        raise ValueError(f"{text!r} is not a number: write 0.031 or 8/255") from None
    if not math.isfinite(value):
        raise ValueError(f"{text!r} is not finite")
    return value


def _fraction(text: object) -> Fraction:
    """Exact; a power of ten that would take minutes to write out is no number anybody means."""
    if re.search(r"e[+-]?\d{4,}", str(text), re.IGNORECASE):
        raise ValueError(f"{text!r} is not a number")
    return Fraction(str(text))


def published(text: object) -> str:
    """eps as people write it, `"8/255"` or `"0.031"`, checked to lie in [0, 1] and kept to the letter."""
    if not 0 <= number(text) <= 1:
        raise ValueError(f"{text!r} lies outside [0, 1]: eps is a distance in pixel units, such as 0.031 or 8/255")
    _fraction(text)
    return str(text).strip()


# eps in pixel units of [0, 1], exact and as published: number(eps) is the float that the attack uses.
Eps = Annotated[str, BeforeValidator(published)]
Number = Annotated[float, BeforeValidator(number)]
Positive = Annotated[float, BeforeValidator(number), Field(gt=0)]
NonNegative = Annotated[float, BeforeValidator(number), Field(ge=0)]
Count = Annotated[int, Field(ge=0)]

# Decimals that papers print for a fraction of 255; the class is what a table groups by, the record keeps both.
# 0.031 and 0.062: FAT.py:18 and its README; 0.031: TRADES, MART, DAT.
_ROUNDED = {"0.031": "8/255", "0.062": "16/255", "0.0157": "4/255", "0.0314": "8/255", "0.0627": "16/255"}


def eps_class(eps: str) -> str:
    """The class of budgets that one table compares: `8/255` holds 0.031, which is marked there.

    >>> eps_class("0.031"), eps_class(".0310"), eps_class("16/510"), eps_class("0.3")
    ('8/255', '8/255', '8/255', '0.3')
    """
    value = Fraction(eps)
    if 255 % value.denominator == 0 and 1000 % value.denominator:  # 51/255 is 0.2, and 8/255 no short decimal
        return f"{value * 255}/255"
    for decimal, fraction in _ROUNDED.items():
        if value == Fraction(decimal):
            return fraction
    return f"{float(value):g}"


# What attacks are made in; what they find counts in float32 alone.
Precision = Literal["float32", "bf16"]


class Progress(NamedTuple):
    """How far a run has come, exactly: `done` epochs of `total`. Every schedule is a function of this alone."""

    done: int
    total: int

    @property
    def fraction(self) -> Fraction:
        return Fraction(self.done, self.total)


def moment(text: object) -> str:
    """A point of the run as a fraction of its epochs, kept to the letter: `"59/120"` begins epoch 60 of 120."""
    try:
        value = _fraction(text)
    except (ValueError, ZeroDivisionError):
        raise ValueError(f"{text!r} is not a fraction of the run: write '59/120'") from None
    if not 0 <= value <= 1:
        raise ValueError(f"{text!r} lies outside the run: a fraction between 0 and 1, such as '59/120'")
    return str(text)


Moment = Annotated[str, BeforeValidator(moment)]


def ascending(steps: tuple[tuple[str, Any], ...]) -> tuple[tuple[str, Any], ...]:
    when = [Fraction(at) for at, _ in steps]
    if not when or when[0] != 0 or any(a >= b for a, b in pairwise(when)):
        raise ValueError("a schedule starts at '0' and its fractions rise, such as [['0', 0], ['50/120', 1]]")
    return steps


# A value, or a piecewise constant one: (("0", 0), ("50/120", 1)) is 0 in epochs 1-50 of 120 and 1 from epoch 51 on.
CountSchedule = Count | Annotated[tuple[tuple[Moment, Count], ...], AfterValidator(ascending)]
EpsSchedule = Annotated[tuple[tuple[Moment, Eps], ...], AfterValidator(ascending)]


def value_at(schedule: Any, progress: Progress) -> Any:
    """What a schedule says at `progress`; a plain value says the same throughout.

    >>> [value_at((("0", 0), ("50/120", 1)), Progress(done, 120)) for done in (0, 49, 50, 119)]
    [0, 0, 1, 1]
    """
    if not isinstance(schedule, (tuple, list)):
        return schedule
    return [value for at, value in schedule if Fraction(at) <= progress.fraction][-1]


def step_text(text: object) -> str:
    """A step size as a protocol says it: `"eps/4"`, `"eps"`, `"2/255"` or `0.003`."""
    said = str(text).strip()
    if said != "eps" and (size := number(said.removeprefix("eps/"))) <= 0 and (size < 0 or "/" in said):
        raise ValueError(f"{text!r} is no step forward: write eps/4, 2/255 or 0.003")
    return said


StepSize = Annotated[str, BeforeValidator(step_text)]


def step_or_share(text: object) -> float | str:
    """A training attack's step: a number, or the share of the present eps, `"eps/10"`, kept as text."""
    said = str(text).strip()
    if said == "eps" or said.startswith("eps/"):
        return step_text(said)
    if (size := number(text)) < 0:
        raise ValueError(f"{text!r} is no step forward: write eps/4, 2/255 or 0.007")
    return size


Step = Annotated[float | str, BeforeValidator(step_or_share)]


def step_of(text: float | str, eps: float) -> float:
    """A step size in pixel units.

    >>> step_of("eps/4", 0.3), step_of("2/255", 0.3), step_of(0.007, 0.3)
    (0.075, 0.00784313725490196, 0.007)
    """
    if not isinstance(text, str):
        return text
    if text == "eps":
        return eps
    return eps / number(text.removeprefix("eps/")) if text.startswith("eps/") else number(text)
