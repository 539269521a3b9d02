"""The experts of a mixture: what of them a run neither adapts nor holds in few bits, and whether it does both."""

from torch import nn

from kajiya.models.adapter_targets import expert_names
from kajiya.models.injection import is_of_parameter, layers
from kajiya.models.quantized import count_params, is_quantized


def left_out(module: nn.Module) -> str:
    """What of a mixture's frozen experts, which are no linear layers, stands not in few bits where these do, or beside no adapter
    where these stand beside one. Empty where there is no such.
    """
    names = expert_names(module)
    experts = {name: each for name, each in module.named_parameters() if name in names and not each.requires_grad}
    adapted = {id(part.get_param()) for part in layers(module) if is_of_parameter(part)}
    said = []
    if any(is_quantized(each) for each in module.parameters()):
        said.append(([name for name, each in experts.items() if not is_quantized(each)], "quantized"))
    if "peft_config" in vars(module):
        said.append(([name for name, each in experts.items() if id(each) not in adapted], "adapted"))
    n_all = count_params(module)
    words = []
    for left, what in said:
        if left:
            share = 100 * sum(experts[name].numel() for name in left) / n_all
            first = left[0].replace(".base_layer", "")
            words.append(f"{share:.0f} % of them are experts that are not {what} ({first} and {len(left) - 1} more)")
    return "; ".join(words)


def has_adapted_bits(module: nn.Module) -> bool:
    """Whether experts in few bits have an adapter, which PEFT puts in and takes out of them at every pass."""
    return any(is_of_parameter(part) and is_quantized(part.get_param()) for part in layers(module))
