# docker build --target cpu -t weft:cpu .
# docker run -p 50051:50051 -p 9090:9090 -v /srv/models:/models:ro weft:cpu \
#     serve --model /models/base --host 0.0.0.0 --allow-anonymous

# Has the compiler that the C library of kernels/ is built with; the images below only get the wheel.
FROM python:3.11-bookworm AS build
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
WORKDIR /src
COPY . .
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels . && \
    python -m zipfile --list /wheels/*.whl | grep weft/kernels/_native_

FROM python:3.11-slim-bookworm AS base
LABEL org.opencontainers.image.title="Weft" \
      org.opencontainers.image.description="One frozen base model and many LoRA adapters in the same batch, over gRPC" \
      org.opencontainers.image.licenses="Apache-2.0"
RUN useradd --create-home --uid 1000 weft
WORKDIR /home/weft
EXPOSE 50051 9090 50052
ENTRYPOINT ["weft"]
CMD ["--help"]

# PyPI's PyTorch for Linux is the CUDA build; uv takes the CPU build from PyTorch's own index. Compiled to bytecode here:
# a read-only root file system has no place for it later.
FROM base AS cpu
RUN --mount=from=build,target=/build \
    pip install --no-cache-dir --constraint /build/src/constraints.txt uv && \
    uv pip install --system --no-cache --compile-bytecode --torch-backend cpu \
        --constraint /build/src/constraints.txt /build/wheels/*.whl
USER 1000:1000

# The CUDA build holds the CUDA libraries and only wants the host's driver. Triton compiles its
# launchers at run time.
FROM base AS cuda
# hadolint ignore=DL3008
RUN apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
RUN --mount=from=build,target=/build \
    pip install --no-cache-dir --constraint /build/src/constraints.txt /build/wheels/*.whl
USER 1000:1000
