"""The check of sentences finds each fault where prose can be, and leaves code and people alone."""

from pathlib import Path

import pytest

from lint import sentences
from lint.sentences import FAULTS, faults, main


def found(text: str, name: str = "page.md", allowed: tuple[str, ...] = ()) -> list[tuple[int, str]]:
    return [(hit.line, hit.words) for hit in sorted(faults(name, text, allowed))]


@pytest.mark.parametrize(
    "sentence",
    [
        "A worker can not be reached.",
        "Can not be reached.",
        "A line that ends in can\nnot be read.",
        "The worker who has most pages.",
        "Whoever was silent is to blame.",
        "Workers are asked whom they serve.",
        "A failed prefill is told to the client.",
        "The failure is told once.",
        "Messages that are none.",
        "None of the workers answers.",
        "Nobody listens at this port.",
        "Somebody else has the page.",
        "A page that no one holds.",
        "The worker waits lest it fail.",
    ],
)
def test_each_fault_is_found(sentence: str) -> None:
    assert len(found(sentence)) == 1


def test_there_is_a_sentence_for_each_fault() -> None:
    texts = ["can not", "who", "told", "is none", "None of the", "nobody", "no one", "lest"]
    assert len(texts) == len(FAULTS)
    for text, (pattern, _) in zip(texts, FAULTS, strict=True):
        assert pattern.search(text)


@pytest.mark.parametrize(
    "sentence",
    [
        "A worker cannot be reached.",
        "A worker whose breaker is open.",
        "No worker answers.",
        "Returns None if no worker answers.",
        "The default is `none`.",
        "The default is ``none``.",
        "The template has {% if tools is none %} in it.",
        "Pages to keep; 0 = none.",
        "decode workers picked: none",
    ],
)
def test_plain_sentences_and_code_are_left_alone(sentence: str) -> None:
    assert found(sentence) == []


def test_prose_of_python_is_found_on_its_line() -> None:
    code = '''"""A module that can not be read.

Whoever reads this.
"""

x = 1  # nobody reads this
# a comment that ends in can
# not be read


def test_a_page_nobody_holds() -> None:
    raise ValueError(
        "the file can "
        f"not be {x}"
    )
'''
    assert [line for line, _ in found(code, "module.py")] == [1, 3, 6, 7, 11, 13]


def test_code_of_python_is_left_alone() -> None:
    code = """who = "none"
told = {"nobody": none}


def nobody(who): return who.none
"""
    assert found(code, "module.py") == []


@pytest.mark.parametrize(
    ("name", "mark"),
    [("Makefile", "#"), ("pyproject.toml", "#"), ("envoy.yaml", "#"), ("a.proto", "//")],
)
def test_comments_of_other_files_are_read_and_their_values_are_not(name: str, mark: str) -> None:
    text = f"mode: none\n{mark} A file that can\n{mark} not be read.\nwho = 1 {mark} Nobody is.\n"
    assert [line for line, _ in found(text, name)] == [2, 4]


def test_sentences_about_people_are_allowed() -> None:
    text = "Users who\nwrite a policy start here. The worker who fails is left out."
    assert len(found(text)) == 2
    assert [words for _, words in found(text, allowed=("Users who write a policy",))] == [
        "policy start here. The worker who fails is left out."
    ]


def test_hits_and_allowed_sentences_that_occur_nowhere_are_errors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    good, bad, allowed = tmp_path / "good.md", tmp_path / "bad.md", tmp_path / "allowed.txt"
    good.write_text("Users who write a policy start here.\n")
    bad.write_text("Fine.\n\nNobody reads this.\n")
    allowed.write_text("# People.\nUsers who write\n")
    monkeypatch.setattr(sentences, "ALLOWED", allowed)
    assert main([str(good)]) == 0
    assert capsys.readouterr().out == ""
    assert main([str(good), str(bad)]) == 1
    assert f"{bad}:3: 'Fine. Nobody reads this.'" in capsys.readouterr().out

    monkeypatch.setattr(sentences, "_tracked", lambda: [str(bad)])
    bad.write_text("Fine.\n")
    assert main([]) == 1
    assert "occurs nowhere: Users who write\n" in capsys.readouterr().out
