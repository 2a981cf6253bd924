"""Load against a running server, and what its clients see of it. Knows the contract, and nothing of the server."""
