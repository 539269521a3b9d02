"""`generate` of Transformers, all streams in one batch: tokens a second by number of streams, from one JSON order."""

import json
import sys

import torch
from prompts import prompts, seconds
from transformers import AutoModelForCausalLM


@torch.inference_mode()
def main() -> None:
    order = json.loads(sys.argv[1])
    torch.set_num_threads(order["threads"])
    device = order.get("device", "cpu")
    model = (
        AutoModelForCausalLM.from_pretrained(order["folder"], dtype=getattr(torch, order["precision"]))
        .eval()
        .to(device)
    )
    found = {}
    settings = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    model.generate(torch.tensor([[1, 2, 3]], device=device), max_new_tokens=4, **settings)
    for n in order["streams"]:
        ids = torch.tensor(prompts(order, n), device=device)
        begun = seconds(order)
        model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=order["new_tokens"], **settings
        ).tolist()
        found[n] = n * order["new_tokens"] / (seconds(order) - begun)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
