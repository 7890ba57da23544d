"""The part of the table of metrics that is about tokens and KV pages.

Separate from `metrics.table` only because of its length.
"""

from typing import Final

from extproc.metrics.specs import Label, Section

__all__ = ["SECTIONS"]

# Seconds.
_TOKENIZATION_BOUNDS: Final = (
    0.00005, 0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0, 5.0,
)  # fmt: skip
_OVERLAP_BOUNDS: Final = (0, 64, 256, 1024, 4096, 16_384, 65_536, 262_144)

_TIER: Final = Label("tier", {"device": "", "host": "", "below": "disk or remote storage"})
_RANK: Final = ("worker", "rank")

_tokens = Section(
    "Tokens and overlap",
    "For models with the policies `cache_aware_zmq` and `min_ttft`. Overlap is the part of a "
    "prompt that the chosen rank was known to hold, from its own events. Predicted pages are not "
    "part of it.",
)

PROMPT_TOKENS = _tokens.counter(
    "extproc_prompt_tokens_total",
    "Tokens of the prompts whose tokens are known, or known in part; of the latter an estimate.",
    "model",
)
CACHED_TOKENS = _tokens.counter(
    "extproc_cached_tokens_total",
    "Prompt tokens that the chosen rank was known to hold. Divided by "
    "extproc_prompt_tokens_total, this is the expected hit rate.",
    "model",
)
OVERLAP_TOKENS = _tokens.histogram(
    "extproc_overlap_tokens",
    "Tokens of each prompt that the chosen rank was known to hold.",
    "model",
    bounds=_OVERLAP_BOUNDS,
)
PROMPTS_IN_PART = _tokens.counter(
    "extproc_prompts_known_in_part_total",
    "Requests whose prompts are known up to the first image, audio or video only.",
    "model",
)
PROMPTS_WITHOUT_TOKENS = _tokens.counter(
    "extproc_prompts_without_tokens_total",
    "Requests that were routed without the tokens of their prompt, by reason.",
    "model",
    Label(
        "reason",
        {
            "batch": "several prompts in one request",
            "body_not_visible": "the gateway sends no body",
            "busy": "no tokens within half of `server.step_deadline_secs`, or too many "
            "texts were waiting",
            "encode_error": "",
            "engine_tokens_late": "the engine did not answer with them in time, or was not asked; "
            "see extproc_engine_token_questions_total",
            "malformed": "the engine will refuse it, too",
            "multimodal": "images, audio or video, and no text before them that is certain",
            "no_chat_template": "",
            "no_text": "an empty prompt, for instance",
            "template_error": "",
            "rendered_by_engine": "the engine has code of its own for this model",
            "template_limit": (
                "the chat template takes too many steps, too long, or makes too long a value; "
                "the log names the model"
            ),
            "tokens_differ": "the chosen worker was found to compute other tokens for such a "
            "request; see `models[].token_proof`",
            "too_long": "",
            "unsupported": "a kind of request that this service cannot map to tokens",
        },
    ),
)
TOKEN_PROOFS = _tokens.counter(
    "extproc_token_proofs_total",
    "Proofs of the tokens of a worker against those of this service, by outcome; see "
    "models[].token_proof.",
    "model",
    Label(
        "outcome",
        {
            "proven": "",
            "differs": "the log names the first differing token and the likely cause",
            "not_proven": "the worker could not be asked",
        },
    ),
)
ENGINE_TOKEN_QUESTIONS = _tokens.counter(
    "extproc_engine_token_questions_total",
    "Requests whose tokens an engine was to be asked for, by outcome; see models[].tokens_from.",
    "model",
    Label(
        "outcome",
        {
            "answered": "",
            "cached": "known from the answer for an equal body",
            "late": "no answer within 0.1 s, or up to 0.5 s for a large body",
            "failed": "refused, or an answer without tokens",
            "not_asked": "too many questions were open, or some had failed",
            "too_large": "the body is larger than 512 KiB",
        },
    ),
)
TOKEN_PROOF_WORKERS = _tokens.gauge(
    "extproc_token_proof_workers",
    "Workers by what is known of their tokens; see models[].token_proof.",
    "model",
    Label(
        "state",
        {
            "pending": "asked soon",
            "proven": "they compute the same tokens as this service",
            "differs": "requests that this concerns are routed to them by load",
            "not_proven": "they could not be asked, and are believed",
        },
    ),
)
TOKENIZATION_SECONDS = _tokens.histogram(
    "extproc_tokenization_seconds",
    "Time from a request body to the tokens of its prompt, including the wait for a thread.",
    "model",
    bounds=_TOKENIZATION_BOUNDS,
)
TOKENIZATIONS = _tokens.counter(
    "extproc_tokenizations_total",
    "Encoded prompts by where they were encoded.",
    "model",
    Label("place", {"loop": "on the event loop", "thread": ""}),
)
TOKENIZATION_BUSY_SECONDS = _tokens.counter(
    "extproc_tokenization_busy_seconds_total", "Time spent encoding prompts.", "model"
)
TOKEN_SEGMENTS = _tokens.counter(
    "extproc_token_segments_total",
    "Lookups of pieces of text in the token cache by outcome.",
    "model",
    Label("outcome", {"hit": "", "miss": ""}),
)
TOKEN_CACHE_BYTES = _tokens.gauge(
    "extproc_token_cache_bytes", "Memory of the token cache.", "model"
)
TOKEN_CACHE_EVICTIONS = _tokens.counter(
    "extproc_token_cache_evictions_total",
    "Pieces of text dropped from the token cache to stay within tokenization.cache_bytes.",
    "model",
)
TOKEN_CACHE_ENABLED = _tokens.gauge(
    "extproc_token_cache_enabled",
    "1 if the token cache is used. 0 if it is switched off, or if this tokenizer cannot encode "
    "pieces of a text one by one.",
    "model",
)

