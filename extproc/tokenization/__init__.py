"""Tokenization: from the prompt of a request to the token ids that the engine will compute.

Begin with `encoder`: it holds the tokenizer and the chat templates of one model and runs long
work in threads. `fields` decodes a body, `prompts` is what an engine's rules make of it,
`chat_template` renders chats, and `text_encoder` turns text into ids, by way of pieces and words
whose ids are known. Of chats with images, `media` finds the text before these. A prompt without
tokens has one of the `reasons`. `tokenizer_files` reads a model's folder. Nothing here does network
I/O or knows a worker.
"""

__all__ = ["encoder", "errors", "fields", "media", "prompts", "reasons"]
