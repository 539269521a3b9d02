"""Joined blocks and their C++ operators: equal to Transformers' code and to the formulas, forward and backward."""

import copy
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from kajiya.config.options import NextTokenLoss
from kajiya.data.batch import NO_TARGET, Batch
from kajiya.models import fused
from kajiya.models.attention import PACKED_SDPA, first_keys, register_packed_sdpa, seen_from, segment_mask
from kajiya.models.fused import fuse_blocks
from kajiya.models.hidden import last_hidden
from kajiya.models.native import operators, pointwise
from kajiya.models.native.library import native_problem
from kajiya.models.quantized import quantize
from kajiya.training.losses.next_token import next_token

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(native_problem() is not None, reason="no C++ compiler")


def make_model(architecture: str = "llama", dtype: torch.dtype = torch.float32, **fields: Any) -> Any:
    register_packed_sdpa()
    sizes = {
        "vocab_size": 96,
        "hidden_size": 64,
        "intermediate_size": 112,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 256,
    }
    torch.manual_seed(3)
    config = AutoConfig.for_model(architecture, **sizes | fields)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=PACKED_SDPA, dtype=torch.float32).train()
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            nn.init.uniform_(module.weight, 0.5, 1.5)
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.15)
            if module.bias is not None:
                nn.init.normal_(module.bias, std=0.3)
    return model.to(dtype)


WINDOWS = ["sliding_attention", "full_attention"]
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama with biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral with a window": ("mistral", {"sliding_window": 8}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
    "qwen3 with windows": ("qwen3", {"layer_types": WINDOWS, "sliding_window": 8, "use_sliding_window": True}),
    "gemma": ("gemma", {}),
    "gemma3": ("gemma3_text", {"layer_types": WINDOWS, "sliding_window": 8, "query_pre_attn_scalar": 20}),
}


def make_family(name: str, dtype: torch.dtype = torch.float32) -> Any:
    architecture, fields = FAMILIES[name]
    return make_model(architecture, dtype, **fields)


def make_batch(lengths: tuple[int, ...] = (17, 3, 20, 1, 33), rows: int = 2) -> Batch:
    generator = torch.Generator().manual_seed(5)
    n_tokens = sum(lengths)
    tokens = torch.randint(0, 96, (rows, n_tokens), generator=generator)
    segments = torch.cat([torch.full((n,), i) for i, n in enumerate(lengths)]).expand(rows, -1).contiguous()
    positions = torch.cat([torch.arange(n) for n in lengths]).expand(rows, -1).contiguous()
    targets = tokens.roll(-1, dims=1)
    targets[:, torch.tensor(lengths).cumsum(0) - 1] = NO_TARGET
    return Batch(tokens, targets, positions, segments, int((targets >= 0).sum()))


def step(model: Any, batch: Batch) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad()
    terms, _ = next_token(model, batch, NextTokenLoss(chunk_tokens=40))
    (terms["loss"][0] / batch.n_targets).backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return float(terms["loss"][0].detach()) / batch.n_targets, grads


def assert_close(ours: torch.Tensor, truth: torch.Tensor, tolerance: float) -> None:
    assert ours.shape == truth.shape
    ours, truth = ours.detach(), truth.detach()
    difference = (ours.double() - truth.double()).abs().max() / truth.double().abs().max().clamp_min(1e-6)
    assert float(difference) < tolerance


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_are_those_of_transformers(family: str) -> None:
    model, batch = make_family(family), make_batch()
    truth = copy.deepcopy(model).double()
    truth.set_attn_implementation("eager")
    wanted_loss, wanted = step(truth, batch)
    assert fuse_blocks(model, torch.float32, CPU, is_autocast=False) == "yes: 2 blocks"
    loss, grads = step(model, batch)
    assert loss == pytest.approx(wanted_loss, rel=1e-5)
    assert grads.keys() == wanted.keys()
    for name, grad in grads.items():
        assert_close(grad, wanted[name], 1e-4)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma3"])
def test_bf16_is_as_near_to_the_truth_as_transformers_code_is(family: str) -> None:
    batch = make_batch()
    truth_loss, truth = step(make_family(family).double(), batch)
    plain_loss, plain = step(make_family(family, torch.bfloat16), batch)
    model = make_family(family, torch.bfloat16)
    assert fuse_blocks(model, torch.bfloat16, CPU, is_autocast=False).startswith("yes")
    loss, grads = step(model, batch)
    assert abs(loss - truth_loss) < 2 * abs(plain_loss - truth_loss) + 5e-3

    def distance(found: dict[str, torch.Tensor]) -> float:
        return sum(float((found[n].double() - g.double()).norm() / g.double().norm()) for n, g in truth.items())

    assert distance(grads) < 1.1 * distance(plain)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3"])
