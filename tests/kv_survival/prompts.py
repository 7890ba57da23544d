"""The prompts that engine and test share, so that they exchange only numbers of pages."""

from typing import Final

__all__ = ["GROUPS", "PAGE", "PROMPTS", "PROMPT_PAGES", "SHARED_PAGES", "page_tokens"]

PAGE: Final = 16
PROMPTS: Final = 24
GROUPS: Final = 4
# Prompts of one group begin with the same pages.
SHARED_PAGES: Final = 6
PROMPT_PAGES: Final = 30


def page_tokens(prompt: int, number: int) -> list[int]:
    owner = prompt % GROUPS if number < SHARED_PAGES else GROUPS + prompt
    first = (owner * PROMPT_PAGES + number) * PAGE
    return list(range(first, first + PAGE))
