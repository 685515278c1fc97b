"""The layers between a question and the pool: memo, cache, shared calls, fallback."""
