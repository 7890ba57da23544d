"""What `helm test` says about a release behind a gateway, over a real gRPC connection."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
import trustme

from extproc.config.loading import parse_config
from extproc.config.models import PolicyName
from extproc.config.server import ServerTlsConfig
from tests.helm.scripts import load_script
from tests.protocol.exchange import Service, serving


def config(policy: str, **more: Any) -> Any:
    model = {"id": "m", "policy": policy, "tokenizer_path": "/models/m"}
    urls = {"urls": ["http://10.0.0.1:8000"]}
    discovery = {"backend": "static_urls", "static_urls": urls}
    return parse_config({"models": [model], "discovery": discovery, **more})


async def check(target: str, policy: str) -> bool:
    done: bool = await asyncio.to_thread(
        load_script("check_release").check, "service", target, config(policy)
    )
    return done


async def test_a_release_that_routes_is_good(capsys: pytest.CaptureFixture[str]) -> None:
    async with serving(Service(["m"], 1)) as service:
        assert await check(service.target, "round_robin") is True
    assert capsys.readouterr().out == "m: good\n"
    assert service.in_flight == 0


@pytest.mark.parametrize("policy", ["min_ttft", "cache_aware_zmq"])
async def test_a_policy_without_tokens_fails_as_no_tokens(
    policy: PolicyName, capsys: pytest.CaptureFixture[str]
) -> None:
    async with serving(Service(["m"], 1, policy=policy)) as service:
        assert await check(service.target, policy) is False
    out = capsys.readouterr().out
    assert out.startswith("m: no_tokens: ")
    assert "/models/m" in out


async def test_a_model_without_workers_fails_with_the_answer_to_clients(
    capsys: pytest.CaptureFixture[str],
) -> None:
    async with serving(Service(["other"], 1)) as service:
        assert await check(service.target, "round_robin") is False
    assert "m: refused: " in capsys.readouterr().out


async def test_a_service_that_does_not_answer_fails(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    script = load_script("check_release")
    monkeypatch.setattr(script, "_TIMEOUT_SECONDS", 0.2)
    arguments = ("service", "127.0.0.1:1", config("random"))
    assert await asyncio.to_thread(script.check, *arguments) is False
    assert "127.0.0.1:1 does not answer" in capsys.readouterr().out


async def test_a_release_with_tls_is_asked_with_its_own_certificate(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    authority = trustme.CA()
    names = {"cert_file": "tls.crt", "key_file": "tls.key", "ca_file": "ca.crt"}
    paths = {key: str(tmp_path / name) for key, name in names.items()}
    authority.cert_pem.write_to_path(paths["ca_file"])
    pair = authority.issue_cert("127.0.0.1")
    pair.cert_chain_pems[0].write_to_path(paths["cert_file"])
    pair.private_key_pem.write_to_path(paths["key_file"])
    tls = ServerTlsConfig(
        cert_file=paths["cert_file"], key_file=paths["key_file"], client_ca_file=paths["ca_file"]
    )
    asked = config("random", envoy={"extproc": paths})
    async with serving(Service(["m"], 1, server={"tls": tls})) as service:
        script = load_script("check_release")
        assert await asyncio.to_thread(script.check, "service", service.target, asked) is True
    assert capsys.readouterr().out == "m: good\n"
