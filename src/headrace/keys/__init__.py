"""API keys in a database: SQLite, or PostgreSQL that several services share.

`Keeper` is what a service uses: it has the keys in memory and one connection, in a thread.
`KeyBook` is the database by its tables, for the command line and the Keeper.
"""
