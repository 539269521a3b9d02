"""`generate` of Transformers, all streams in one batch: tokens a second by number of streams, from one JSON order."""

import json
import sys

import torch
from prompts import tell
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
    settings = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    model.generate(torch.tensor([[1, 2, 3]], device=device), max_new_tokens=4, **settings)

    def answer(ids: list[list[int]]) -> int:
        given = torch.tensor(ids, device=device)
        mask = torch.ones_like(given)
        texts = model.generate(given, attention_mask=mask, max_new_tokens=order["new_tokens"], **settings).tolist()
        return sum(len(text) - len(one) for text, one in zip(texts, ids, strict=True))

    tell(order, answer)


if __name__ == "__main__":
    main()
