"""One process, no ranks: algorithms that need none, over the same models, caches and sampling."""
