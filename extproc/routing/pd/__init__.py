"""Prefill and decode on different workers.

Begin with `passes`: the first pass sends the prefill (`prefill_sender`, `prefill_leg`) and says
where decode goes, the second pass picks the decode worker (`decode_chooser`, `decode_lease`). A
`pair` holds both halves of a request and ends one when the other fails. `handoff` has what the
engines must find in a body, `decode_order` what the second pass must find in a header.
"""

__all__ = [
    "decode_chooser",
    "decode_lease",
    "decode_order",
    "pair",
    "passes",
    "prefill_leg",
    "prefill_sender",
    "settings",
]
