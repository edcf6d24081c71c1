"""Run by torchrun (tests/test_parallel.py): what each process of a tensor-parallel model says, as a line of JSON each."""

from __future__ import annotations

import json
import os
import sys

import torch
from conftest import token_ids
from transformers import AutoModelForCausalLM

from streaming_llm import ADMSConfig, enable_adms_llm

SMALL = {
    "start_size": 2, "recent_size": 16, "compressed_budget": 12, "compression_interval": 8, "rank": 8,
    "attention_window": 16, "min_middle_size_for_compress": 0,
}  # fmt: skip
PLUS = ADMSConfig.adm_plus_plus(**SMALL, sketch_budget=4, replay_budget=2, energy_replay_threshold=1.0)
CASES = {
    "below the bound": (ADMSConfig(**SMALL), 10, 20),
    "base": (ADMSConfig(**SMALL), 60, 60),
    "adm++": (PLUS, 60, 60),
    "adm++ below the bound": (PLUS, 10, 20),
}


def say(model) -> dict[str, list[int]]:
    """The tokens generated in each case."""
    said = {}
    for name, (config, tokens, new) in CASES.items():
        ids, cache = token_ids(tokens), enable_adms_llm(model, config)
        whole = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, min_new_tokens=new, past_key_values=cache
        )
        said[name] = whole[0, tokens:].tolist()
        assert cache.layers[0].stack.compacted == (tokens > 10)
    return said


if __name__ == "__main__":
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1], tp_plan="auto", dtype=torch.float32).eval()
    said = say(model)
    refused = []
    for settings in ({"use_adaptive_budget": True}, {"enable_adaptive_controller": True, "controller_scope": "layer"}):
        try:
            enable_adms_llm(model, **SMALL, **settings)
        except ValueError as error:
            refused.append(str(error))
    heads = enable_adms_llm(model, **SMALL)
    model(token_ids(5), past_key_values=heads)
    mine = {"said": said, "refused": refused, "heads": heads.layers[0].keys.shape[1]}
    everyone = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, mine)
    if torch.distributed.get_rank() == 0:
        sys.stdout.write("\n" + json.dumps(everyone) + "\n")
        sys.stdout.flush()
    torch.distributed.barrier()
    # All is said. The ordinary way out aborts one time in twenty with gloo and transformers 5.2, whatever the cache is.
    os._exit(0)
