"""Sample texts that show at start-up whether a tokenizer's texts can be cut into pieces.

They hold what tokenizers are known to join into one token: blanks of all kinds, line breaks,
digits, code, apostrophes, letters of many scripts, combining marks, and added tokens next to any
of these and to each other. Separate because they are data.
"""

from typing import Final

__all__ = ["sample_texts"]

_TEXTS: Final = (
    "Hello, world! It's the 3rd of 12345 tests; we'll see what they'd say.",
    "one two  three   four\tfive\n six\n\nseven\r\neight \n \n nine\u00a0ten\u3000eleven",
    "trailing blanks   ",
    "   leading blanks",
    "\n\nlines\n\n\n   indented\n\ttabbed\n",
    "def f(x: int) -> str:\n    return f'{x!r:>10}'  # done\n\n\nclass A:\n    pass\n",
    '{"name": "get_weather", "arguments": {"city": "Zürich", "days": [1, 2, 3]}}',
    "DON'T shout'S I'LL can't x'y 'quoted' “curly’s”",
    "3.14159 1,000,000 0x1F 2024-11-24T10:00:00Z 1e-9",
    "naïve café — “quotes” … ½ ﬁ ﬀ Å A\u030a e\u0301e n\u0303",
    "\u0301 begins with a mark, a \u0301 alone, a\n\u0301b",
    "Привет мир. Γειά σου Κόσμε. שלום עולם. مرحبا بالعالم. नमस्ते दुनिया।",
    "你好，世界。这是一个测试。こんにちは世界。안녕하세요 세계.",
    "👩‍👩‍👧‍👦 🇨🇭 👍🏽 ✅ \ufe0f zero\u200bwidth \u2028 separators \u2029 \x00 \x7f",
    "https://example.org/path?query=a+b&c=%20#fragment mail@example.org",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa bbbbbbbbbbbbbbbbbbbbbbbb",
    "SHOUTING WORDS mixedCase CamelCaseWords snake_case_words kebab-case-words",
    "▁under ▁▁ bars _ ## ##word Ġ Ċ <0x0A> < | > [ ] </ <|",
    "a\nb \nc\n d\n\ne \n\n f\r\ng\x0bh\x0ci",
)


def sample_texts(tokens: list[str]) -> list[str]:
    """The sample texts, and each of `tokens` before, after and between other texts."""
    texts = [*_TEXTS, "".join(_TEXTS), " ".join(_TEXTS), "\n".join(_TEXTS)]
    for n, token in enumerate(tokens):
        after = tokens[(n + 1) % len(tokens)]
        text = _TEXTS[n % len(_TEXTS)]
        following = _TEXTS[(n + 1) % len(_TEXTS)]
        texts += (
            token,
            f"{token}{after}",
            f"{token}{token}{after}",
            f" {token} ",
            f"a{token}b {token} c\n{token}\nd  {after}  e",
            f"{token[:-1]}{token}{token[1:]}",
            f"{text}{token}{following}",
            f"{token}user\n{text}{after}\n{token}assistant\n{following} {after} ",
        )
    return texts