def test_parameters_keep_names_values_and_updates_in_place(family: str) -> None:
    model, batch = make_family(family), make_batch()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    fuse_blocks(model, torch.float32, CPU, is_autocast=False)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    first, _ = step(model, batch)
    with torch.no_grad():
        model.model.layers[0].mlp.gate_proj.weight.mul_(1.5)
    other = make_family(family)
    with torch.no_grad():
        other.model.layers[0].mlp.gate_proj.weight.mul_(1.5)
    assert step(model, batch)[0] == pytest.approx(step(other, batch)[0], rel=1e-5) != first


def test_matrices_that_were_moved_apart_are_joined_by_a_copy() -> None:
    model, batch = make_model(), make_batch()
    fuse_blocks(model, torch.float32, CPU, is_autocast=False)
    wanted, _ = step(model, batch)
    attention = model.model.layers[1].self_attn
    attention.v_proj.weight.data = attention.v_proj.weight.detach().clone()
    assert step(model, batch)[0] == pytest.approx(wanted, rel=1e-6)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT's own call
@pytest.mark.parametrize(
    ("family", "targets", "dropout"),
    [
        *(("llama", targets, 0.0) for targets in (["q_proj", "v_proj"], "all-linear", ["down_proj", "k_proj"])),
        ("llama", "all-linear", 0.5),
        ("llama with biases", "all-linear", 0.0),
        ("qwen2", ["q_proj", "v_proj"], 0.0),
        ("qwen3", "all-linear", 0.0),
        ("gemma3", "all-linear", 0.0),
        ("gemma3", ["down_proj", "k_proj"], 0.0),
    ],
)
def test_adapters_on_frozen_matrices_learn_the_same(family: str, targets: Any, dropout: float) -> None:
    from peft import LoraConfig, get_peft_model

    def make() -> Any:
        torch.manual_seed(7)
        config = LoraConfig(
            r=4,
            lora_alpha=6,
            target_modules=targets,
            init_lora_weights=False,
            lora_dropout=dropout,
            task_type="CAUSAL_LM",
        )
        model = get_peft_model(make_family(family), config).get_base_model()
        return model.eval() if dropout else model  # dropout is off in evaluation, and then the parts are joined too

    batch, model, plain = make_batch(), make(), make()
    plain.set_attn_implementation("eager")
    assert fuse_blocks(model, torch.float32, CPU, is_autocast=False).startswith("yes")
    wanted_loss, wanted = step(plain, batch)
    loss, grads = step(model, batch)
    assert loss == pytest.approx(wanted_loss, rel=1e-5)
    assert grads.keys() == wanted.keys() != set()
    for name, grad in grads.items():
        assert_close(grad, wanted[name], 1e-4)


def test_segments_do_not_see_each_other() -> None:
    model = make_model()
    fuse_blocks(model, torch.float32, CPU, is_autocast=False)
    packed, alone = make_batch((17, 20), rows=1), make_batch((17, 20), rows=1)
    second = slice(17, 37)
    single = Batch(
        alone.tokens[:, second], alone.targets[:, second], alone.positions[:, second], alone.segments[:, second] * 0, 19
    )
    assert_close(last_hidden(model, packed)[:, second], last_hidden(model, single), 1e-5)


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"head_dim": 16}, "heads of width 16"),
        ({"attention_dropout": 0.1}, "dropout"),
        ({"hidden_act": "gelu"}, "gate's function"),
        ({"hidden_size": 72, "head_dim": 32}, "multiples of 16"),
    ],
)
def test_a_block_that_does_not_fit_is_left_and_said(fields: dict[str, Any], why: str) -> None:
    model = make_model(**fields)
    said = fuse_blocks(model, torch.float32, CPU, is_autocast=False)
    assert said.startswith("no: ")
    assert why in said
    assert "forward" not in vars(model.model.layers[0])


