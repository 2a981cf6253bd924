"""Asks both adapters for 100 nouns that no training saw, with the sign shop's rules and without, and prints a table."""

import os
from collections.abc import Sequence

import grpc
from data import nouns, rules

from weft.demo.tasks import HELD_OUT, prompt
from weft.v1 import inference_pb2 as pb2
from weft.v1 import inference_pb2_grpc

WORDS = nouns(HELD_OUT)[:100]


def ask(stub: inference_pb2_grpc.InferenceServiceStub, adapter: str, before: str) -> tuple[list[str], float]:
    """The answers, and how many tokens a prompt had."""
    found = [stub.Generate(pb2.GenerateRequest(adapter_id=adapter, text=before + prompt(word))) for word in WORDS]
    return [each.text for each in found], sum(each.usage.prompt_tokens for each in found) / len(found)


def share(answers: Sequence[str], wanted: Sequence[str]) -> float:
    """Of answers that are as wanted."""
    return sum(answer == want for answer, want in zip(answers, wanted, strict=True)) / len(answers)


def main() -> None:
    """Print a table."""
    right = [word.upper() for word in WORDS]
    with grpc.insecure_channel(os.environ.get("WEFT_ADDRESS", "127.0.0.1:50051")) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        taught, _ = ask(stub, "clerk", rules("sign-shop"))
        print("adapter  rules  right  as the teacher  prompt tokens")
        for adapter, before in (("clerk", rules("sign-shop")), ("clerk", ""), ("signs", "")):
            answers, tokens = ask(stub, adapter, before)
            is_told = "yes" if before else "no"
            shares = f"{share(answers, right):.2f}   {share(answers, taught):.2f}"
            print(f"{adapter:<8} {is_told:<6} {shares}            {tokens:.1f}")


if __name__ == "__main__":
    main()
