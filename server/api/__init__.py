"""gRPC to engine and back: translation only."""
