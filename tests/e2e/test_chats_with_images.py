"""Through the real Envoy: a chat with an image goes to the worker that holds the text before it."""

from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import Launch
from tests.e2e.test_kv_routing import PAGE, Pool
from tests.engines.vectors import MODELS

SYSTEM = " ".join(f"Rule {number}: answer questions about files." for number in range(60))
# A body that is too large to be read on the event loop.
PICTURE = "data:image/png;base64," + "iVBORw0K" * 60_000


def _image(path: str, picture: str) -> Any:
    if path == "/v1/messages":
        data = picture.partition(",")[2]
        return {"type": "image", "source": {"type": "base64", "media_type": "i/p", "data": data}}
    if path == "/v1/responses":
        return {"type": "input_image", "image_url": picture}
    return {"type": "image_url", "image_url": {"url": picture}}


def _body(path: str, system: str, picture: str = PICTURE) -> dict[str, Any]:
    if path == "/v1/responses":
        content = [{"type": "input_text", "text": "What is this?"}, _image(path, picture)]
        given = [{"role": "user", "content": content}]
        return {"instructions": system, "input": given, "max_output_tokens": 2}
    content = [{"type": "text", "text": "What is this?"}, _image(path, picture)]
    body: dict[str, Any] = {"messages": [{"role": "user", "content": content}], "max_tokens": 2}
    if path == "/v1/messages":
        return {"system": system, **body}
    body["messages"].insert(0, {"role": "system", "content": system})
    return body


@pytest.mark.parametrize("policy", ["cache_aware_zmq", "min_ttft"])
async def test_the_worker_that_holds_the_system_prompt_gets_the_image(
    launch: Launch, policy: str
) -> None:
    path = str(Path(MODELS) / "seeing")
    worker = {"page_size": PAGE, "kv_events_port": 0, "tokenizer_path": path}
    model = {"id": "m", "policy": policy, "tokenizer_path": path}
    settings = {"models": [model], "observability": {"debug_headers": True}}
    fleet = Pool(await launch(2, worker=worker, settings=settings))
    await fleet.settled()
    chat = "/v1/chat/completions"
    for number, url in enumerate(fleet.urls):
        await fleet.post(chat, _body(chat, f"{number} {SYSTEM}"), url)
    await fleet.settled()
    for number, url in [*enumerate(fleet.urls)] * 2:
        for picture in (PICTURE, PICTURE + "AAAA"):
            answer, shown = await fleet.post(chat, _body(chat, f"{number} {SYSTEM}", picture))
            assert (shown["worker"], shown["reason"]) == (url, "hit")
            overlap = int(shown["overlap"].partition("/")[0])
            assert 600 < overlap <= answer["usage"]["prompt_tokens_details"]["cached_tokens"]
    for other in ("/v1/messages", "/v1/responses"):
        _, shown = await fleet.post(other, _body(other, f"1 {SYSTEM}"))
        assert (shown["worker"], shown["reason"]) == (fleet.urls[1], "hit")
    assert await fleet.running.sample("extproc_prompts_known_in_part_total") == 10
