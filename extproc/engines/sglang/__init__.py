"""SGLang's rules: from a body to what a chat template gets.

Begin with `prompts`: it has a reader for each endpoint. Chats of all APIs become chat messages as
a template is given them: `chats` as they are, `responses` and `anthropic` by translation.
`messages` and `tools` normalise their parts, and `thinking` has the parsers that the engine can be
started with.
"""

__all__ = ["prompts", "thinking"]
