"""Renders the filters that decompress request bodies before this service sees them.

The service, and most engines, read plain JSON. Responses pass as they are.

A body that is small on the wire can be huge when it is decompressed. The buffer limit of the
listener ends it with 413, but only between two pieces of the body, and one piece of 1 MiB becomes
1 GiB of zeros. So the ratio is limited as well. Envoy cuts a body where it goes beyond the
limit, so the service finds that the JSON ends too early.
"""

from typing import Any, Final

from extproc.envoy_config.wire_form import typed

__all__ = ["decompressors"]

_CHUNK_BYTES: Final = 64 * 1024
# What every encoder can have used; Envoy's own default is smaller and refuses such bodies.
_GZIP_WINDOW_BITS: Final = 15
# Envoy has this limit for br and zstd, where it cannot be configured.
_GZIP_INFLATE_RATIO_MAX: Final = 100

_LIBRARIES: Final = {
    "gzip": (
        "Gzip",
        {
            "window_bits": _GZIP_WINDOW_BITS,
            "chunk_size": _CHUNK_BYTES,
            "max_inflate_ratio": _GZIP_INFLATE_RATIO_MAX,
        },
    ),
    "brotli": ("Brotli", {"chunk_size": _CHUNK_BYTES}),
    "zstd": ("Zstd", {"chunk_size": _CHUNK_BYTES}),
}


def decompressors() -> list[dict[str, Any]]:
    """One filter for each of gzip, br and zstd. Each decompresses bodies in its own encoding."""
    return [
        _decompressor(name, message, settings) for name, (message, settings) in _LIBRARIES.items()
    ]


def _decompressor(name: str, message: str, settings: dict[str, int]) -> dict[str, Any]:
    library = {
        "name": name,
        "typed_config": typed(
            f"extensions.compression.{name}.decompressor.v3.{message}", **settings
        ),
    }
    return {
        "name": f"envoy.filters.http.decompressor.{name}",
        "typed_config": typed(
            "extensions.filters.http.decompressor.v3.Decompressor",
            decompressor_library=library,
            # Otherwise Envoy would ask workers for compressed responses.
            request_direction_config={"advertise_accept_encoding": False},
            response_direction_config={
                "common_config": {
                    "enabled": {
                        "default_value": False,
                        "runtime_key": "llm_extproc.decompress_responses",
                    }
                }
            },
        ),
    }
