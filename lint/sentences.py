"""Finds sentences that a reader of English as a second language has to read twice.

    python -m lint.sentences [FILE ...]

Some turns have made this project's sentences hard to read: "can not" in two words, "who" for a
machine, "told to" for reporting, "none" and "nobody" as nouns. The check reads comments,
docstrings, other strings with more than one word, test names, and whole pages of Markdown. Text in
backticks is code and is not read. Sentences about people are listed in about_people.txt.

It is a pattern and not a parser, so it finds known faults only. It is separate from ruff because
ruff has no way to add rules of your own.
"""

import io
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final, NamedTuple

__all__ = ["Hit", "Passage", "faults", "main", "passages"]

ROOT: Final = Path(__file__).resolve().parents[1]
ALLOWED: Final = ROOT / "lint" / "about_people.txt"

# What is read, as paths for `git ls-files`.
READ: Final = (
    *("*.py", "*.md", "*.toml", "*.proto", "*.yaml", "*.yml", "*.sh"),
    *("Makefile", "Dockerfile", ".dockerignore", ".gitignore", ".ci/*"),
)
# Generated code, and the checker itself, which has to name what it finds.
NOT_READ: Final = re.compile(r"extproc/_protos/|lint/|tests/fixtures/|tests/unit/lint/")

# Each pattern with what to write instead.
FAULTS: Final = tuple(
    (re.compile(pattern), advice)
    for pattern, advice in (
        (r"\b[Cc]an\s+not\b", "write cannot"),
        (r"\b(?:[Ww]ho|[Ww]hom|[Ww]hoever|[Ww]homever)\b", "name what acts: the worker that"),
        (r"\b[Tt]old\b", "write what is sent, reported, logged or answered"),
        (r"(?<![=:]\s)\bnone\b", "write no, with the noun"),
        (r"\bNone\s+of\s+(?:the|these|those|them|its|our)\b", "write no, with the noun"),
        (r"\b(?:[Nn]o|[Ss]ome|[Aa]ny|[Ee]very)body\b", "name what acts: no client, a worker"),
        (r"\b(?:[Nn]o\s+one|[Ss]omeone|[Aa]nyone|[Ee]veryone)\b", "name what acts"),
        (r"\b(?:[Ll]est|[Ww]hence|[Tt]hence|[Tt]hereof|[Ww]herein|[Tt]hither)\b", "old-fashioned"),
    )
)

# Code within sentences: `names`, ``names`` and what is between the braces of templates.
_CODE: Final = re.compile(r"``[^`]+``|`[^`\n]*(?:\n[^`\n]*)?`|\{\{.*?\}\}|\{%.*?%\}", re.S)
# By the names of tokens: Python 3.11 has no tokens for the parts of f-strings.
_KINDS: Final = {
    "COMMENT": "comment",
    "STRING": "string",
    "FSTRING_MIDDLE": "string",
    **dict.fromkeys(("NL", "FSTRING_START", "FSTRING_END"), "between"),
}


class Passage(NamedTuple):
    """Text that belongs together, and the line of its first word."""

    line: int
    text: str


class Hit(NamedTuple):
    """A fault: its place, the words around it and what to write instead."""

    path: str
    line: int
    words: str
    advice: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.words!r}: {self.advice}"


def passages(name: str, text: str) -> Iterator[Passage]:
    """What of a file is read, by the kind of file that its name says."""
    if name.endswith(".py"):
        yield from _python(text)
    elif name.endswith(".md"):
        yield Passage(1, text)
    else:
        mark = "//" if name.endswith(".proto") else "#"
        yield from _comments(text, mark)


def _python(text: str) -> Iterator[Passage]:
    """Comments, strings of more than one word, and names of tests.

    Comments on lines that follow each other are one passage, and so are strings.
    """
    start, last, parts = 0, "", list[str]()
    before = ""
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        kind = _KINDS.get(tokenize.tok_name[token.type], "code")
        if parts and kind not in (last, "between"):
            yield Passage(start, "".join(parts))
            parts = []
        if kind in ("comment", "string"):
            start = start if parts else token.start[0]
            last = kind
            # Words keep their line, so that a hit in the middle of a passage is found.
            missing = token.start[0] - start - "".join(parts).count("\n")
            parts.append("\n" * missing + _content(token))
        if token.type == tokenize.NAME:
            if before in ("def", "class") and token.string.lower().startswith("test"):
                yield Passage(token.start[0], token.string.replace("_", " "))
            before = token.string


def _content(token: tokenize.TokenInfo) -> str:
    if token.type == tokenize.COMMENT:
        return token.string.lstrip("#")
    quote = re.match(r"[A-Za-z]*(\"\"\"|\'\'\'|\"|\')", token.string)
    content = token.string[quote.end() : -len(quote[1])] if quote else token.string
    return content if re.search(r"\w\s+\w", content) else "\n" * content.count("\n")


def _comments(text: str, mark: str) -> Iterator[Passage]:
    start, lines = 0, list[str]()
    for number, line in enumerate([*text.splitlines(), ""], 1):
        comment = re.search(rf"(?:^|\s){mark}(.*)", line)
        if comment:
            start = start if lines else number
            lines.append(comment[1])
        elif lines:
            yield Passage(start, "\n".join(lines))
            lines = []


def faults(path: str, text: str, allowed: Iterable[str]) -> Iterator[Hit]:
    """The faults of a file, apart from those within an allowed sentence."""
    for passage in passages(path, text):
        # As long as before, so that places stay the same.
        prose = _CODE.sub(lambda code: re.sub(r"[^\n]", "`", code[0]), passage.text)
        exempt = [span for sentence in allowed for span in _spans(sentence, passage.text)]
        for pattern, advice in FAULTS:
            for match in pattern.finditer(prose):
                if any(start <= match.start() < end for start, end in exempt):
                    continue
                line = passage.line + prose.count("\n", 0, match.start())
                around = passage.text[max(0, match.start() - 30) : match.end() + 30]
                yield Hit(path, line, " ".join(around.split()), advice)


def _spans(sentence: str, text: str) -> Iterator[tuple[int, int]]:
    words = r"\s+".join(re.escape(word) for word in sentence.split())
    return (match.span() for match in re.finditer(words, text))


def main(arguments: list[str]) -> int:
    """Check the files, or all that git tracks; 1 if there are hits."""
    allowed = [
        line for line in ALLOWED.read_text().splitlines() if line and not line.startswith("#")
    ]
    unused = set(allowed)
    hits: list[Hit] = []
    for path in arguments or _tracked():
        text = (ROOT / path).read_text(encoding="utf-8")
        hits += sorted(faults(path, text, allowed))
        unused -= {sentence for sentence in unused if any(_spans(sentence, text))}
    lines = [str(hit) for hit in hits]
    if not arguments:
        lines += [f"lint/about_people.txt: occurs nowhere: {line}" for line in sorted(unused)]
    if lines:
        sys.stdout.write("\n".join([*lines, f"{len(lines)} sentences to mend"]) + "\n")
    return 1 if lines else 0


def _tracked() -> Iterator[str]:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "--", *READ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    for path in listed.splitlines():
        if not NOT_READ.match(path) and (ROOT / path).exists():
            yield path


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
