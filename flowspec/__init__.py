"""flowspec: one request to a large language model, fast, on several small devices."""

from typing import Any

from flowspec.errors import RankLost, UserError
from flowspec.version import __version__


def __getattr__(name: str) -> Any:
    """`flowspec.Engine` without importing torch before it is needed."""
    if name in ("Engine", "Result", "Token"):
        from flowspec import engine

        return getattr(engine, name)
    if name == "serve":
        from flowspec.rank import serve

        return serve
    raise AttributeError(f"module 'flowspec' has no attribute {name!r}")


__all__ = ["Engine", "RankLost", "Result", "Token", "UserError", "__version__", "serve"]
