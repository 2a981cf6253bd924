"""transformers and PEFT. Modes: generate (base; adapters by PEFT's mixed batch), merge (one at a time), continuous."""

from __future__ import annotations

import peft
import torch
import transformers
from peft import PeftModel
from protocol import Answer, Job, NotSupported, Setup, Tokens, serve
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig, PreTrainedModel


def load(setup: Setup) -> tuple[str, Answer]:
    torch.set_num_threads(setup.threads)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    version = f"transformers {transformers.__version__}, peft {peft.__version__}"
    return version, {"generate": mixed, "merge": merged, "continuous": continuous}[setup.mode](setup)


def read(setup: Setup, **options: object) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(setup.base, dtype=getattr(torch, setup.dtype), **options).eval()


def read_adapted(setup: Setup) -> PeftModel:
    """All adapters on one base, in its dtype."""
    first, *others = setup.adapters
    model = PeftModel.from_pretrained(
        read(setup), setup.adapters[first], adapter_name=first, autocast_adapter_dtype=False
    )
    for name in others:
        model.load_adapter(setup.adapters[name], adapter_name=name, autocast_adapter_dtype=False)
    return model.to(getattr(torch, setup.dtype)).eval()


def generate(model: PreTrainedModel | PeftModel, prompts: Tokens, new_tokens: int, **options: object) -> Tokens:
    ids = torch.tensor(prompts)
    with torch.inference_mode():
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            min_new_tokens=new_tokens,
            max_new_tokens=new_tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            **options,
        )
    return [row[len(prompts[0]) :] for row in out.tolist()]


def mixed(setup: Setup) -> Answer:
    plain, adapted = read(setup), read_adapted(setup)

    def answer(job: Job) -> Tokens:
        if not any(job.adapters):
            return generate(plain, job.prompts, job.new_tokens)
        names = [name or "__base__" for name in job.adapters]
        return generate(adapted, job.prompts, job.new_tokens, adapter_names=names)

    return answer


def merged(setup: Setup) -> Answer:
    """What serving without mixed batches costs: merge an adapter, generate what is asked of it, take it out again."""
    model = read_adapted(setup)

    def answer(job: Job) -> Tokens:
        parts = {}
        for name, rows in job.groups().items():
            if not name:
                raise NotSupported("the base is transformers' own")
            model.set_adapter(name)
            model.merge_adapter([name])
            parts[name] = generate(model, [job.prompts[row] for row in rows], job.new_tokens)
            model.unmerge_adapter()
        return job.gather(parts)

    return answer


def continuous(setup: Setup) -> Answer:
    """transformers' own continuous batching."""
    model = read(setup, attn_implementation="sdpa")
    # Unset, its cache takes most of the machine's memory, anew for each call.
    cache = ContinuousBatchingConfig(
        num_blocks=32, max_batch_tokens=1024, max_requests_per_batch=16, allow_block_sharing=False
    )

    def answer(job: Job) -> Tokens:
        if any(job.adapters):
            raise NotSupported("one model for all")
        config = GenerationConfig(max_new_tokens=job.new_tokens, do_sample=False, eos_token_id=-1, pad_token_id=0)
        outputs = model.generate_batch(
            job.prompts, generation_config=config, continuous_batching_config=cache, persistent_manager=True
        )
        by_prompt = {tuple(output.prompt_ids): output.generated_tokens for output in outputs.values()}
        return [by_prompt[tuple(prompt)] for prompt in job.prompts]

    return answer


if __name__ == "__main__":
    serve(load)
