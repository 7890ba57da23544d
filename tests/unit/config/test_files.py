"""Configuration files: both formats, broken files, and the files that a configuration names."""

import json
from pathlib import Path
from typing import Any

import pytest
import trustme

from extproc.config.files import file_problems
from extproc.config.loading import load_config, parse_config
from extproc.errors import ConfigError
from tests.unit.configs import URL, at, raw_config

YAML = f"""\
server: {{port: 9100}}
models:
  - id: m
    policy: least_load
    circuit_breaker: {{threshold: 5}}
discovery:
  backend: static_urls
  static_urls:
    urls: ["{URL}"]
"""
TOML = f"""\
[server]
port = 9100
[[models]]
id = "m"
policy = "least_load"
circuit_breaker = {{threshold = 5}}
[discovery]
backend = "static_urls"
[discovery.static_urls]
urls = ["{URL}"]
"""


def written(folder: Path, text: str | bytes, name: str = "c.yaml") -> Path:
    path = folder / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def refused(path: Path) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert caught.value.problems
    return caught.value.problems


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("c.yaml", YAML),
        ("c.yml", YAML),
        ("C.YAML", YAML),
        ("c.yaml", "\ufeff" + YAML),
        ("c.yaml", YAML.replace("\n", "\r\n")),
        ("c.toml", TOML),
    ],
)
def test_yaml_and_toml_give_the_same_configuration(tmp_path: Path, name: str, text: str) -> None:
    expected = raw_config(
        server={"port": 9100},
        models=[{"id": "m", "policy": "least_load", "circuit_breaker": {"threshold": 5}}],
    )
    assert load_config(written(tmp_path, text, name)) == parse_config(expected)


@pytest.mark.parametrize("name", ["c.json", "c", "c.yaml.bak", ".yaml"])
def test_another_extension_is_refused(tmp_path: Path, name: str) -> None:
    (problem,) = refused(written(tmp_path, json.dumps(raw_config()), name))
    assert ".yaml" in problem
    assert ".toml" in problem


def test_an_unreadable_file_is_named_in_the_error(tmp_path: Path) -> None:
    assert str(tmp_path / "none.yaml") in refused(tmp_path / "none.yaml")[0]
    folder = tmp_path / "folder.yaml"
    folder.mkdir()
    assert str(folder) in refused(folder)[0]


@pytest.mark.parametrize("name", ["c.yaml", "c.toml"])
def test_a_file_that_is_not_utf8_is_refused(tmp_path: Path, name: str) -> None:
    assert "UTF-8" in refused(written(tmp_path, b"models: \xff", name))[0]


def test_a_huge_file_is_refused_without_being_read(tmp_path: Path) -> None:
    assert "larger" in refused(written(tmp_path, b"#" * (5 * 1024 * 1024)))[0]


@pytest.mark.parametrize("name", ["c.yaml", "c.toml"])
def test_an_empty_file_is_refused(tmp_path: Path, name: str) -> None:
    assert refused(written(tmp_path, "", name))


@pytest.mark.parametrize(
    ("text", "key"),
    [
        (YAML + "server: {port: 9200}\n", "server"),
        (YAML.replace("port: 9100", "port: 9100, port: 9101"), "port"),
        (YAML.replace("id: m", "id: m\n    id: n"), "id"),
        (YAML.replace("threshold: 5", 'threshold: 5, "threshold": 6'), "threshold"),
    ],
)
def test_a_yaml_key_given_twice_is_refused(tmp_path: Path, text: str, key: str) -> None:
    (problem,) = refused(written(tmp_path, text))
    assert repr(key) in problem
    assert "twice" in problem


def test_a_toml_key_given_twice_is_refused(tmp_path: Path) -> None:
    assert refused(written(tmp_path, TOML + "[server]\nport = 1\n", "c.toml"))


def test_a_yaml_merge_key_may_be_overridden(tmp_path: Path) -> None:
    text = f"""\
models:
  - {{id: m, circuit_breaker: &breaker {{threshold: 5, cool_down_secs: 7}}}}
  - {{id: n, circuit_breaker: {{<<: *breaker, threshold: 6}}}}
discovery: {{backend: static_urls, static_urls: {{urls: ["{URL}"]}}}}
"""
    breaker = load_config(written(tmp_path, text)).models[1].circuit_breaker
    assert (breaker.threshold, breaker.cool_down_secs) == (6, 7)


