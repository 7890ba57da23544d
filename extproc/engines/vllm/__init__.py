"""vLLM's rules: from a body to what a chat template gets.

Begin with `prompts`: it has a reader for each endpoint. `chats` has what all chats have in common,
`requests` reads those of /v1/chat/completions, and `responses` and `anthropic` translate theirs.
`messages` and `tools` normalise their parts.
"""

__all__ = ["prompts"]