_kv = Section(
    "KV pages of workers",
    "Counters include ranks that are gone. Gauges per rank vanish with the rank.",
)

KV_EVENTS = _kv.counter(
    "extproc_kv_events_total",
    "KV events by kind.",
    Label("kind", {"stored": "", "removed": "", "cleared": ""}),
)
KV_EVENT_PAGES = _kv.counter(
    "extproc_kv_event_pages_total",
    "Pages named in KV events, by kind of event and tier.",
    Label("kind", {"stored": "", "removed": ""}),
    _TIER,
)
KV_BATCHES = _kv.counter("extproc_kv_batches_total", "Applied batches of KV events.")
KV_BYTES = _kv.counter("extproc_kv_bytes_total", "Size of the applied batches of KV events.")
KV_GAPS = _kv.counter(
    "extproc_kv_gaps_total",
    "Gaps in the sequence numbers of KV event batches. A replay follows where the engine offers "
    "one.",
)
KV_REPLAYS = _kv.counter("extproc_kv_replays_total", "Requested replays of KV events.")
KV_REPLAY_FAILURES = _kv.counter(
    "extproc_kv_replay_failures_total", "Replays of KV events that did not complete."
)
KV_RESTARTS = _kv.counter(
    "extproc_kv_restarts_total", "Detected engine restarts. The rank's pages are forgotten."
)
KV_CLEARS = _kv.counter(
    "extproc_kv_clears_total",
    "Times that all pages of a rank were forgotten because KV events were lost, unreadable or "
    "from a restarted engine.",
)
KV_MALFORMED_MESSAGES = _kv.counter(
    "extproc_kv_malformed_messages_total", "ZMQ messages that could not be parsed."
)
KV_UNREADABLE_BATCHES = _kv.counter(
    "extproc_kv_unreadable_batches_total",
    "Batches of KV events that could not be decoded, or whose removals could not all be decoded.",
)
KV_APPLY_ERRORS = _kv.counter(
    "extproc_kv_apply_errors_total",
    "Errors while a batch of KV events was applied, unreadable batches included.",
)
KV_SKIPPED_EVENTS = _kv.counter(
    "extproc_kv_skipped_events_total",
    "KV events that were skipped: unknown kind, malformed or over a limit.",
)
KV_ODD_SIZED_EVENTS = _kv.counter(
    "extproc_kv_odd_sized_events_total",
    "KV events whose pages have another size than the worker announced.",
)
KV_DROPPED_BATCHES = _kv.counter(
    "extproc_kv_dropped_batches_total",
    "Batches of KV events that were dropped because too many waited for a replay.",
)
KV_LOAD_REPORTS = _kv.counter(
    "extproc_kv_load_reports_total", "Load reports received from engines."
)
KV_UNREADABLE_LOAD_REPORTS = _kv.counter(
    "extproc_kv_unreadable_load_reports_total", "Load reports that could not be decoded."
)
KV_PAGES_KEPT_OUT = _kv.counter(
    "extproc_kv_pages_kept_out_total",
    "Stored pages that were not added to the index, by reason.",
    Label(
        "reason",
        {
            "unknown_parent": "",
            "token_count": "the number of tokens does not fit the number of pages",
            "over_limit": "`kv.max_pages` is reached",
            "other_units": "pairs of tokens where the index has single ones, or the reverse",
        },
    ),
)
KV_UNKNOWN_REMOVALS = _kv.counter(
    "extproc_kv_unknown_removals_total", "Removed pages that the index did not hold."
)
KV_PAGES = _kv.gauge("extproc_kv_pages", "Pages in the index, summed over ranks.")
KV_INDEX_BYTES = _kv.gauge("extproc_kv_index_bytes", "Estimated memory of the index.")
KV_RANKS = _kv.gauge("extproc_kv_ranks", "Ranks whose KV events are followed.")
KV_RANKS_CONNECTED = _kv.gauge(
    "extproc_kv_ranks_connected", "Ranks whose KV event publisher is connected."
)
KV_RANKS_UNTRUSTED = _kv.gauge(
    "extproc_kv_ranks_untrusted", "Ranks whose index is not trusted at the moment."
)
KV_RANK_TRUSTED = _kv.gauge(
    "extproc_kv_rank_trusted", "1 if the index of the rank is trusted, otherwise 0.", *_RANK
)
KV_RANK_PAGES = _kv.gauge(
    "extproc_kv_rank_pages",
    "Pages that the rank holds, each counted in its best tier.",
    *_RANK,
    _TIER,
)
KV_LAST_EVENT_AGE_SECONDS = _kv.gauge(
    "extproc_kv_last_event_age_seconds", "Time since the rank's last batch of KV events.", *_RANK
)
RANK_REQUESTS = _kv.gauge(
    "extproc_rank_requests",
    "Requests on the rank. Those of other routers are included if the rank reports its load.",
    *_RANK,
)
RANK_PREFILL_TOKENS_AHEAD = _kv.gauge(
    "extproc_rank_prefill_tokens_ahead",
    "Tokens that the rank has to prefill before it can start a new request.",
    *_RANK,
)
RANK_PREFILL_TOKENS_PER_SECOND = _kv.gauge(
    "extproc_rank_prefill_tokens_per_second", "Measured prefill speed of the rank.", *_RANK
)

SECTIONS: Final = (_tokens, _kv)
