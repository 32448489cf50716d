"""The server: OpenAI's HTTP interface, and two thin adapters, over an Engine.

`asked` is what a client may send, `calls` the texts that are being made of it, `answers` what is
sent back, `app` the routes, `guard` what stands before them, `metrics` what is counted, `server`
the thread in which all of it runs. It needs the extra `serve` (FastAPI, uvicorn)."""
