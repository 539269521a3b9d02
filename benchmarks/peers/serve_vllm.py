"""vLLM in process, offline, on a GPU: tokens a second by number of streams, from one JSON order."""

import json
import sys

from prompts import tell
from vllm import LLM, SamplingParams


def main() -> None:
    order = json.loads(sys.argv[1])
    engine = LLM(
        model=order["folder"],
        dtype=order["precision"],
        skip_tokenizer_init=True,
        max_num_seqs=64,
        max_model_len=2048,
        disable_log_stats=True,
    )
    params = SamplingParams(max_tokens=order["new_tokens"], temperature=0, ignore_eos=True, detokenize=False)

    def answer(ids: list[list[int]]) -> int:
        found = engine.generate([{"prompt_token_ids": one} for one in ids], params, use_tqdm=False)
        return sum(len(one.outputs[0].token_ids) for one in found)

    tell(order, answer, is_warmed=True)


if __name__ == "__main__":
    main()