def test_blocks_of_torchaos_weights_are_left_and_said() -> None:
    """Those between adapters, too: a product without one is a plain linear layer with weights of another kind."""
    model = make_model()
    quantize(model, "torchao-int8")
    assert "torchao's weights" in fuse_blocks(model, torch.float32, CPU, is_autocast=False)
    assert "forward" not in vars(model.model.layers[0])


def test_another_architecture_autocast_and_a_missing_compiler_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "no architecture" in fuse_blocks(make_model("olmo2"), torch.float32, CPU, is_autocast=False)
    assert "precision" in fuse_blocks(make_model(), torch.float32, CPU, is_autocast=True)
    monkeypatch.setattr(fused, "native_problem", lambda: "no C++ compiler was found")
    assert fuse_blocks(make_model(), torch.float32, CPU, is_autocast=False) == "no: no C++ compiler was found"


def test_a_form_that_gives_another_result_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model()
    monkeypatch.setattr(fused, "_chain", lambda layer, hidden, first, angles: hidden * 1.01)
    assert "another result" in fuse_blocks(model, torch.float32, CPU, is_autocast=False)
    assert "forward" not in vars(model.model.layers[0])


@pytest.mark.parametrize("selective", [False, True])
def test_activations_made_again_give_the_same_gradients(selective: bool) -> None:
    from kajiya.training.recompute import recompute_activations

    model, plain, batch = make_model(), make_model(), make_batch()
    recompute_activations(model, "selective" if selective else "full", CPU)
    for each in (model, plain):
        assert fuse_blocks(each, torch.float32, CPU, is_autocast=False).startswith("yes")
    wanted, grads = step(plain, batch)[1], step(model, batch)[1]
    for name, grad in grads.items():
        assert torch.equal(grad, wanted[name])
    assert kept_bytes(model, batch) < 0.5 * kept_bytes(plain, batch)


def kept_bytes(model: Any, batch: Batch) -> int:
    """Memory of what the forward pass keeps for the backward pass, the weights included."""
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        next_token(model, batch, NextTokenLoss())
    return sum(kept.values())


def test_a_call_with_a_cache_goes_through_transformers() -> None:
    model = make_model().eval()
    ids = torch.arange(1, 9)[None]
    wanted = model.generate(ids, max_new_tokens=5, do_sample=False, use_cache=True)
    fuse_blocks(model, torch.float32, CPU, is_autocast=False)
    assert torch.equal(model.generate(ids, max_new_tokens=5, do_sample=False, use_cache=True), wanted)


def test_first_keys_are_the_mask() -> None:
    segments = make_batch().segments
    wanted = segment_mask(segments)
    assert wanted is not None
    assert torch.equal(seen_from(first_keys(segments)[:, 0, 0]), wanted)


HEADS = [
    pytest.param((2, 4, 2, 70, 32), 29, id="groups"),
    pytest.param((1, 2, 1, 513, 64), 1000, id="two chunks of keys"),
    pytest.param((2, 2, 2, 300, 16), 280, id="narrow heads"),
    pytest.param((1, 3, 3, 33, 96), 7, id="short segments"),
]


