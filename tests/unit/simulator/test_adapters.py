"""Adapters of a worker like SGLang."""

from extproc.simulator.settings import SimulatorSettings

from .clients import CHAT, Launch, chat


def sglang(*adapters: str) -> SimulatorSettings:
    return SimulatorSettings(
        model="m", prefill_tokens_per_second=1e9, default_max_tokens=2, lora=list(adapters)
    )


async def test_adapters_are_listed_and_named_with_the_model(launch: Launch) -> None:
    worker = await launch(sglang("sql"))
    assert (await worker.get("/server_info"))[1]["enable_lora"] is True
    _, models = await worker.get("/v1/models")
    assert [(card["id"], card["parent"]) for card in models["data"]] == [("m", None), ("sql", "m")]
    assert (await worker.post(CHAT, chat(model="m:sql")))[0] == 200
    assert (await worker.post(CHAT, chat(model="m", lora_path="sql")))[0] == 200
    assert (await worker.post(CHAT, chat(model="m:other")))[0] == 400


async def test_adapters_are_loaded_and_unloaded(launch: Launch) -> None:
    worker = await launch(sglang("sql"))
    body = {"lora_name": "chat", "lora_path": "/somewhere"}
    assert (await worker.post("/load_lora_adapter", body))[0] == 200
    assert (await worker.post("/load_lora_adapter", body))[0] == 400
    assert (await worker.post(CHAT, chat(model="m:chat")))[0] == 200
    assert (await worker.post("/unload_lora_adapter", body))[0] == 200
    assert (await worker.post(CHAT, chat(model="m:chat")))[0] == 400
    assert (await worker.post("/unload_lora_adapter", body))[0] == 404


async def test_without_adapters_the_list_is_empty_and_all_names_are_taken(launch: Launch) -> None:
    worker = await launch(sglang())
    assert (await worker.get("/server_info"))[1]["enable_lora"] is False
    assert (await worker.post("/load_lora_adapter", {"lora_name": "a"}))[0] == 404
    assert (await worker.post(CHAT, chat(model="m:any")))[0] == 200
