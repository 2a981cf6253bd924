"""The engine: one thread, one model, many adapters. It knows nothing of gRPC."""
