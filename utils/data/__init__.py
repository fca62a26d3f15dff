"""From raw downloads to batches: reformatting, mixing, tokenization, collation. Imports only `utils.io`."""
