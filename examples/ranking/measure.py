"""How often the item that a held-out reader opened is the likeliest of seven: by the base, and by the adapter."""

import json
import os
from pathlib import Path

import grpc

from weft.v1 import inference_pb2 as pb
from weft.v1 import inference_pb2_grpc


def main() -> None:
    """Ask once a reader and adapter."""
    readers = [json.loads(line) for line in Path("held-out.jsonl").read_text().splitlines()]
    with grpc.insecure_channel(os.environ.get("WEFT_ADDRESS", "127.0.0.1:50051")) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        for adapter in ("", "reader"):
            num_right = 0
            for reader in readers:
                request = pb.ScoreRequest(adapter_id=adapter, text=reader["prompt"], continuations=reader["choices"])
                logprobs = [scored.logprob for scored in stub.Score(request).scores]
                num_right += reader["choices"][logprobs.index(max(logprobs))] == reader["completion"]
            print(f"{adapter or 'the base'}: {num_right / len(readers):.2f} of {len(readers)} readers")


if __name__ == "__main__":
    main()
