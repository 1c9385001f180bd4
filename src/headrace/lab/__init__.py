"""The measuring tools: they start a model, a service or a peer, ask it, and report figures.

`drive` starts and ends anything, `http` asks over HTTP, `load` asks from a process of its own;
`bench`, `tune` and `cases` are what `headrace bench`, `tune` and `check-engine` run.
"""