@pytest.mark.parametrize(
    "text",
    [
        "[",
        "a: b: c",
        "\x00",
        "a: \t- b",
        "--- 1\n--- 2\n",
        "*unknown",
        "!!python/object/apply:os.system ['true']",
        "? [a]\n: b",
        "{[a]: b}",
        "? {a: b}\n: c",
        "server: {port: !!int ''}",
        "server: {drain_secs: !!float ''}",
        "observability: {debug_headers: !!bool foo}",
        "server: {host: !!timestamp foo}",
        "server: {host: 2020-13-45}",
        "server: {host: !!binary '*'}",
        "server: {port: " + "1" * 5000 + "}",
        "[" * 5000,
        "- " * 3000,
        "a: &a [*a]",
        YAML + 'envoy: {cluster: "\\uD800"}',
    ],
    ids=lambda text: repr(text[:30]),
)
def test_broken_yaml_is_refused_with_a_problem(tmp_path: Path, text: str) -> None:
    assert refused(written(tmp_path, text))


@pytest.mark.parametrize(
    "text",
    [
        "[",
        "a",
        "a = ",
        "a = 1979-13-45",
        "a = " + "1" * 5000,
        "a = " + "[" * 5000,
        "[a]\n[a]",
        "\ufeffa = 1",
    ],
    ids=lambda text: repr(text[:30]),
)
def test_broken_toml_is_refused_with_a_problem(tmp_path: Path, text: str) -> None:
    assert refused(written(tmp_path, text, "c.toml"))


def test_aliases_that_multiply_are_refused(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12)]
    problems = refused(written(tmp_path, "\n".join([*lines, "models: *a11"])))
    assert all(len(problem) < 1000 for problem in problems)


# -- files that the configuration names


def problems(raw: dict[str, Any]) -> list[str]:
    return file_problems(parse_config(raw))


def test_a_configuration_without_files_has_no_file_problem() -> None:
    assert problems(raw_config()) == []


@pytest.mark.parametrize("key", ["workers.api_key_file", "workers.ca_file"])
@pytest.mark.parametrize("name", ["missing", "empty", "folder", "nul\x00inside"])
def test_an_unusable_file_is_reported_with_its_key(tmp_path: Path, key: str, name: str) -> None:
    (tmp_path / "empty").write_text("  \n")
    (tmp_path / "folder").mkdir()
    (problem,) = problems(at(key, str(tmp_path / name)))
    assert problem.startswith(f"{key}: ")


def test_all_tls_files_are_checked(tmp_path: Path) -> None:
    tls = {name: str(tmp_path / name) for name in ("cert_file", "key_file", "client_ca_file")}
    files = {"ca_file": "/a", "cert_file": "/c", "key_file": "/k"}
    found = problems(raw_config(server={"tls": tls}, envoy={"extproc": files}))
    assert {line.partition(": ")[0] for line in found} == {f"server.tls.{name}" for name in tls}


@pytest.mark.parametrize("content", [b"two words", b"a\r\nx-y: z", b"\xff\xfe", "é".encode()])
def test_the_token_in_a_key_file_follows_the_rules_of_api_key(
    tmp_path: Path, content: bytes
) -> None:
    path = written(tmp_path, content, "key")
    assert problems(at("workers.api_key_file", str(path)))


def test_a_key_file_may_end_with_a_line_feed(tmp_path: Path) -> None:
    assert problems(at("workers.api_key_file", str(written(tmp_path, "secret\n", "key")))) == []


def test_a_ca_file_without_a_certificate_is_reported(tmp_path: Path) -> None:
    good = tmp_path / "good.pem"
    trustme.CA().cert_pem.write_to_path(str(good))
    assert problems(at("workers.ca_file", str(good))) == []
    assert problems(at("workers.ca_file", str(written(tmp_path, "no certificate", "bad.pem"))))


def test_the_folder_of_the_socket_must_exist(tmp_path: Path) -> None:
    assert problems(at("server.unix_socket", str(tmp_path / "s"))) == []
    (problem,) = problems(at("server.unix_socket", str(tmp_path / "none" / "s")))
    assert problem.startswith("server.unix_socket: ")
