"""`extproc check`: every problem in one run, exit code 2, and never a traceback."""

import copy
import os
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from extproc.cli import main
from tests.unit.configs import discovery, raw_config, written
from tests.unit.simulator.model_folders import model_folder

GOOD = """\
models: [{id: m}]
discovery: {backend: static_urls, static_urls: {urls: ["http://127.0.0.1:9000"]}}
"""


def check(path: Path | str, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """The lines of an unsuccessful check."""
    assert main(["check", "--config", str(path)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err
    return captured.err.splitlines()


def keys(lines: list[str]) -> set[str]:
    return {line.partition(": ")[0] for line in lines}


def test_a_name_with_several_addresses_is_warned_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def getaddrinfo(host: str, port: int, *_: object, **__: object) -> list[Any]:
        count = 3 if host == "several" else 1
        kind = (socket.AF_INET, socket.SOCK_STREAM, 0, "")
        return [(*kind, (f"10.0.0.{number}", port)) for number in range(count)]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    urls = ("http://one:1", "http://several:1", "http://10.0.0.9:1")
    path = written(tmp_path, raw_config(discovery=discovery(*urls)))
    assert main(["check", "--config", path]) == 0
    captured = capsys.readouterr()
    assert captured.out.endswith(": good\n")
    (line,) = captured.err.splitlines()
    assert line.startswith("warning: discovery.static_urls.urls[1]: the name has 3 addresses; ")
    assert "discovery.backend: dns" in line


CLUSTER: dict[str, Any] = {"backend": "k8s", "k8s": {"namespace": "n", "label_selector": "a"}}


@pytest.mark.parametrize(
    ("envoy", "models", "warned"),
    [
        ({}, ["m"], True),
        ({"fail_open_host": "workers.n.svc:30000"}, ["m"], False),
        ({"fail_open": False}, ["m"], False),
        # Never fails open.
        ({}, ["m", "n"], False),
    ],
)
def test_an_envoy_that_would_know_no_worker_is_warned_of(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    envoy: dict[str, Any],
    models: list[str],
    warned: bool,
) -> None:
    raw = raw_config(
        models=[{"id": one} for one in models],
        discovery=CLUSTER,
        envoy={"endpoints": "ads", **envoy},
    )
    assert main(["check", "--config", written(tmp_path, raw)]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(": not set")[0] for line in lines] == (
        ["warning: envoy.fail_open_host"] if warned else []
    )


def test_rules_files_and_what_envoy_refuses_are_reported_together(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raw = raw_config(
        models=[{"id": "m", "policy": "nonsense", "tokenizer_path": str(tmp_path / "none")}],
        discovery=discovery("nonsense://x", "http://a:99999", "http://[fe80::1%eth0]:1"),
        server={"tls": {"cert_file": "/none.pem", "key_file": "/none.key"}, "port": 0},
        workers={"ca_file": str(tmp_path / "none")},
        envoy={"host": "a.name", "cluster": "extproc"},
    )
    assert keys(check(written(tmp_path, raw), capsys)) >= {
        "models[0].policy",
        "models[0].tokenizer_path",
        "discovery.static_urls.urls[0]",
        "discovery.static_urls.urls[1]",
        "discovery.static_urls.urls[2]",
        "server.port",
        "server.tls.cert_file",
        "server.tls.key_file",
        "envoy.extproc.ca_file",
        "workers.ca_file",
        "envoy.host",
        "envoy.cluster",
    }


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("1: a", "line 3: the key 1 is read as int, not as text: quote it"),
        ("true: a", "line 3: the key true is read as bool, not as text: quote it"),
        ("no: a", "line 3: the key no is read as bool, not as text: quote it"),
        ("~: a", "line 3: the key ~ is read as null, not as text: quote it"),
        ("1.5: a", "line 3: the key 1.5 is read as float, not as text: quote it"),
        ("2001-01-01: a", "line 3: the key 2001-01-01 is read as timestamp, not as text: quote it"),
        ("[1, 2]: a", "line 3: a key must be text, not a list or a mapping"),
        ("? {a: b}\n: c", "line 3: a key must be text, not a list or a mapping"),
        ("models: []", "line 3: the key 'models' is given twice"),
        (
            "server: {port: 22:30}",
            "line 3: 22:30 would be read as a number to the base 60: write a plain number, or "
            "quotes around a text",
        ),
        (
            "server: {port: 010}",
            "line 3: 010 would be read as a number to the base 8: write a plain number, or "
            "quotes around a text",
        ),
    ],
)
def test_what_yaml_would_read_otherwise_is_reported_with_its_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, problem: str
) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(GOOD + text + "\nenvoy: {port: 0}\n")
    lines = check(path, capsys)
    assert problem in lines
    # The rest is checked as well.
    assert "envoy.port" in keys(lines)


def test_quoted_text_and_plain_numbers_are_taken(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "c.yaml"
    more = 'server: {port: 9_100, host: "127.0.0.1", drain_secs: 1.5}\n"envoy": {port: 0x2000}\n'
    path.write_text(GOOD + more)
    assert main(["check", "--config", str(path)]) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", ["pipe", "folder", "device", "loop", "large", "binary"])
def test_a_configuration_that_is_not_a_regular_file_is_refused_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    path = tmp_path / "c.yaml"
    make(path, kind)
    (line,) = check(path, capsys)
    assert line.startswith(f"{path}: ")


@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", ["pipe", "folder", "device", "loop", "large", "binary"])
@pytest.mark.parametrize(
    "key", ["workers.api_key_file", "workers.ca_file", "server.admin_token_file", "tokenizer"]
)
def test_a_named_file_that_is_not_a_regular_file_is_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str, key: str
) -> None:
    path = tmp_path / "named"
    make(path, kind)
    raw = raw_config(models=[{"id": "m"}])
    if key == "tokenizer":
        key = "models[0].tokenizer_path"
        raw["models"][0]["tokenizer_path"] = str(path)
    else:
        section, name = key.split(".")
        raw[section] = {name: str(path)}
    assert keys(check(written(tmp_path, raw), capsys)) == {key}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", ["tokenizer_config.json", "chat_template.jinja"])
@pytest.mark.parametrize("kind", ["pipe", "folder", "device", "loop"])
def test_files_of_a_model_folder_that_are_not_regular_are_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str, name: str
) -> None:
    folder = Path(model_folder(tmp_path))
    (folder / name).unlink(missing_ok=True)
    make(folder / name, kind)
    raw = raw_config(models=[{"id": "m", "tokenizer_path": str(folder)}])
    problems = check(written(tmp_path, raw), capsys)
    assert keys(problems) == {"models[0].tokenizer_path"}
    assert name in problems[0]