@pytest.mark.parametrize(("shape", "segment"), HEADS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_attention_is_the_formula(shape: tuple[int, ...], segment: int, dtype: torch.dtype, tolerance: float) -> None:
    n_rows, n_heads, n_kv, n_tokens, width = shape
    torch.manual_seed(0)
    own = [
        torch.randn(n_rows, n_tokens, n, width).to(dtype).transpose(1, 2).requires_grad_()
        for n in (n_heads, n_kv, n_kv)
    ]
    first = (torch.arange(n_tokens) // segment * segment).to(torch.int32).expand(n_rows, -1).contiguous()
    out, _ = operators.attention(*own, first, 0.2)
    grad = torch.randn_like(out)
    out.backward(grad)
    q, k, v = (each.detach().double().requires_grad_() for each in own)
    scores = q @ k.repeat_interleave(n_heads // n_kv, 1).transpose(2, 3) * 0.2
    weights = scores.masked_fill(~seen_from(first), -torch.inf).softmax(-1)
    wanted = (weights @ v.repeat_interleave(n_heads // n_kv, 1)).transpose(1, 2)
    wanted.backward(grad.double())
    assert_close(out, wanted, tolerance)
    for mine, theirs in zip(own, (q, k, v), strict=True):
        assert mine.grad is not None
        assert_close(mine.grad, theirs.grad, tolerance)


def test_results_do_not_depend_on_the_number_of_threads() -> None:
    torch.manual_seed(0)
    first = (torch.arange(70) // 9 * 9).to(torch.int32).expand(2, -1).contiguous()
    heads, x = torch.randn(2, 4, 70, 32), torch.randn(77, 64)
    n_threads, results = torch.get_num_threads(), []
    try:
        for n in (1, 3):
            torch.set_num_threads(n)
            out, log_sums = operators.attention(heads, heads, heads, first, 0.3)
            grads = operators.attention_backward(out, heads, heads, heads, first, 0.3, out, log_sums)
            y, scales = pointwise.rms_norm(x, x[0].contiguous(), 1e-6, 0.0)
            results.append((out, *grads, y, *pointwise.rms_norm_backward(y, x, x[0].contiguous(), scales, 0.0)))
    finally:
        torch.set_num_threads(n_threads)
    for one, three in zip(*results, strict=True):
        assert torch.equal(one, three)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("shift", [0.0, 1.0])
def test_norms_of_queries_and_keys_are_the_formula(dtype: torch.dtype, tolerance: float, shift: float) -> None:
    torch.manual_seed(0)
    heads, weights = torch.randn(9, 7, 32).to(dtype).requires_grad_(), torch.randn(2, 32).to(dtype).requires_grad_()
    y, _ = pointwise.head_norms(heads, weights, 2, 1e-5, shift)
    grad = torch.randn_like(y)
    y.backward(grad)
    x, w = heads.detach().double().requires_grad_(), weights.detach().double().requires_grad_()
    normed = torch.nn.functional.rms_norm(x, (32,), None, 1e-5)
    wanted = torch.cat([normed[:, :3] * (w[0] + shift), normed[:, 3:5] * (w[1] + shift), x[:, 5:]], dim=1)
    wanted.backward(grad.double())
    assert_close(y, wanted, tolerance)
    assert torch.equal(y[:, 5:], heads[:, 5:])
    for mine, theirs in ((heads.grad, x.grad), (weights.grad, w.grad)):
        assert mine is not None
        assert theirs is not None
        assert_close(mine, theirs, tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("gate", [0, 1])
def test_gates_are_the_formulas(gate: int, dtype: torch.dtype, tolerance: float) -> None:
    """Far from zero, too, where the gate is closed or open."""
    torch.manual_seed(0)
    both = torch.cat([torch.linspace(-60, 60, 96).expand(5, -1), torch.randn(5, 96)], dim=1).to(dtype).requires_grad_()
    y = pointwise.gated(both, gate)
    grad = torch.randn_like(y)
    y.backward(grad)
    truth = both.detach().double().requires_grad_()
    formulas = (torch.nn.functional.silu, lambda g: torch.nn.functional.gelu(g, approximate="tanh"))
    g, up = truth.chunk(2, dim=1)
    wanted = formulas[gate](g) * up
    wanted.backward(grad.double())
    assert both.grad is not None
    assert truth.grad is not None
    assert_close(y, wanted, tolerance)
    assert_close(both.grad, truth.grad, tolerance)


def operator_samples() -> list[Any]:
    torch.manual_seed(1)
    heads = torch.randn(1, 20, 4, 32, requires_grad=True)
    q, k, v = (torch.randn(1, n, 20, 32, requires_grad=True) for n in (2, 1, 1))
    first, angle = torch.zeros(1, 20, dtype=torch.int32), torch.rand(1, 20, 32)
    x, weight = torch.randn(6, 32, requires_grad=True), torch.rand(32, requires_grad=True)
    many, weights = torch.randn(6, 4, 32, requires_grad=True), torch.rand(2, 32, requires_grad=True)
    return [
        pytest.param(operators.attention, (q, k, v, first, 0.3), id="attention"),
        pytest.param(operators.rotary_attention, (heads, first, angle.cos(), angle.sin(), 1, 0.3), id="rotary"),
        pytest.param(pointwise.rms_norm, (x, weight, 1e-5, 1.0), id="norm"),
        pytest.param(pointwise.head_norms, (many, weights, 1, 1e-5, 0.0), id="head norms"),
        pytest.param(pointwise.gated, (x, 0), id="silu"),
        pytest.param(pointwise.gated, (x, 1), id="gelu"),
    ]


@pytest.mark.parametrize(("operator", "arguments"), operator_samples())
def test_operators_are_registered_rightly(operator: Any, arguments: tuple[Any, ...]) -> None:
    checks = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(operator, arguments, test_utils=checks)
