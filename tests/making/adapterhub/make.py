"""Makes the folders beside it: adapters as AdapterHub's library saves them, and the logits that it computes with them.

pip install adapters==1.3.0      # in an environment of its own
PYTHONPATH=tests/support python tests/making/adapterhub/make.py
"""

import torch
from adapterhub import FOLDER, LOGITS, PROMPT, fill, make_plain
from safetensors.torch import save_file

import adapters
from adapters import AdapterPlusConfig, DoubleSeqBnConfig, ParBnConfig, SeqBnConfig

CONFIGS = {
    "pfeiffer": SeqBnConfig(reduction_factor=2),
    "pfeiffer-both": SeqBnConfig(
        mh_adapter=True, reduction_factor={"0": 2, "default": 4}, non_linearity="gelu", scaling="learned"
    ),
    "houlsby": DoubleSeqBnConfig(reduction_factor=4),
    "parallel": ParBnConfig(reduction_factor=2),
    "parallel-both": ParBnConfig(mh_adapter=True, reduction_factor=2, non_linearity="tanh", scaling=0.5),
    "plus": AdapterPlusConfig(reduction_factor=2, stochastic_depth=0.0, leave_out=[0]),
    "pickle": SeqBnConfig(reduction_factor=4, non_linearity="leakyrelu"),
}

OF_KIND = {"llama": tuple(CONFIGS), "gpt2": ("houlsby", "parallel", "pfeiffer-both")}

for kind, names in OF_KIND.items():
    logits = {}
    for name in names:
        model = make_plain(kind)
        adapters.init(model)
        model.add_adapter(name, config=CONFIGS[name])
        model.set_active_adapters(name)
        fill([entry for entry in model.named_parameters() if f".adapters.{name}." in entry[0]], 0.7)
        with torch.inference_mode():
            logits[name] = model.eval()(input_ids=torch.tensor([PROMPT]), use_cache=False).logits[0].contiguous()
        folder = FOLDER / kind / name
        folder.mkdir(parents=True, exist_ok=True)
        model.save_adapter(str(folder), name, with_head=False, use_safetensors=name != "pickle")
    save_file(logits, FOLDER / kind / LOGITS)
