"""Tokenization: from a request's body to the token ids that the engine will compute.

Begin with `encoder`: it holds the tokenizer and the chat templates of one model and runs long
work in threads. `bodies` reads the prompt from a body, `chat_template` renders chats, and
`text_encoder` turns text into ids, by way of pieces and words whose ids are known. A prompt
without tokens has one of the `reasons`. `tokenizer_files` reads a model's folder.
Nothing here does network I/O or knows a worker.
"""

__all__ = ["bodies", "encoder", "errors", "reasons"]
