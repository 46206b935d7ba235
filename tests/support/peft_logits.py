"""What the PEFT library makes of a base model and a directory of adapters, beside the merged model.

    python -m tests.support.peft_logits BASE PEFT MERGED

One JSON object: parameters that PEFT has loaded as adapters, how far they move the base model's logits, and how far
these are from the merged model's, with the adapters beside the weights and added to them. Run by itself: PEFT is in a
folder that no other process finds.
"""

from __future__ import annotations

import json
import sys


def main(base: str, adapters: str, merged: str) -> None:
    """Prints it."""
    import torch
    from peft import PeftModel  # pyright: ignore[reportMissingImports]
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    ids = torch.randint(0, 500, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)(ids).logits
        plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        before = plain(ids).logits
        model = PeftModel.from_pretrained(plain, adapters)
        loaded = sum(p.numel() for name, p in model.named_parameters() if "lora_" in name)
        beside = model(ids).logits
        inside = model.merge_and_unload()(ids).logits
    found = {"moved": beside - before, "beside": beside - expected, "inside": inside - expected}
    print(json.dumps({"loaded": loaded} | {name: float(apart.abs().max()) for name, apart in found.items()}))


if __name__ == "__main__":
    main(*sys.argv[1:])
