"""Decodes large event batches in chunks short enough not to delay requests.

Decoding a batch of the largest size takes 100 ms, and a thread would not help, since it makes
Python objects all the time. So a large batch is cut, while still encoded, into smaller batches that
are decoded as usual. An event that is too large itself is cut between two blocks, which makes a
chain of events with the same meaning.
"""

from collections.abc import Iterator
from typing import Final

import msgspec
from msgspec import Raw

from extproc.kv.events import PAYLOAD_MAX_BYTES, EventBatch, WireError
from extproc.kv.wire import decode_events
from extproc.kv.wire_schema import UNREADABLE, is_map, parse_raw

__all__ = ["decode_in_parts"]

# Decoding a part takes one or two milliseconds.
_PART_BYTES: Final = 1 << 16
_UNITS_PER_PIECE: Final = 1 << 13
_ARRAY_32: Final = b"\xdd"
_COUNT_BYTES: Final = 4
# The length of an encoded integer by its first byte; 0 if that byte begins something else.
_WIDTHS: Final = bytes(
    [1] * 0x80  # to 127
    + [0] * 0x4C
    + [2, 3, 5, 9]  # unsigned
    + [2, 3, 5, 9]  # signed
    + [0] * 0x0C
    + [1] * 0x20  # from -32
)
_PAIR: Final = 0x92
_BYTES_8: Final = 0xC4
# The fields of a map; an event that is an array has them in this order.
_FIELDS: Final = ("type", "block_hashes", "parent_block_hash", "token_ids", "block_size")
_KEYS: Final = "extra_keys"
_KEYS_INDEX: Final = 8

_encoder: Final = msgspec.msgpack.Encoder()
_map_decoder: Final = msgspec.msgpack.Decoder(dict[str, Raw])
_array_decoder: Final = msgspec.msgpack.Decoder(list[Raw])
_keys_decoder: Final = msgspec.msgpack.Decoder(list[Raw] | None)
_kind_decoder: Final = msgspec.msgpack.Decoder(str)
_size_decoder: Final = msgspec.msgpack.Decoder(int)


def decode_in_parts(payload: bytes) -> Iterator[EventBatch]:
    """Decode a batch as `decode_events` does, a part at a time.

    Raises WireError for the same reasons, perhaps after some parts.
    """
    if len(payload) <= _PART_BYTES:
        yield decode_events(payload)
        return
    if len(payload) > PAYLOAD_MAX_BYTES:
        raise WireError(f"the payload is larger than {PAYLOAD_MAX_BYTES} bytes")
    try:
        whole = parse_raw(payload)
        head, tail = b"\x93" + _encoder.encode(whole.ts), _encoder.encode(whole.dp_rank)
        part: list[bytes | Raw] = []
        size = 0
        for event in whole.events:
            for piece in (event,) if _size(event) <= _PART_BYTES else _pieces(event):
                part.append(piece)
                size += _size(piece)
                if size >= _PART_BYTES:
                    yield decode_events(head + _array(len(part), b"".join(part)) + tail)
                    part, size = [], 0
    except WireError:
        raise
    except (*UNREADABLE, LookupError):
        raise WireError("the payload is not a batch of KV events") from None
    yield decode_events(head + _array(len(part), b"".join(part)) + tail)


def _size(piece: bytes | Raw) -> int:
    return memoryview(piece).nbytes


def _array(count: int, elements: bytes) -> bytes:
    return _ARRAY_32 + count.to_bytes(_COUNT_BYTES, "big") + elements


def _pieces(event: Raw) -> Iterator[bytes | Raw]:
    """Cut an event into a chain of events; an event without blocks stays as it is.

    If the tokens do not fit the blocks, the pieces have no tokens, so that they do not fit either.
    """
    named = is_map(event)
    fields: dict[str | int, Raw] = {}
    fields.update(_map_decoder.decode(event) if named else enumerate(_array_decoder.decode(event)))
    kind, hashes, parent, tokens, size = _FIELDS if named else range(len(_FIELDS))
    name = _kind_decoder.decode(fields[kind])
    if name not in ("BlockStored", "BlockRemoved"):
        yield event
        return
    blocks, units = _Elements(fields[hashes]), None
    extra = _KEYS if named else _KEYS_INDEX
    keys = _keys_decoder.decode(fields[extra]) if extra in fields else None
    done = 0
    blocks_per_piece, block_size = _UNITS_PER_PIECE, 0
    if name == "BlockStored":
        block_size = _size_decoder.decode(fields[size])
        units = _Elements(fields[tokens])
        if block_size < 1 or blocks.left * block_size != units.left:
            units, fields[tokens] = None, Raw(_array(0, b""))
        else:
            blocks_per_piece = max(1, _UNITS_PER_PIECE // block_size)
    while blocks.left:
        count = min(blocks_per_piece, blocks.left)
        all_but_last, last = blocks.take(count - 1), blocks.take(1)
        fields[hashes] = Raw(_array(count, all_but_last + last))
        if units is not None:
            fields[tokens] = Raw(_array(count * block_size, units.take(count * block_size)))
        if keys:
            fields[extra] = Raw(_encoder.encode(keys[done : done + count]))
            done += count
        yield _encoder.encode(fields if named else list(fields.values()))
        if units is not None:
            fields[parent] = Raw(last)


class _Elements:
    """The elements of an encoded array: integers, pairs of them, or digests."""

    def __init__(self, array: Raw) -> None:
        self._data = memoryview(array).tobytes()
        head = self._data[0]
        if 0x90 <= head <= 0x9F:
            self.left, self._at = head & 0x0F, 1
        elif head in (0xDC, 0xDD):
            self._at = 3 if head == 0xDC else 5
            self.left = int.from_bytes(self._data[1 : self._at], "big")
        else:
            raise ValueError("not an array")

    def take(self, count: int) -> bytes:
        """The next elements, encoded; other kinds of elements give bytes that cannot be decoded."""
        data, widths, start = self._data, _WIDTHS, self._at
        at = start
        for _ in range(count):
            head = data[at]
            if width := widths[head]:
                at += width
            elif head == _PAIR:
                at += 1 + widths[data[at + 1]]
                at += widths[data[at]]
            elif head == _BYTES_8:
                at += 2 + data[at + 1]
        self._at = at
        self.left -= count
        return data[start:at]
