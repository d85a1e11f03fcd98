"""A server that speaks as OpenAI's completions do (docs/interop.md)."""
