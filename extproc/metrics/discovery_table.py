"""The part of the table of metrics that is about discovery.

Separate from `metrics.table` only because of its length.
"""

from typing import Final

from extproc.metrics.specs import Label, Section

__all__ = ["SECTION"]

SECTION: Final = Section(
    "Discovery by DNS or in a cluster",
    "Without series while `discovery.backend` is `static_urls`.",
)

_OBJECTS: Final = Label(
    "objects",
    {
        "names": "host names, with the backend `dns`",
        "endpointslices": "",
        "pods": "",
        "inferencepools": "",
    },
    "The kind that is followed.",
)

DISCOVERY_UP = SECTION.gauge(
    "extproc_discovery_up",
    "1 while the API server answers, or the name servers do for all names, else 0: the workers "
    "known last are then in use.",
    _OBJECTS,
)
DISCOVERY_ERRORS = SECTION.counter(
    "extproc_discovery_errors_total",
    "Lists and watches of the API server and lookups of names that failed, by reason.",
    _OBJECTS,
    Label(
        "reason",
        {
            "unreachable": "no connection, or one that broke off",
            "timeout": "no answer, or a watch that was silent for too long",
            "unauthorized": "401",
            "forbidden": "403",
            "throttled": "429",
            "expired": "the version of the list is too old for a watch; listed again at once",
            "server_error": "5xx, or SERVFAIL of a name server",
            "refused": "another status, or REFUSED of a name server",
            "invalid": "an answer that cannot be read",
            "name_not_found": "there is no such name",
            "no_addresses": "the name has no address of the family",
            "too_many_addresses": "more addresses than 1000; the others are not used",
        },
    ),
)
