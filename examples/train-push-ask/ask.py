"""Asks the adapter `code` over and over, until its second version has given 100 answers.

The tickets are such as no training saw. Prints how many answers each version gave, and the share that is right.
"""

import os

import grpc
from codes import tickets

from weft.demo.tasks import HELD_OUT, prompt
from weft.v1 import inference_pb2 as pb2
from weft.v1 import inference_pb2_grpc

ENOUGH = 100

answers: dict[str, list[bool]] = {}
with grpc.insecure_channel(os.environ.get("WEFT_ADDRESS", "127.0.0.1:50051")) as channel:
    stub = inference_pb2_grpc.InferenceServiceStub(channel)
    for ticket, code in tickets(HELD_OUT):
        response = stub.Generate(pb2.GenerateRequest(adapter_id="code", text=prompt(ticket)))
        given = answers.setdefault(response.adapters[0].digest, [])
        given.append(response.text == code)
        if len(answers) > 1 and len(given) == ENOUGH:
            break
for digest, given in answers.items():
    print(f"{digest}: {len(given)} answers, {sum(given) / len(given):.2f} right")
