"""Counts what one rendering of a chat template has used: steps, time, and large values.

A rendering runs in one thread from its beginning to its end, so its budget is a variable of that
thread. Operations on short values cost nothing here; those on large values pay with steps.

Separate from `template_limits`, which decides where a template has to count.
"""

import time
from collections.abc import Iterator, Mapping
from itertools import islice
from threading import local
from typing import Any, Final

from extproc.errors import ServiceError

__all__ = [
    "LARGE_CHARS",
    "SECONDS_MAX",
    "STEPS_MAX",
    "VALUE_MAX_LENGTH",
    "Counted",
    "TemplateLimitError",
    "charge",
    "check_content",
    "check_elements",
    "check_length",
    "content_chars",
    "count_steps",
    "counted",
    "end_rendering",
    "paid_by_length",
    "start_rendering",
]

STEPS_MAX: Final = 250_000
# The thread's own time: waiting for the interpreter does not count.
SECONDS_MAX: Final = 0.25
# A loop counts its steps and looks at the time once for so many, and less often while the steps
# are quick.
_STEPS_AT_ONCE: Final = 8
_QUICK_STEPS_AT_ONCE: Final = 64
_QUICK_STEPS_SECONDS: Final = 0.001
# The longest text, which is also the longest rendering; of a list and all lists in it together,
# the elements and the characters.
VALUE_MAX_LENGTH: Final = 1 << 22
_ELEMENTS_MAX: Final = 1 << 17
_DEPTH_MAX: Final = 200
# An operation on a longer text costs one step for so many characters.
LARGE_CHARS: Final = 1 << 14
_CHARS_PER_STEP_BITS: Final = 8
_VIEWS: Final[tuple[type, ...]] = (type({}.keys()), type({}.values()), type({}.items()))
_SCALARS: Final = frozenset({bool, float, int, type(None)})
_ONLY_TEXTS: Final = frozenset({str})
_CONTAINERS: Final[Any] = (list, tuple, set, frozenset, range, *_VIEWS)


class TemplateLimitError(ServiceError):
    """A template takes too many steps or too much time, or makes too long a value."""


class _Budget:
    """The steps and the time that are left for one rendering."""

    __slots__ = ("_counted_at", "_left", "_look_again_at", "_thread_time_max")

    def __init__(self, steps: int, seconds: float) -> None:
        self._left = steps
        self._counted_at = time.monotonic()
        self._look_again_at = self._counted_at + seconds
        self._thread_time_max = time.thread_time() + seconds

    def count(self, steps: int) -> bool:
        """True if the last steps were quick; raises TemplateLimitError when the steps or the time
        are used up.
        """
        self._left -= steps
        if self._left < 0:
            raise TemplateLimitError
        now = time.monotonic()
        if now > self._look_again_at:
            seconds_left = self._thread_time_max - time.thread_time()
            if seconds_left < 0:
                raise TemplateLimitError
            self._look_again_at = now + seconds_left
        counted_at, self._counted_at = self._counted_at, now
        return now - counted_at < _QUICK_STEPS_SECONDS


class _Running(local):
    budget: _Budget | None = None


_running: Final = _Running()


def start_rendering(steps: int, seconds: float) -> None:
    """Begin to count the steps of this thread; its own time is limited to `seconds`."""
    _running.budget = _Budget(steps, seconds)


def end_rendering() -> None:
    _running.budget = None


def count_steps(steps: int) -> bool:
    """True if the last steps were quick; raises TemplateLimitError.

    Outside a rendering, when a template is compiled, nothing may be counted: this raises as well.
    """
    budget = _running.budget
    if budget is None:
        raise TemplateLimitError
    return budget.count(steps)


def charge(chars: int) -> None:
    """Pay for an operation that reads or makes a text of `chars`."""
    if chars > VALUE_MAX_LENGTH:
        raise TemplateLimitError
    if chars > LARGE_CHARS:
        count_steps(chars >> _CHARS_PER_STEP_BITS)


def check_length(length: int) -> None:
    if length > VALUE_MAX_LENGTH:
        raise TemplateLimitError


# -- iteration


def counted(values: Any) -> Any:
    """`values`, whose iteration counts steps."""
    if type(values) is list and len(values) <= _STEPS_AT_ONCE:
        count_steps(len(values))
        return values
    return Counted(values)


class Counted:
    """Values whose iteration counts steps."""

    __slots__ = ("_values",)

    def __init__(self, values: Any) -> None:
        self._values = values

    def __len__(self) -> int:
        return len(self._values)

    def __iter__(self) -> Iterator[Any]:
        values = iter(self._values)
        at_once = _STEPS_AT_ONCE
        while some := [*islice(values, at_once)]:
            at_once = _QUICK_STEPS_AT_ONCE if count_steps(len(some)) else _STEPS_AT_ONCE
            yield from some


# -- values that hold others


def check_content(value: Any) -> None:
    """Pay for everything in a value: its elements, theirs, and their characters.

    A list that holds another one twice, over many levels, is small in memory. But its text is as
    long, and a comparison takes as long, as if each was a list of its own.
    """
    content_chars(value)


def content_chars(value: Any) -> int:
    """The characters of all texts in a value together, which are paid for.

    Raises TemplateLimitError also for values with too many elements or levels.
    """
    if isinstance(value, str):
        return len(value)
    if value is None or isinstance(value, int | float):
        return 0
    chars = elements = 0
    level: list[Any] = [value]
    for _ in range(_DEPTH_MAX):
        inner: list[Any] = []
        for one in level:
            kind = type(one)
            if kind is str:
                chars += len(one)
            elif kind in _SCALARS:
                continue
            elif kind is dict or isinstance(one, Mapping):
                elements += 2 * len(one)
                check_elements(elements)
                inner += one.values()
                if _ONLY_TEXTS.issuperset(map(type, one)):
                    chars += sum(map(len, one))
                else:
                    inner += one.keys()
            elif isinstance(one, str):
                chars += len(one)
            elif isinstance(one, _CONTAINERS):
                elements += len(one)
                check_elements(elements)
                inner += one
        if _SCALARS.issuperset(map(type, inner)):
            break
        level = inner
    else:
        raise TemplateLimitError
    check_length(chars)
    if elements or chars > LARGE_CHARS:
        count_steps(elements + (chars >> _CHARS_PER_STEP_BITS))
    return chars


def check_elements(elements: int) -> None:
    if elements > _ELEMENTS_MAX:
        raise TemplateLimitError


def paid_by_length(values: Any) -> Any:
    """`values`, whose length is paid for. That of an iterator was paid for when it was made."""
    if hasattr(values, "__len__"):
        count_steps(len(values))
    return values
