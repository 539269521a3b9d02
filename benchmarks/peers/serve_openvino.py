"""OpenVINO GenAI's continuous batching in process; the model is converted by optimum-intel first.

Prints tokens a second by number of streams, from one JSON order.
"""

import json
import sys
from pathlib import Path

import numpy as np
import openvino as ov
import openvino_genai as genai
from prompts import tell


def convert(order: dict) -> Path:
    """The model in OpenVINO's format, weights in f16 or int8, with its tokenizer."""
    from openvino_tokenizers import convert_tokenizer
    from optimum.intel import OVModelForCausalLM
    from transformers import AutoTokenizer

    to = Path(order["scratch"]) / f"openvino-{order['weights']}"
    if not (to / "openvino_tokenizer.xml").exists():
        model = OVModelForCausalLM.from_pretrained(
            order["folder"], export=True, compile=False, load_in_8bit=order["weights"] == "int8"
        )
        model.save_pretrained(to)
        tokenizer = AutoTokenizer.from_pretrained(order["folder"])
        one, other = convert_tokenizer(tokenizer, with_detokenizer=True)
        ov.save_model(one, to / "openvino_tokenizer.xml")
        ov.save_model(other, to / "openvino_detokenizer.xml")
    return to


def main() -> None:
    order = json.loads(sys.argv[1])
    folder = convert(order)
    settings = genai.SchedulerConfig()
    settings.cache_size = 1  # GB
    settings.max_num_batched_tokens = 2048
    settings.max_num_seqs = 64
    settings.dynamic_split_fuse = True
    properties = {
        "INFERENCE_NUM_THREADS": order["threads"],
        "INFERENCE_PRECISION_HINT": order["precision"],
    }
    pipe = genai.ContinuousBatchingPipeline(str(folder), settings, "CPU", properties)
    config = genai.GenerationConfig()
    config.max_new_tokens, config.do_sample, config.ignore_eos = order["new_tokens"], False, True
    config.eos_token_id = 0

    def answer(ids: list[list[int]]) -> int:
        given = [ov.Tensor(np.array([one], dtype=np.int64)) for one in ids]
        found = pipe.generate(given, [config] * len(given))
        return sum(len(one.m_generation_ids[0]) for one in found)

    answer([[1, 2, 3]])
    tell(order, answer)


if __name__ == "__main__":
    main()
