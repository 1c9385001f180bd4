"""The measuring tools: they start a model, a service or a peer, put load on it, and report figures.

`drive` starts and ends programs, `http` is a client, `load` a client in a process of its own;
`bench`, `tune` and `cases` are what `headrace bench`, `tune` and `check-engine` run.
"""
