"""Bodies: reads the prompt from a request's body, by the rules of the engine.

Begin with `prompts`: it has a reader for each endpoint. Chats of all APIs become chat messages as
a template is given them: `openai_chat` as they are, `responses` and `anthropic` by translation.
`messages` and `tools` normalise their parts. Everything here is pure.
"""

__all__ = ["messages", "openai_chat", "prompts"]