def make(path: Path, kind: str) -> None:
    match kind:
        case "pipe":
            os.mkfifo(path)
        case "folder":
            path.mkdir()
        case "device":
            path.symlink_to("/dev/zero")
        case "loop":
            path.symlink_to(path)
        case "large":
            with path.open("wb") as file:
                file.truncate(1 << 30)  # takes no room
        case "binary":
            path.write_bytes(bytes(range(256)) * 4)


# -- mutated configurations

WHOLE: dict[str, Any] = {
    "models": [
        {"id": "m", "policy": "power_of_two", "circuit_breaker": {"threshold": 3}},
        {"id": "n", "policy": "min_ttft", "tokenizer_path": "/none", "kv_events": []},
    ],
    "discovery": discovery("http://127.0.0.1:9000", "https://a.example:1"),
    "server": {"port": 9102, "tls": {"cert_file": "/none", "key_file": "/none"}},
    "envoy": {"port": 9103, "extproc": {"ca_file": "/none"}},
    "workers": {"api_key": "k"},
    "pd": {"decode": "inline"},
    "proxy": {"request_timeout_secs": 5},
}
VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(["", "http://", "a:1", "://", "http://[::1", "\0", "22:30", "/dev/zero"]),
    st.lists(st.integers(), max_size=2),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)


def places(raw: Any) -> Iterator[tuple[Any, Any]]:
    """Every container of a configuration with each of its keys or indices."""
    if isinstance(raw, dict | list):
        for key, value in raw.items() if isinstance(raw, dict) else enumerate(raw):
            yield raw, key
            yield from places(value)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_mutated_configuration_ends_with_0_or_2(data: st.DataObject) -> None:
    raw = copy.deepcopy(WHOLE)
    for _ in range(data.draw(st.integers(1, 4))):
        container, key = data.draw(st.sampled_from(list(places(raw))))
        match data.draw(st.sampled_from(["replace", "remove", "add"])):
            case "replace":
                container[key] = data.draw(VALUES)
            case "remove" if len(raw) > 1:
                del container[key]
            case _ if isinstance(container, dict):
                container[data.draw(st.text(max_size=6))] = data.draw(VALUES)
    with tempfile.TemporaryDirectory() as folder:
        assert main(["check", "--config", written(Path(folder), raw)]) in (0, 2)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_mutated_file_ends_with_0_or_2(data: st.DataObject) -> None:
    text = yaml.safe_dump(WHOLE)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(text)))
        cut = data.draw(st.integers(0, 5))
        text = text[:at] + data.draw(st.text(max_size=5)) + text[at + cut :]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "c.yaml"
        path.write_bytes(text.encode(errors="surrogatepass"))
        assert main(["check", "--config", str(path)]) in (0, 2)
