"""Containers, headers, streaming reads and the ledger: what is in the files, not what it means."""
