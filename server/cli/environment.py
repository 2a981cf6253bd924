"""Imported before gRPC, which reads this while it is imported: a failed TLS handshake would log a line of its own."""

from __future__ import annotations

import os

os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
