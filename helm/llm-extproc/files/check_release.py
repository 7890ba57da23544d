"""Asks an installed release whether it works: what the pod of `helm test` runs.

    python check_release.py MODE ADDRESS

MODE is `service`, where it speaks to the service as a gateway does, or `gateway`, where it sends
requests as a client does. It prints a line for each model and ends with 1 if something is wrong.
`no_tokens` means that a model is routed by load alone, though its policy looks at tokens.
"""

import json
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc

from extproc._protos import llm_extproc_pb2 as pb
from extproc.config.loading import load_config
from extproc.config.models import TOKEN_POLICIES, ModelConfig
from extproc.config.schema import Config

_CONFIG = Path("/etc/extproc/extproc.yaml")
_METHOD = "/envoy.service.ext_proc.v3.ExternalProcessor/Process"
_TIMEOUT_SECONDS = 60
_NO_TOKENS = (
    "no_tokens: the policy {policy} does not see the prompt's tokens. Look at the files in "
    "{path}: tokenizer.json, and a chat template in chat_template.jinja or tokenizer_config.json"
)


def check(mode: str, address: str, config: Config) -> bool:
    """Print what was found for each model; true if all is well."""
    ask = _ask_service if mode == "service" else _ask_gateway
    well = True
    for model in config.models:
        try:
            problem = ask(address, config, model)
        except (grpc.RpcError, OSError) as error:
            problem = f"{address} does not answer: {_describe(error)}"
        sys.stdout.write(f"{model.id}: {problem or 'good'}\n")
        well = well and not problem
    return well


def _describe(error: Any) -> str:
    return error.details() if isinstance(error, grpc.Call) else str(error)


def _body(model: ModelConfig) -> bytes:
    message = {"role": "user", "content": "Say yes."}
    return json.dumps({"model": model.id, "messages": [message], "max_tokens": 1}).encode()


def _ask_service(address: str, config: Config, model: ModelConfig) -> str:
    """Send a request's headers and body as Envoy does; the reply has the decision."""
    with _channel(address, config) as channel:
        method = channel.stream_stream(
            _METHOD,
            request_serializer=pb.ProcessingRequest.SerializeToString,
            response_deserializer=pb.ProcessingResponse.FromString,
        )
        call = method(
            _messages(_body(model)),
            metadata=(("x-extproc-pass", "route"),),
            timeout=_TIMEOUT_SECONDS,
            wait_for_ready=True,
        )
        try:
            for reply in call:
                if reply.HasField("immediate_response"):
                    return f"refused: {reply.immediate_response.body.decode(errors='replace')}"
                if "extproc" in reply.dynamic_metadata.fields:
                    decision = reply.dynamic_metadata.fields["extproc"].struct_value.fields
                    return _judge(model, decision["reason"].string_value)
        finally:
            call.cancel()
    return "no decision: the stream has ended"


def _channel(address: str, config: Config) -> grpc.Channel:
    extproc = config.envoy.extproc
    if extproc.ca_file is None:
        return grpc.insecure_channel(address)
    pair = [
        Path(name).read_bytes() if name else None for name in (extproc.key_file, extproc.cert_file)
    ]
    return grpc.secure_channel(
        address, grpc.ssl_channel_credentials(Path(extproc.ca_file).read_bytes(), *pair)
    )


def _messages(body: bytes) -> Iterator[pb.ProcessingRequest]:
    headers = {
        ":method": "POST",
        ":path": "/v1/chat/completions",
        ":authority": "helm-test",
        "content-type": "application/json",
        "content-length": str(len(body)),
    }
    values = [pb.HeaderValue(key=key, raw_value=text.encode()) for key, text in headers.items()]
    head = pb.ProcessingRequest(
        request_headers=pb.HttpHeaders(headers=pb.HeaderMap(headers=values), end_of_stream=False)
    )
    head.protocol_config.request_body_mode = pb.ProcessingMode.BUFFERED
    yield head
    yield pb.ProcessingRequest(request_body=pb.HttpBody(body=body, end_of_stream=True))


def _judge(model: ModelConfig, reason: str) -> str:
    if reason == "no_tokens" and model.policy in TOKEN_POLICIES:
        return _NO_TOKENS.format(policy=model.policy, path=model.tokenizer_path)
    return ""


def _ask_gateway(address: str, _: Config, model: ModelConfig) -> str:
    """Have one token generated; then have the chat encoded where the policy looks at tokens.

    Answers have the reason of the decision only where debug headers are on.
    """
    status, answer, headers = _post(f"http://{address}/v1/chat/completions", _body(model))
    if status != 200:
        return f"status {status}: {answer}"
    if problem := _judge(model, headers.get("x-extproc-reason", "")):
        return problem
    if model.policy in TOKEN_POLICIES:
        chat = json.loads(_body(model))
        body = json.dumps({"model": model.id, "messages": chat["messages"]}).encode()
        status, answer, _headers = _post(f"http://{address}/v1/tokenize", body)
        if status >= 500:
            return f"status {status} of /v1/tokenize: {answer}"
        return "" if status == 200 else _judge(model, "no_tokens")
    return ""


def _post(url: str, body: bytes) -> tuple[int, str, dict[str, str]]:
    headers = {"content-type": "application/json", "x-extproc-debug": "true"}
    request = urllib.request.Request(url, data=body, headers=headers)  # noqa: S310
    try:
        with urllib.request.urlopen(request, timeout=_TIMEOUT_SECONDS) as answer:  # noqa: S310
            return answer.status, answer.read().decode(errors="replace"), dict(answer.headers)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode(errors="replace"), dict(error.headers)


if __name__ == "__main__":
    sys.exit(0 if check(sys.argv[1], sys.argv[2], load_config(_CONFIG)) else 1)
