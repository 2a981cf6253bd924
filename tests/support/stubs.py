"""Stubs of every service over one channel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import grpc

from weft.v1 import adapter_pb2_grpc, inference_pb2_grpc, server_pb2_grpc


@dataclass(frozen=True)
class Stubs:
    """Each service, asked over the channel."""

    channel: grpc.Channel

    @property
    def inference(self) -> Any:
        return inference_pb2_grpc.InferenceServiceStub(self.channel)

    @property
    def adapters(self) -> Any:
        return adapter_pb2_grpc.AdapterServiceStub(self.channel)

    @property
    def info(self) -> Any:
        return server_pb2_grpc.ServerServiceStub(self.channel)
