"""The service's configurations on the pages can be used as they stand there."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import msgspec
import pytest
import yaml

from extproc.config.loading import parse_config
from extproc.config.schema import Config
from extproc.envoy_config import render_yaml

ROOT: Final = Path(__file__).resolve().parents[2]
_BLOCKS: Final = re.compile(r"^```yaml\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_SECTIONS: Final = {field.encode_name for field in msgspec.structs.fields(Config)}
# These leave something out, as the sentence above them says.
_BESIDE_OTHER_KEYS: Final = "beside the keys above"


def blocks(page: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The configurations on a page, each with the text before it."""
    text = (ROOT / page).read_text(encoding="utf-8")
    for found in _BLOCKS.finditer(text):
        for document in yaml.safe_load_all(found[1]):
            if isinstance(document, dict) and document.keys() <= _SECTIONS:
                yield text[: found.start()], document


def of_the_readme() -> dict[str, Any]:
    (found,) = [one for _, one in blocks("README.md")]
    return found


FRAGMENTS: Final = [
    pytest.param(before, block, id=f"{page}-{number}")
    for page in sorted(str(one.relative_to(ROOT)) for one in (ROOT / "docs").glob("*.md"))
    for number, (before, block) in enumerate(blocks(page))
    if not before.rstrip().endswith(f"{_BESIDE_OTHER_KEYS}:")
]


def test_the_file_of_the_readme_is_complete() -> None:
    assert render_yaml(parse_config(of_the_readme()))


@pytest.mark.parametrize(("before", "block"), FRAGMENTS)
def test_a_fragment_can_be_used_beside_the_models_of_the_readme(
    before: str, block: dict[str, Any]
) -> None:
    if "discovery" in block and "models" not in block:
        assert "beside `models`" in before
    config = parse_config(of_the_readme() | block)
    # A gateway with pools finds the pods itself, and has no file of this service.
    if "discovery" in block and config.discovery.backend != "inference_pool":
        assert render_yaml(config)


def test_the_keys_for_ranks_on_other_pods_fit_beside_those_above_them() -> None:
    whole, more = (
        block["discovery"]["k8s_pods"]
        for _, block in blocks("docs/kubernetes.md")
        if "k8s_pods" in block.get("discovery", {})
    )
    discovery = {"backend": "k8s_pods", "k8s_pods": whole | more}
    assert parse_config(of_the_readme() | {"discovery": discovery})


def test_workers_can_be_added_to_the_file_of_the_page() -> None:
    page = (ROOT / "docs" / "runtime-workers.md").read_text(encoding="utf-8")
    ((_, block),) = blocks("docs/runtime-workers.md")
    config = parse_config(block)
    assert config.envoy.has_ads
    assert f"export {config.server.admin_token_env}=" in page
    assert page.count(f"Bearer ${config.server.admin_token_env}") == 2


def test_the_rights_of_the_page_are_bound_to_its_account() -> None:
    page = (ROOT / "docs" / "kubernetes.md").read_text(encoding="utf-8")
    (block,) = [one for one in _BLOCKS.findall(page) if "RoleBinding" in one]
    objects = {one["kind"]: one for one in yaml.safe_load_all(block)}
    account, role, binding = (objects[kind] for kind in ("ServiceAccount", "Role", "RoleBinding"))
    assert binding["roleRef"]["name"] == role["metadata"]["name"]
    assert binding["metadata"]["namespace"] == role["metadata"]["namespace"]
    assert binding["subjects"] == [{"kind": "ServiceAccount"} | account["metadata"]]
    followed = [block["discovery"] for _, block in blocks("docs/kubernetes.md")]
    assert {one["k8s"]["namespace"] for one in followed if "k8s" in one} == {
        role["metadata"]["namespace"]
    }
