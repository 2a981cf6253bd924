"""OpenVINO GenAI, on a model exported by optimum-intel.

One generate an adapter: with sixteen configurations in one call every row ran under the first, without a word (2026.4).
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy
import openvino
import openvino_genai
from openvino_genai import Adapter, AdapterConfig, GenerationConfig, LLMPipeline, TokenizedInputs
from protocol import Answer, Job, Setup, Tokens, serve

SCALE = 2.0
"""lora_alpha / r of the benchmark's adapters: GenAI reads the weights alone."""


def load(setup: Setup) -> tuple[str, Answer]:
    model = export(setup)
    options = {
        "INFERENCE_PRECISION_HINT": {"float32": "f32", "bfloat16": "bf16"}[setup.dtype],
        "INFERENCE_NUM_THREADS": setup.threads,
    }
    adapters = {name: Adapter(str(Path(path) / "adapter_model.safetensors")) for name, path in setup.adapters.items()}
    plain = LLMPipeline(str(model), "CPU", **options)
    adapted = LLMPipeline(str(model), "CPU", adapters=config(*adapters.values()), **options)

    def answer(job: Job) -> Tokens:
        parts = {}
        for name, rows in job.groups().items():
            wanted = GenerationConfig(max_new_tokens=job.new_tokens, min_new_tokens=job.new_tokens, ignore_eos=True)
            if name:
                wanted.adapters = config(adapters[name])
            ids = numpy.array([job.prompts[row] for row in rows], dtype=numpy.int64)
            inputs = TokenizedInputs(openvino.Tensor(ids), openvino.Tensor(numpy.ones_like(ids)))
            parts[name] = (adapted if name else plain).generate(inputs, wanted).tokens
        return job.gather(parts)

    return f"openvino-genai {openvino_genai.__version__}", answer


def config(*adapters: Adapter) -> AdapterConfig:
    made = AdapterConfig()
    for adapter in adapters:
        made.add(adapter, SCALE)
    return made


def export(setup: Setup) -> Path:
    """The model in OpenVINO's format, made once."""
    folder = Path(setup.scratch) / f"openvino-{setup.dtype}"
    if not (folder / "openvino_model.xml").exists():
        weights = {"float32": "fp32", "bfloat16": "fp16"}[setup.dtype]
        task = ("--task", "text-generation-with-past", "--weight-format", weights)
        tool = Path(sys.executable).with_name("optimum-cli")
        subprocess.run([tool, "export", "openvino", "-m", setup.base, *task, folder], check=True)
    return folder


if __name__ == "__main__":
    serve(load)
