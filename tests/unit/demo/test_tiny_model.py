"""The demo's model folder, as engines and routers read one."""

from pathlib import Path

from tokenizers import Tokenizer
from transformers import AutoTokenizer

from extproc.demo.tiny_model import write_model_folder
from extproc.demo.workload import WORDS, conversations


def test_words_are_tokens(tmp_path: Path) -> None:
    folder = write_model_folder(tmp_path / "model")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    text = " " + " ".join(WORDS)
    assert len(tokenizer.encode(text).ids) == len(WORDS)
    system = conversations(1, 1)[0].system
    assert len(tokenizer.encode(system).ids) <= len(system.split()) + 3


def test_any_text_comes_back(tmp_path: Path) -> None:
    folder = write_model_folder(tmp_path / "model")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    text = "Grüße, \n\t 東京 <|begin|>"
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_a_chat_is_rendered_with_marks_of_one_token(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(write_model_folder(tmp_path / "model"))
    messages = [{"role": "system", "content": "sea"}, {"role": "user", "content": "hi"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "<|begin|>system\nsea<|end|>\n<|begin|>user\nhi<|end|>\n<|begin|>assistant\n"
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert ids.count(tokenizer.convert_tokens_to_ids("<|begin|>")) == 3


def test_it_is_the_same_every_time(tmp_path: Path) -> None:
    first, second = (write_model_folder(tmp_path / name) for name in ("first", "second"))
    for file in first.iterdir():
        assert file.read_bytes() == (second / file.name).read_bytes()
